"""One context and one answer as a model reads and writes them, to look at: `rag doctor --model` prints it.

Shapes: none; everything is text.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import torch

from rag_core.corpus.passages import Passage
from rag_core.model.reader import GeneratorReader
from rag_core.reading.contexts import answer_labels, assemble_contexts

SAMPLE_QUESTION, SAMPLE_ANSWER = "Which country is Lyon in?", "France"
SAMPLE_PASSAGE = Passage("sample", "Lyon", "Lyon is a city in France, where the Rhone and the Saone meet.")


@dataclass(frozen=True, slots=True)
class Piece:
    """A stretch of text that is written by ordinary tokens, or by special ones."""

    text: str
    special: bool


@dataclass(frozen=True, slots=True)
class ContextSample:
    """A context, an answer as it is trained, and the tokens that end answers in decoding."""

    context: tuple[Piece, ...]
    tokens: int
    is_cut: bool
    answer: tuple[Piece, ...]
    ends: tuple[str, ...]


def context_sample(reader: GeneratorReader, question: str, passage: Passage, answer: str) -> ContextSample:
    """Join a question to a passage and label its answer, as training and inference do.

    Raises: ConfigError: the question alone does not fit into `max_context_tokens`.
    """
    tokenizer, prompt, cpu = reader.tokenizer, reader.prompt, torch.device("cpu")
    contexts = assemble_contexts(tokenizer, prompt, [question], [[passage]], cpu)
    ids = contexts.input_ids_BKS[0, 0].tolist()
    labels = answer_labels(tokenizer, [answer], prompt.max_answer_tokens, cpu, end=reader.end, rendered=prompt.rendered)
    return ContextSample(
        context=_pieces(tokenizer, ids),
        tokens=len(ids),
        is_cut=contexts.cut > 0,
        answer=_pieces(tokenizer, labels[0].tolist()),
        ends=tuple(str(tokenizer.convert_ids_to_tokens(end)) for end in reader.ends),
    )


def _pieces(tokenizer: Any, ids: Sequence[int]) -> tuple[Piece, ...]:
    special = {token for token, added in tokenizer.added_tokens_decoder.items() if added.content.strip()}
    special |= set(tokenizer.all_special_ids)
    return tuple(
        Piece(tokenizer.decode(list(run), clean_up_tokenization_spaces=False), is_special)
        for is_special, run in groupby(ids, key=special.__contains__)
    )
