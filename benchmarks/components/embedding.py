"""Embedding real passages in one process: `TextEncoder.encode` against `SentenceTransformer.encode`, same weights.

The peer computes in float32, its default, with the batch size that is fastest for it. Passages: XQuAD's paragraphs (50
to 256 tokens; `RAG_XQUAD` names the file, and without it these lines are left out) and places of geonames (about 16
tokens). Recall: XQuAD's 1,190 questions, and "Where is X?" for places.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
from torch import nn

from benchmarks.harness import Line, Precision, Side, Size, in_turn, limit_share, main
from benchmarks.parts.places import MINILM, geonames_passages
from rag_core.corpus.formats import read_rows
from rag_core.embeddings.text_encoder import TextEncoder
from rag_core.pretrained.model_source import resolve_model_source
from rag_core.questions.questions import read_questions

XQUAD = Path(os.environ.get("RAG_XQUAD", "../shared/data/xquad.en.json"))
BATCH_SIZES = (4, 8, 16, 32, 64)
TARGETS: dict[Precision, float] = {"float32": 1.3, "bfloat16": 2.5}


def texts_of(corpus: str, size: Size) -> tuple[list[str], list[str], list[int]]:
    """Passages, questions, and the row of each question's passage."""
    smoke = size == "smoke"
    if corpus == "XQuAD":
        passages = [row.passage for row in read_rows([XQUAD], "squad", words_per_passage=100)]
        row_of = {passage.id: row for row, passage in enumerate(passages[:20] if smoke else passages)}
        questions = [question for question in read_questions(XQUAD) if question.gold_passage_ids[0] in row_of]
        gold = [row_of[question.gold_passage_ids[0]] for question in questions]
        return [passages[row].text for row in row_of.values()], [question.question for question in questions], gold
    passages = geonames_passages(100 if smoke else 2000)
    rows = range(0, len(passages), 4)
    return (
        [passage.text for passage in passages],
        [f"Where is {passages[row].text.split(' is a ')[0]}?" for row in rows],
        list(rows),
    )


def prepare_ours(texts: list[str], precision: Precision) -> Callable[[], np.ndarray]:
    encoder = TextEncoder.from_pretrained(MINILM)
    return lambda: encoder.encode(texts, precision=precision)


def prepare_peer(texts: list[str]) -> Callable[[], dict[str, Any]]:
    from sentence_transformers import SentenceTransformer

    model = SentenceTransformer(resolve_model_source(MINILM), device="cpu")

    def encode(batch: list[str], batch_size: int) -> np.ndarray:
        return np.asarray(model.encode(batch, batch_size=batch_size, show_progress_bar=False))

    def seconds(batch_size: int) -> float:
        start = time.perf_counter()
        encode(texts[::5], batch_size)
        return time.perf_counter() - start

    encode(texts[::5], 32)
    best = min(BATCH_SIZES, key=seconds)
    return lambda: {"vectors": encode(texts, best), "batch_size": best}


def operations_of(texts: list[str]) -> float:
    """Multiplications and additions of the matrix products for these texts, without padding."""
    encoder = TextEncoder.from_pretrained(MINILM)
    config: Any = encoder.model.config
    lengths = np.array([len(token_ids) for token_ids in encoder.tokenize(texts)], dtype=np.float64)
    layers = [
        layer for name, layer in encoder.model.named_modules() if type(layer) is nn.Linear and "pooler" not in name
    ]
    weights = sum(layer.weight.numel() for layer in layers)
    attention = 4 * config.hidden_size * config.num_hidden_layers
    return float(2 * weights * lengths.sum() + attention * (lengths**2).sum())


def recall_at_10(passages_ND: np.ndarray, questions_QD: np.ndarray, gold: list[int]) -> float:
    """Share of questions whose gold passage is among the ten with the largest inner products."""
    scores_QN = questions_QD @ passages_ND.T
    gold_Q1 = scores_QN[np.arange(len(gold)), gold][:, None]
    return float(((scores_QN > gold_Q1).sum(axis=1) < 10).mean())


def measure(size: Size) -> list[Line]:
    """One line per corpus and precision."""
    lines = []
    for corpus in [*(["XQuAD"] if XQUAD.exists() else []), "geonames"]:
        texts, questions, gold = texts_of(corpus, size)
        operations = operations_of(texts)
        questions_QD = {precision: prepare_ours(questions, precision)() for precision in TARGETS}
        with ExitStack() as stack:
            ours = {precision: stack.enter_context(Side(prepare_ours, texts, precision)) for precision in TARGETS}
            peer = stack.enter_context(Side(prepare_peer, texts))
            runs = in_turn(ours, peer, 1 if size == "smoke" else 3, warmup=0)
        for precision, pairs in runs.items():
            vectors_ND, reference_ND = pairs.ours[0].result, pairs.peer[0].result["vectors"]
            difference = float(np.abs(vectors_ND - reference_ND).max())
            cosine = float((vectors_ND * reference_ND).sum(axis=1).min())
            recall = recall_at_10(vectors_ND, questions_QD[precision], gold)
            expected = recall_at_10(reference_ND, questions_QD["float32"], gold)
            equal = (
                difference <= 1e-5 if precision == "float32" else cosine >= 0.999 and abs(recall - expected) <= 0.002
            )
            lines.append(
                Line(
                    path=f"embedding, {len(texts)} passages of {corpus}, {precision}",
                    peer=f"SentenceTransformer.encode, float32, batches of {pairs.peer[0].result['batch_size']}",
                    value=pairs.speedup,
                    target=TARGETS[precision],
                    limit_share=limit_share(operations, pairs.seconds, precision),
                    memory=pairs.peak_ratio,
                    outputs=f"at most {difference:.0e} apart; smallest cosine {cosine:.5f}; recall@10 {recall:.2%} and "
                    f"{expected:.2%}",
                    outputs_equal=equal,
                    details=pairs.details() | {"texts_per_second": round(len(texts) / pairs.seconds, 1)},
                )
            )
    return lines


if __name__ == "__main__":
    main(measure)
