"""Question and passage to the generator's input.

How the two are joined is one template, stored with the model, so that inference cannot differ from training. When a
context is too long the passage's text is cut, never the question, and how many were cut is counted. A tokenizer that
tells offsets loses whole tokens of the text; for one that does not (Marian's) the text is cut to a prefix found by
bisection, about ten tokenisations for each context that is too long. This module knows nothing of retrieval.

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
from rag_core.questions.questions import Question
from rag_core.reading.likelihood import IGNORE_INDEX
from rag_core.reading.prompt import PromptConfig


@dataclass(frozen=True, slots=True)
class Contexts:
    """Contexts for the generator: ids and mask int64, padded on the right to the longest; how many lost text."""

    input_ids_BKS: torch.Tensor
    attention_mask_BKS: torch.Tensor
    cut: int


@dataclass(slots=True)
class ContextCount:
    """How many contexts were read, and how many of them had their passage's text cut."""

    contexts: int = 0
    contexts_cut: int = 0

    def __sub__(self, before: ContextCount) -> ContextCount:
        return ContextCount(self.contexts - before.contexts, self.contexts_cut - before.contexts_cut)

    @property
    def cut_share(self) -> float:
        """Between 0 and 1; 0 where nothing was read."""
        return self.contexts_cut / max(self.contexts, 1)


@dataclass(frozen=True, slots=True)
class _Filled:
    """A context as text, and where in it the passage's text starts and ends."""

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
    room, ids, cut = prompt.max_context_tokens, tokenizer([one.text for one in filled])["input_ids"], 0
    cut_text = _drop_tokens if tokenizer.is_fast else _drop_characters
    for place, one in enumerate(filled):
        if len(ids[place]) > room:
            ids[place] = cut_text(tokenizer, one, room)
            cut += 1
    input_ids_PS, mask_PS = pad_ids(ids, tokenizer.pad_token_id, device)
    shape = (len(questions), len(passages_BK[0]), -1)
    return Contexts(input_ids_PS.view(shape), mask_PS.view(shape), cut)


def check_questions(
    tokenizer: Any, prompt: PromptConfig, questions: Sequence[Question], place: Path | str, *, learnt: bool
) -> None:
    """Raise InputError for the first question that cannot be read, before hours of work meet it.

    Args:
        tokenizer: the generator's.
        prompt: how contexts are made.
        questions: those of a file.
        place: the file's name, for the message.
        learnt: whether the first answer of each is to be learnt; it then needs a token.
    """
    empty = Passage(id="", title="", text="")
    contexts = [_fill(prompt.template, question.question, empty).text for question in questions]
    for question, ids in zip(questions, tokenizer(contexts)["input_ids"] if contexts else (), strict=True):
        if len(ids) > prompt.max_context_tokens:
            raise InputError(
                f"{place}: question {question.id!r} takes {len(ids)} tokens without any passage, but max_context_tokens is "
                f"{prompt.max_context_tokens} (it begins {excerpt(question.question)[:60]!r}). Shorten it, leave it out, or "
                "raise max_context_tokens."
            )
    answered = [question for question in questions if learnt and question.answers]
    answers = [question.answers[0] for question in answered]
    labels = tokenizer(text_target=answers, add_special_tokens=False)["input_ids"] if answers else ()
    for question, ids in zip(answered, labels, strict=True):
        if not ids:
            raise InputError(
                f"{place}: question {question.id!r} has an answer without tokens ({question.answers[0]!r}), so there is "
                "nothing to learn. Correct the answer, or leave the question out."
            )


def answer_labels(
    tokenizer: Any, answers: Sequence[str], max_answer_tokens: int, device: torch.device, *, end: int | None = None
) -> torch.Tensor:
    """labels_BT int64: the answers' tokens with the end token, padded with -100, without a start token.

    `end` is the token that ends an answer; default: the tokenizer's, and ConfigError if it has none.
    """
    end = end_token_id(tokenizer) if end is None else end
    # As target: some tokenizers (Marian's, mBART's) write another language, with other pieces, than they read.
    ids = tokenizer(text_target=list(answers), add_special_tokens=False)["input_ids"]
    labels = [[*one[: max_answer_tokens - 1], end] for one in ids]
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
    # A token that reaches out of the text stays, for it may hold a part of the question; a space before the text may
    # go. A token of white space alone can have an empty span (BART's), at its end.
    inside = [
        place
        for place, ((first, last), special) in enumerate(
            zip(encoded["offset_mapping"], encoded["special_tokens_mask"], strict=True)
        )
        if not special and filled.start < last <= filled.end and not filled.text[first : filled.start].strip()
    ]
    ids: list[int] = encoded["input_ids"]
    excess = len(ids) - room
    if excess > len(inside):
        raise _no_room(filled, len(ids) - len(inside), room)
    dropped = set(inside[len(inside) - excess :])
    return [one for place, one in enumerate(ids) if place not in dropped]


def _drop_characters(tokenizer: Any, filled: _Filled, room: int) -> list[int]:
    """The context with a prefix of the passage's text that fits, while one character more would not."""

    def with_prefix(characters: int) -> list[int]:
        text = filled.text[: filled.start + characters] + filled.text[filled.end :]
        ids: list[int] = tokenizer(text)["input_ids"]
        return ids

    ids, fits, too_many = with_prefix(0), 0, filled.end - filled.start
    if len(ids) > room:
        raise _no_room(filled, len(ids), room)
    while too_many - fits > 1:
        middle = (fits + too_many) // 2
        found = with_prefix(middle)
        if len(found) <= room:
            ids, fits = found, middle
        else:
            too_many = middle
    return ids


def _no_room(filled: _Filled, tokens: int, room: int) -> ConfigError:
    rest = excerpt(filled.text[: filled.start] + filled.text[filled.end :])
    return ConfigError(
        f"A question with its title takes {tokens} tokens, but max_context_tokens is {room}: {rest!r}. Shorten the question "
        "or raise max_context_tokens."
    )
