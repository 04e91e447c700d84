"""Turn questions and passages into the generator's input.

One template joins the two. It is stored with the model, so that inference cannot differ from training. A context that
is too long loses text of the passage, never of the question, and the number of cut contexts is counted. Fast tokenizers
report offsets, so whole tokens of the text are dropped. Slow ones (Marian's) do not: bisection finds a prefix of the
text that fits, with about ten tokenisations per context that is too long. Special tokens inside titles, passages,
questions and answers stay text (`special_tokens.py`). This module knows nothing of retrieval.

Shapes: B questions, K passages per question, S context tokens, T answer tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from rag_core.corpus.formats.rows import excerpt
from rag_core.corpus.passages import NO_PASSAGE, Passage
from rag_core.embeddings.text_encoder import pad_ids
from rag_core.errors import ConfigError, InputError
from rag_core.generators.token_log_probs import IGNORE_INDEX
from rag_core.questions.questions import Question
from rag_core.reading.prompt import Filled, PromptConfig, RenderedPrompt, after_last_field, fields_of
from rag_core.reading.rendering import rendered_chat
from rag_core.reading.special_tokens import SpecialTokens, end_token_id


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
    tokenization = _Tokenization(tokenizer, prompt)
    filled, ids = tokenization.of(
        [
            (question, passage)
            for question, passages_K in zip(questions, passages_BK, strict=True)
            for passage in passages_K
        ]
    )
    room, cut = prompt.max_context_tokens, 0
    cut_text = _drop_tokens if tokenizer.is_fast else _drop_characters
    for row, context in enumerate(filled):
        if len(ids[row]) > room:
            ids[row] = cut_text(tokenization, context, room)
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
    tokenization = _Tokenization(tokenizer, prompt)
    _, contexts = tokenization.of([(question.question, NO_PASSAGE) for question in questions])
    for question, ids in zip(questions, contexts, strict=True):
        if len(ids) > prompt.max_context_tokens:
            raise InputError(
                f"{place}: question {question.id!r} takes {len(ids)} tokens without any passage, but "
                f"max_context_tokens is {prompt.max_context_tokens} (it begins {excerpt(question.question)[:60]!r}). "
                "Shorten it, leave it out, or raise max_context_tokens."
            )
    answered = [question for question in questions if learnt and question.answers]
    answers = [question.answers[0] for question in answered]
    for question, ids in zip(answered, _answer_ids(tokenizer, answers, prompt.rendered), strict=True):
        if not ids:
            raise InputError(
                f"{place}: question {question.id!r} has an answer without tokens ({question.answers[0]!r}), so there "
                "is nothing to learn. Correct the answer, or leave the question out."
            )


def answer_labels(
    tokenizer: Any,
    answers: Sequence[str],
    max_answer_tokens: int,
    device: torch.device,
    *,
    end: int | None = None,
    rendered: RenderedPrompt | None = None,
) -> torch.Tensor:
    """labels_BT int64: the answers' tokens and the end token, padded with -100, no start token.

    Args:
        tokenizer: the generator's.
        answers: B texts.
        max_answer_tokens: longest answer, end token included; longer ones are cut.
        device: of the labels.
        end: id of the token that ends an answer; default: the tokenizer's. ConfigError if it has none.
        rendered: the generator's prompt, if it has a form of its own; the answers' tokens are then those that continue
            its context.
    """
    end = end_token_id(tokenizer) if end is None else end
    labels = [[*ids[: max_answer_tokens - 1], end] for ids in _answer_ids(tokenizer, answers, rendered)]
    labels_BT, mask_BT = pad_ids(labels, IGNORE_INDEX, device)
    return labels_BT.masked_fill(mask_BT == 0, IGNORE_INDEX)


def _answer_ids(tokenizer: Any, answers: Sequence[str], rendered: RenderedPrompt | None) -> list[list[int]]:
    """The answers' tokens without the end token."""
    if not answers:
        return []

    def encode(texts: list[str] | str, offsets: bool = False) -> Any:
        # text_target: some tokenizers (Marian's, mBART's) split the language they write differently from the one they
        # read.
        return tokenizer(text_target=texts, add_special_tokens=False, return_offsets_mapping=offsets)

    # The context's last words go before the answer while it is tokenised, because tokens depend on their neighbours: a
    # space before a word belongs to it in BPE, and SentencePiece puts one before a text that stands alone.
    before = "" if rendered is None else after_last_field(rendered.context) or ":"
    prefix = "" if rendered is None else rendered.answer_prefix
    texts = list(answers) if rendered is None else [answer.strip() for answer in answers]
    special, before_ids = SpecialTokens(tokenizer), encode(before)["input_ids"] if before else []
    rows: list[list[int]] = encode([before + prefix + text for text in texts])["input_ids"]
    for row, text in enumerate(texts):
        if special.count(rows[row]) > special.count(before_ids):
            filled = Filled(before + prefix + text, {"{answer}": (len(before + prefix), len(before + prefix + text))})
            broken = special.broken(filled, lambda context: encode(context, tokenizer.is_fast))
            texts[row] = broken.text[len(before + prefix) :]
            rows[row] = encode(broken.text)["input_ids"]
        if rendered is not None and not text:
            rows[row] = []
        elif rows[row][: len(before_ids)] == before_ids:
            rows[row] = rows[row][len(before_ids) :]
        else:
            # A token would reach from the context into the answer; the context has been read without the answer.
            rows[row] = encode(prefix + texts[row])["input_ids"]
    return rows


class _Tokenization:
    """Fills a prompt's template and tokenises it, so that no field writes a special token."""

    def __init__(self, tokenizer: Any, prompt: PromptConfig) -> None:
        rendered = rendered_chat(tokenizer, prompt).rendered
        self._tokenizer = tokenizer
        self._template = prompt.template if rendered is None else rendered.context
        self._adds = rendered is None or rendered.special_tokens
        # A decoder-only model continues the context, so it must not read an end token there.
        self._left_out = 0 if rendered is None or not self._adds else _tokens_added_at_end(tokenizer)
        self._special = SpecialTokens(tokenizer)
        self._own = self._special.count(self.ids([Filled.of(self._template, fields_of("", "", ""))])[0])

    def of(self, pairs: Sequence[tuple[str, Passage]]) -> tuple[list[Filled], list[list[int]]]:
        """Contexts of questions and passages, as filled templates and as ids, not cut."""
        filled = [
            Filled.of(self._template, fields_of(question, passage.title, passage.text)) for question, passage in pairs
        ]
        ids = self.ids(filled)
        for row, context in enumerate(filled):
            if self._special.count(ids[row]) > self._own:
                filled[row] = self._special.broken(context, lambda text: self._encode(text, self._tokenizer.is_fast))
                ids[row] = self.ids([filled[row]])[0]
        return filled, ids

    def ids(self, filled: Sequence[Filled]) -> list[list[int]]:
        rows = self._encode([context.text for context in filled])["input_ids"] if filled else []
        return [self._without_end(row) for row in rows]

    def with_offsets(self, filled: Filled) -> tuple[list[int], list[tuple[int, int]], list[int]]:
        """Ids, the characters of each token, and 1 for each token that the tokenizer adds."""
        encoded = self._encode(filled.text, True)
        names = ("input_ids", "offset_mapping", "special_tokens_mask")
        ids, offsets, added = (self._without_end(encoded[name]) for name in names)
        return ids, offsets, added

    def _encode(self, texts: list[str] | str, offsets: bool = False) -> Any:
        options = {"return_offsets_mapping": True, "return_special_tokens_mask": True} if offsets else {}
        return self._tokenizer(texts, add_special_tokens=self._adds, **options)

    def _without_end(self, row: list[Any]) -> list[Any]:
        return row[: len(row) - self._left_out]


def _tokens_added_at_end(tokenizer: Any) -> int:
    """How many tokens the tokenizer adds after a text."""
    bare, whole = tokenizer("a", add_special_tokens=False)["input_ids"], tokenizer("a")["input_ids"]
    starts = range(len(whole) - len(bare) + 1)
    return next((len(whole) - start - len(bare) for start in starts if whole[start : start + len(bare)] == bare), 0)


def _drop_tokens(tokenization: _Tokenization, filled: Filled, room: int) -> list[int]:
    """Drop tokens from the end of the passage's text until the context fits."""
    ids, offsets, added = tokenization.with_offsets(filled)
    # Keep a token that reaches beyond the text, as it may hold a part of the question; only a space before the text may
    # go with it. BART's tokens of white space alone can have an empty span, which lies at their end.
    inside = [
        position
        for position, ((first, last), special) in enumerate(zip(offsets, added, strict=True))
        if not special and filled.start < last <= filled.end and not filled.text[first : filled.start].strip()
    ]
    excess = len(ids) - room
    if excess > len(inside):
        raise _no_room(filled, len(ids) - len(inside), room)
    dropped = set(inside[len(inside) - excess :])
    return [token for position, token in enumerate(ids) if position not in dropped]


def _drop_characters(tokenization: _Tokenization, filled: Filled, room: int) -> list[int]:
    """Cut the passage's text to a prefix that fits, while one more character would not; return the context's ids."""

    def with_prefix(characters: int) -> list[int]:
        text = filled.text[: filled.start + characters] + filled.text[filled.end :]
        return tokenization.ids([Filled(text, filled.spans)])[0]

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


def _no_room(filled: Filled, tokens: int, room: int) -> ConfigError:
    rest = excerpt(filled.text[: filled.start] + filled.text[filled.end :])
    return ConfigError(
        f"A question with its title takes {tokens} tokens, but max_context_tokens is {room}: {rest!r}. Shorten the "
        "question or raise max_context_tokens."
    )
