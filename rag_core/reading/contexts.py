"""Turn questions and passages into the generator's input.

One template joins the two. It is stored with the model, so that inference cannot differ from training. A context that
is too long loses text of the passage, never of the question, and the number of cut contexts is counted. Fast tokenizers
report offsets, so whole tokens of the text are dropped. Slow ones (Marian's) do not: bisection finds a prefix of the
text that fits, with about ten tokenisations per context that is too long. This module knows nothing of retrieval.

Shapes: B questions, K passages per question, S context tokens, T answer tokens.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from rag_core.corpus.formats.rows import excerpt
from rag_core.corpus.passages import Passage
from rag_core.embeddings.text_encoder import pad_ids
from rag_core.errors import ConfigError, InputError
from rag_core.generators.token_log_probs import IGNORE_INDEX
from rag_core.questions.questions import Question
from rag_core.reading.prompt import PromptConfig


@dataclass(frozen=True, slots=True)
class Contexts:
    """Contexts for the generator: int64 ids and mask, padded on the right; `cut` counts those that lost text."""

    input_ids_BKS: torch.Tensor
    attention_mask_BKS: torch.Tensor
    cut: int


@dataclass(slots=True)
class ContextCount:
    """How many contexts were read, and in how many of them the passage's text was cut."""

    contexts: int = 0
    contexts_cut: int = 0

    def __sub__(self, before: ContextCount) -> ContextCount:
        return ContextCount(self.contexts - before.contexts, self.contexts_cut - before.contexts_cut)

    @property
    def cut_share(self) -> float:
        """Share of contexts that were cut, between 0 and 1; 0 if none was read."""
        return self.contexts_cut / max(self.contexts, 1)


@dataclass(frozen=True, slots=True)
class _Filled:
    """A context as text, and the characters at which the passage's text starts and ends."""

    text: str
    start: int
    end: int


def assemble_contexts(
    tokenizer: Any,
    prompt: PromptConfig,
    questions: Sequence[str],
    passages_BK: Sequence[Sequence[Passage]],
    device: torch.device,
) -> Contexts:
    """Join every question to each of its K passages.

    Raises:
        ConfigError: a question alone does not fit into `max_context_tokens`.
    """
    filled = [
        _fill(prompt.template, question, passage)
        for question, passages_K in zip(questions, passages_BK, strict=True)
        for passage in passages_K
    ]
    room, ids, cut = prompt.max_context_tokens, tokenizer([context.text for context in filled])["input_ids"], 0
    cut_text = _drop_tokens if tokenizer.is_fast else _drop_characters
    for row, context in enumerate(filled):
        if len(ids[row]) > room:
            ids[row] = cut_text(tokenizer, context, room)
            cut += 1
    input_ids_PS, mask_PS = pad_ids(ids, tokenizer.pad_token_id, device)
    shape = (len(questions), len(passages_BK[0]), -1)
    return Contexts(input_ids_PS.view(shape), mask_PS.view(shape), cut)


def check_questions(
    tokenizer: Any, prompt: PromptConfig, questions: Sequence[Question], place: Path | str, *, learnt: bool
) -> None:
    """Raise InputError for the first question that the generator cannot read, before hours of work reach it.

    Args:
        tokenizer: the generator's.
        prompt: template and limits of the contexts.
        questions: the questions of a file.
        place: the file's name, for the message.
        learnt: whether each question's first answer is trained on; it then needs at least one token.
    """
    empty = Passage(id="", title="", text="")
    contexts = [_fill(prompt.template, question.question, empty).text for question in questions]
    for question, ids in zip(questions, tokenizer(contexts)["input_ids"] if contexts else (), strict=True):
        if len(ids) > prompt.max_context_tokens:
            raise InputError(
                f"{place}: question {question.id!r} takes {len(ids)} tokens without any passage, but "
                f"max_context_tokens is {prompt.max_context_tokens} (it begins {excerpt(question.question)[:60]!r}). "
                "Shorten it, leave it out, or raise max_context_tokens."
            )
    answered = [question for question in questions if learnt and question.answers]
    answers = [question.answers[0] for question in answered]
    labels = tokenizer(text_target=answers, add_special_tokens=False)["input_ids"] if answers else ()
    for question, ids in zip(answered, labels, strict=True):
        if not ids:
            raise InputError(
                f"{place}: question {question.id!r} has an answer without tokens ({question.answers[0]!r}), so there "
                "is nothing to learn. Correct the answer, or leave the question out."
            )


def answer_labels(
    tokenizer: Any, answers: Sequence[str], max_answer_tokens: int, device: torch.device, *, end: int | None = None
) -> torch.Tensor:
    """labels_BT int64: the answers' tokens and the end token, padded with -100, no start token.

    `end` is the id of the token that ends an answer; default: the tokenizer's. ConfigError if it has none.
    """
    end = end_token_id(tokenizer) if end is None else end
    # text_target: some tokenizers (Marian's, mBART's) split the language they write differently from the one they read.
    ids = tokenizer(text_target=list(answers), add_special_tokens=False)["input_ids"]
    labels = [[*answer_ids[: max_answer_tokens - 1], end] for answer_ids in ids]
    labels_BT, mask_BT = pad_ids(labels, IGNORE_INDEX, device)
    return labels_BT.masked_fill(mask_BT == 0, IGNORE_INDEX)


def end_token_id(tokenizer: Any) -> int:
    """The token that ends an answer: the tokenizer's EOS, or SEP for BERT-like tokenizers."""
    end = tokenizer.eos_token_id if tokenizer.eos_token_id is not None else tokenizer.sep_token_id
    if end is None:
        raise ConfigError("The generator's tokenizer has neither an EOS nor a SEP token, so answers could never end.")
    return int(end)


def _fill(template: str, question: str, passage: Passage) -> _Filled:
    # Not str.format: braces inside a passage must stay as they are.
    fields = {"{title}": passage.title, "{question}": question}
    before, after = (
        re.sub(r"\{title\}|\{question\}", lambda m: fields[m.group()], part) for part in template.split("{text}")
    )
    return _Filled(before + passage.text + after, len(before), len(before) + len(passage.text))


def _drop_tokens(tokenizer: Any, filled: _Filled, room: int) -> list[int]:
    """Drop tokens from the end of the passage's text until the context fits."""
    encoded = tokenizer(filled.text, return_offsets_mapping=True, return_special_tokens_mask=True)
    # Keep a token that reaches beyond the text, as it may hold a part of the question; only a space before the text may
    # go with it. BART's tokens of white space alone can have an empty span, which lies at their end.
    inside = [
        position
        for position, ((first, last), special) in enumerate(
            zip(encoded["offset_mapping"], encoded["special_tokens_mask"], strict=True)
        )
        if not special and filled.start < last <= filled.end and not filled.text[first : filled.start].strip()
    ]
    ids: list[int] = encoded["input_ids"]
    excess = len(ids) - room
    if excess > len(inside):
        raise _no_room(filled, len(ids) - len(inside), room)
    dropped = set(inside[len(inside) - excess :])
    return [token for position, token in enumerate(ids) if position not in dropped]


def _drop_characters(tokenizer: Any, filled: _Filled, room: int) -> list[int]:
    """Cut the passage's text to a prefix that fits, while one more character would not; return the context's ids."""

    def with_prefix(characters: int) -> list[int]:
        text = filled.text[: filled.start + characters] + filled.text[filled.end :]
        ids: list[int] = tokenizer(text)["input_ids"]
        return ids

    ids, fits, too_many = with_prefix(0), 0, filled.end - filled.start
    if len(ids) > room:
        raise _no_room(filled, len(ids), room)
    while too_many - fits > 1:
        middle = (fits + too_many) // 2
        candidate = with_prefix(middle)
        if len(candidate) <= room:
            ids, fits = candidate, middle
        else:
            too_many = middle
    return ids


def _no_room(filled: _Filled, tokens: int, room: int) -> ConfigError:
    rest = excerpt(filled.text[: filled.start] + filled.text[filled.end :])
    return ConfigError(
        f"A question with its title takes {tokens} tokens, but max_context_tokens is {room}: {rest!r}. Shorten the "
        "question or raise max_context_tokens."
    )
