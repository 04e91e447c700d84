"""The prompt: how title, text and question become the generator's input, and the longest contexts and answers.

`PromptConfig` is what a user sets. `RenderedPrompt` is what becomes of it for one generator whose context has a form of
its own: a chat, or the text that a decoder-only model continues. It is saved with the model.
"""

from __future__ import annotations

import re
from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    SerializerFunctionWrapHandler,
    field_validator,
    model_serializer,
    model_validator,
)

# "bart" is the paper's template (Hugging Face's `title_sep` and `doc_sep`).
TEMPLATES = {
    "bart": "{title} / {text} // {question}",
    "t5": "question: {question} context: {title} {text}",
    "plain": "{title}: {text}\nQuestion: {question}\nAnswer:",
}
CHAT = "chat"
# What the user says in a chat.
CHAT_USER = "{title}: {text}\n\nQuestion: {question}\nAnswer with a few words from the text."
FIELDS = ("{title}", "{text}", "{question}")

_FIELD = re.compile(r"\{title\}|\{text\}|\{question\}")


class RenderedPrompt(BaseModel):
    """The prompt as one generator reads it. `rendering.py` makes it; it is saved with the model."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    context: str = Field(
        description="the context with {title}, {text} and {question}; a chat's special tokens included"
    )
    special_tokens: bool = Field(description="whether the tokenizer adds its start token; a chat has its own")
    answer_prefix: str = Field("", description="spaces that stand between the context and an answer")
    answer_end: str | None = Field(None, description="the token that ends an answer; empty: the tokenizer's")

    @field_validator("context")
    @classmethod
    def _whole(cls, context: str) -> str:
        return _with_fields(context, "rendered.context")


class PromptConfig(BaseModel):
    """How title, text and question become the generator's input. A short name is replaced by its template when set."""

    model_config = ConfigDict(extra="forbid")

    template: str = Field(
        TEMPLATES["bart"],
        description=f"{', '.join(TEMPLATES)} (short for {', '.join(map(repr, TEMPLATES.values()))}); chat: the "
        "tokenizer's chat template; or a template of your own that holds {text} and {question}; {title} is optional",
    )
    system: str | None = Field(None, description="system text of a chat; empty: as the chat template does without one")
    user: str | None = Field(
        None, description=f"the user's turn of a chat, a template of its own; empty: {CHAT_USER!r}"
    )
    max_context_tokens: int = Field(256, ge=8, description="the passage's text is cut so that a context fits")
    max_answer_tokens: int = Field(32, ge=2, description="longest answer in training, end token included")
    rendered: RenderedPrompt | None = Field(
        None, description="the prompt as the generator reads it; made when a model is put together, saved with it"
    )

    @field_validator("template")
    @classmethod
    def _written_out(cls, template: str) -> str:
        return template if template == CHAT else _with_fields(TEMPLATES.get(template, template), "template")

    @field_validator("user")
    @classmethod
    def _holds_fields(cls, user: str | None) -> str | None:
        return None if user is None else _with_fields(user, "user")

    @field_validator("system")
    @classmethod
    def _holds_none(cls, system: str | None) -> str | None:
        if system is not None and (found := _FIELD.search(system)):
            raise ValueError(f"the system text holds {found.group()}; put title, text and question into `user`")
        return system

    @model_validator(mode="after")
    def _chat_alone_has_turns(self) -> PromptConfig:
        if self.template != CHAT and (self.system, self.user) != (None, None):
            raise ValueError("system and user belong to `template: chat`; put their text into the template instead")
        return self

    @model_serializer(mode="wrap")
    def _without_unset(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        # So prompts without these fields keep the files and keys that they had before the fields existed.
        values: dict[str, Any] = handler(self)
        optional = ("system", "user", "rendered")
        return {name: value for name, value in values.items() if name not in optional or value is not None}


@dataclass(frozen=True, slots=True)
class Filled:
    """A filled template: its text, and the characters [start, end) at which each field stands."""

    text: str
    spans: Mapping[str, tuple[int, int]]

    @classmethod
    def of(cls, template: str, fields: Mapping[str, str]) -> Filled:
        """Fill a template with the values of its fields ("{title}", …)."""
        # Not str.format: braces inside a passage must stay as they are.
        text, spans, last = "", {}, 0
        for match in _FIELD.finditer(template):
            text += template[last : match.start()]
            spans[match.group()] = (len(text), len(text) + len(fields[match.group()]))
            text += fields[match.group()]
            last = match.end()
        return cls(text + template[last:], spans)

    @property
    def start(self) -> int:
        """Where the passage's text starts."""
        return self.spans["{text}"][0]

    @property
    def end(self) -> int:
        """Where the passage's text ends."""
        return self.spans["{text}"][1]

    def with_spaces_at(self, places: Sequence[int]) -> Filled:
        """Insert a space before the character at each place; the places are in order."""
        ends = [0, *places, len(self.text)]
        text = " ".join(self.text[first:last] for first, last in pairwise(ends))
        spans = {}
        for name, (start, end) in self.spans.items():
            before = bisect_right(places, start)
            spans[name] = (start + before, end + max(before, bisect_left(places, end)))
        return Filled(text, spans)

    def blanked(self, places: Iterable[int]) -> Filled:
        """Replace the characters at some places by spaces."""
        characters = list(self.text)
        for place in places:
            characters[place] = " "
        return Filled("".join(characters), self.spans)

    def in_fields(self, first: int, last: int) -> list[int]:
        """The places in [first, last) that belong to a field and are no white space."""
        return [
            place
            for start, end in self.spans.values()
            for place in range(max(first, start), min(last, end))
            if not self.text[place].isspace()
        ]


def fields_of(question: str, title: str, text: str) -> dict[str, str]:
    """The values of a template's fields."""
    return {"{title}": title, "{text}": text, "{question}": question}


def after_last_field(template: str) -> str:
    """What a template holds after its last field."""
    return _FIELD.split(template)[-1]


def _with_fields(template: str, name: str) -> str:
    if template.count("{text}") != 1 or template.count("{question}") != 1 or template.count("{title}") > 1:
        raise ValueError(
            f"the {name} must hold {{text}} and {{question}} once each, and {{title}} at most once"
            + (f", or be one of the names {', '.join((*TEMPLATES, CHAT))}" if name == "template" else "")
        )
    return template
