"""Render a prompt for one generator: with its chat template, or as a text that a decoder-only model continues.

A chat is rendered once, with placeholders for title, text and question. The result is a plain template: it is saved
with the model, so inference reads what training read, whatever becomes of the chat template. Three things are settled
here:

- Thinking is switched off, by the variables that chat templates read for it, and where a template has no such switch,
  by taking what it writes before an assistant's content instead of a generation prompt that opens `<think>`.
- The date that some templates write (`strftime_now`) is the same on every day, in every process. With today's, the
  workers of one run could differ, and a resumed run would.
- The token that the template writes after an assistant's content ends the answers.

An encoder-decoder with a template that is no chat has nothing to render.
"""

from __future__ import annotations

from datetime import datetime
from typing import Any

from rag_core.corpus.formats.rows import first_line
from rag_core.errors import ConfigError
from rag_core.reading.prompt import CHAT, CHAT_USER, FIELDS, TEMPLATES, Filled, PromptConfig, RenderedPrompt
from rag_core.reading.special_tokens import end_token_id

# The switches of Qwen3, SmolLM3, GLM, Gemma 4 and others; of Granite, DeepSeek V3.1 and Kimi; of Command A. A template
# that does not read a variable ignores it.
NO_THINKING: dict[str, bool] = {"enable_thinking": False, "thinking": False, "reasoning": False}
OPEN_THINKING = "<think>"

_MARKS = {"{title}": "RAGTITLEFIELD", "{text}": "RAGTEXTFIELD", "{question}": "RAGQUESTIONFIELD"}
_SYSTEM, _ANSWER = "RAGSYSTEMTEXT", "RAGANSWERFIELD"
# Shows whether a chat template leaves the user's text as it is.
_SAMPLE = {"{title}": 'A "title" <of> {two}', "{text}": "One line.\n\n'Another' & more", "{question}": "What is it?"}

_TODAY = datetime(2026, 1, 1)
_DIRECTIVES = ("%-d", "%-m", *(f"%{letter}" for letter in "aAbBcdDeFHIjmMpSTuUwWxXyYZ"))
# A macro of the same name goes before Transformers' function, which takes the clock's time.
_FIXED_DATE = (
    "{%- macro strftime_now(format) -%}{{- format"
    + "".join(f"|replace({directive!r}, {_TODAY.strftime(directive)!r})" for directive in _DIRECTIVES)
    + " -}}{%- endmacro -%}"
)


def rendered_for(generator: Any, tokenizer: Any, prompt: PromptConfig) -> PromptConfig:
    """Return the prompt, rendered if its context has a form of its own with this generator; once rendered, it stays.

    Raises:
        ConfigError: a chat is asked for, and the tokenizer has no chat template, or one that fails, or one that changes
            the user's text.
    """
    if prompt.rendered is not None:
        return prompt
    if prompt.template == CHAT:
        return rendered_chat(tokenizer, prompt)
    if getattr(generator.config, "is_encoder_decoder", False):
        return prompt
    return prompt.model_copy(update={"rendered": _continued(prompt.template)})


def rendered_chat(tokenizer: Any, prompt: PromptConfig) -> PromptConfig:
    """Return the prompt with its chat rendered; if it is no chat or rendered already, unchanged.

    Raises: ConfigError, as `rendered_for`.
    """
    if prompt.template != CHAT or prompt.rendered is not None:
        return prompt
    if not getattr(tokenizer, "chat_template", None):
        raise ConfigError(
            "prompt.template is chat, but the generator's tokenizer has no chat template, as those of base models and "
            f"encoder-decoders have none. Set prompt.template to plain, which is {TEMPLATES['plain']!r}, or to a "
            "template of your own with {title}, {text} and {question}; or choose a model that was tuned for chats."
        )
    user = prompt.user or CHAT_USER
    chat = _Chat(tokenizer, prompt.system)
    start, after = chat.around_answer(Filled.of(user, _MARKS).text)
    context, prefix = _without_spaces_at_end(start)
    for field in FIELDS:
        if context.count(_MARKS[field]) != user.count(field) or field in context:
            raise _changed(f"writes {field} of the user's turn {context.count(_MARKS[field])} times")
        context = context.replace(_MARKS[field], field)
    sample, _ = chat.around_answer(Filled.of(user, _SAMPLE).text)
    if _without_spaces_at_end(sample)[0] != Filled.of(context, _SAMPLE).text:
        raise _changed("changes the text of the user's turn")
    end = _first_added_token(tokenizer, after) or tokenizer.convert_ids_to_tokens(end_token_id(tokenizer))
    rendered = RenderedPrompt(context=context, special_tokens=False, answer_prefix=prefix, answer_end=end)
    return prompt.model_copy(update={"rendered": rendered})


def end_of_answers(generator: Any, tokenizer: Any, prompt: PromptConfig) -> int | None:
    """The token that a rendered prompt ends answers with, made an end token of the generator; None if it names none.

    Decoding reads the end tokens from the generator's generation config. A chat's may be missing there, above all with
    base models that carry the chat template of their tuned version. Added there, it is saved with the model.

    Raises: ConfigError: the tokenizer does not have the token.
    """
    if prompt.rendered is None or prompt.rendered.answer_end is None:
        return None
    text = prompt.rendered.answer_end
    token = tokenizer.convert_tokens_to_ids(text)
    if token is None or tokenizer.convert_ids_to_tokens(token) != text:
        raise ConfigError(
            f"The prompt ends answers with {text!r}, which is no token of the generator's tokenizer. Copy the model "
            "again with the tokenizer that it was trained with."
        )
    generation = generator.generation_config
    ends = generation.eos_token_id if generation.eos_token_id is not None else generator.config.eos_token_id
    known = [] if ends is None else [ends] if isinstance(ends, int) else list(ends)
    if token not in known:
        generation.eos_token_id = [*known, token]
    return int(token)


class _Chat:
    """Renders one user turn; the system text goes into a turn of its own, or before the user's where there is none."""

    def __init__(self, tokenizer: Any, system: str | None) -> None:
        self._tokenizer, self._system, self._before_user = tokenizer, "", ""
        if system and self._has_system_turn():
            self._system = system
        elif system:
            self._before_user = f"{system}\n\n"

    def around_answer(self, user: str) -> tuple[str, str]:
        """What the template writes before and after an assistant's content."""
        opened = self._render(user)
        before, answered, after = self._render(user, _ANSWER).partition(_ANSWER)
        if not answered:
            raise _changed("does not write an assistant's content")
        # Before the content there may be more than the generation prompt has: a space, a channel ("final"), or a whole
        # header, where a template knows no generation prompt. An open <think> is left out: answers come without it.
        if before.startswith(opened.rstrip(" ")) or opened.rstrip().endswith(OPEN_THINKING):
            return before, after
        return opened, after

    def _has_system_turn(self) -> bool:
        # Gemma's templates raise for a system turn; some others leave it out.
        try:
            return _SYSTEM in self._render("a question", system=_SYSTEM)
        except ConfigError:
            return False

    def _render(self, user: str, answer: str | None = None, system: str = "") -> str:
        system = system or self._system
        messages = [{"role": "system", "content": system}] if system else []
        messages += [{"role": "user", "content": self._before_user + user}]
        messages += [{"role": "assistant", "content": answer}] if answer is not None else []
        try:
            template = self._tokenizer.get_chat_template()
            if "strftime_now" in template:
                template = _FIXED_DATE + template
            rendered = self._tokenizer.apply_chat_template(
                messages,
                chat_template=template,
                tokenize=False,
                add_generation_prompt=answer is None,
                **NO_THINKING,
            )
        except Exception as error:  # A chat template is a program of the model's makers, and may raise anything.
            raise ConfigError(
                "The chat template of the generator's tokenizer fails for a question (prompt.template is chat): "
                f"{first_line(error)} Correct its chat_template.jinja, or write the template yourself: prompt.template "
                "with {title}, {text} and {question}."
            ) from error
        return str(rendered)


def _continued(template: str) -> RenderedPrompt:
    """A template whose context a decoder-only model continues with the answer.

    Byte-level BPE has one token for a word with the space before it, so that space belongs to the answer. A template
    that ends with white space or with a sign outside ASCII (such as a full-width colon) wants none.
    """
    context, spaces = _without_spaces_at_end(template)
    if not spaces and context[-1].isascii() and not context[-1].isspace():
        spaces = " "
    return RenderedPrompt(context=context, special_tokens=True, answer_prefix=spaces)


def _without_spaces_at_end(text: str) -> tuple[str, str]:
    context = text.rstrip(" ")
    return context, text[len(context) :]


def _first_added_token(tokenizer: Any, text: str) -> str | None:
    """The first of the tokenizer's added tokens in a text, the longest if several begin at its place."""
    added = [token.content for token in tokenizer.added_tokens_decoder.values() if token.content.strip()]
    found = [(text.find(content), -len(content), content) for content in added if content in text]
    return min(found)[2] if found else None


def _changed(what: str) -> ConfigError:
    return ConfigError(
        f"The chat template of the generator's tokenizer {what}, so it cannot be used for contexts (prompt.template is "
        "chat). Write the template yourself: prompt.template with {title}, {text} and {question}."
    )
