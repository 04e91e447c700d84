"""Which FAISS index, and how well it finds: the choice by size, the training, and the recall that was measured.

Nothing here knows about passages or files; vectors go in, a FAISS index and measured points come out.

Cost of each choice at D dimensions: Flat 4·D bytes a vector and exact; IVF…,Flat the same bytes, visits a part of the lists;
IVF…,SQ8 D bytes; OPQ…,IVF…,PQ64 about 72 bytes. All but Flat are re-scored with the stored vectors.

Shapes: N passages, Q sample queries, D embedding.
"""

from __future__ import annotations

import time
from dataclasses import dataclass

import faiss
import numpy as np

from rag_core.errors import ConfigError

EXACT_UP_TO = 50_000
SCALAR_UP_TO = 5_000_000
ADD_ROWS = 50_000
TRAIN_ROWS_PER_LIST = 64
SAMPLE_QUERIES = 200


@dataclass(frozen=True, slots=True)
class RecallPoint:
    """Recall@10 against exact search, and time, at one setting of a search parameter ("" if there is none)."""

    parameter: str
    value: int
    recall_at_10: float
    milliseconds_per_query: float


@dataclass(frozen=True, slots=True)
class MeasuredRecall:
    """The setting that will be used, and every setting that was tried."""

    chosen: RecallPoint
    curve: list[RecallPoint]


def choose_factory(num_vectors: int, dim: int) -> str:
    """The FAISS factory string for a corpus of this size: exact while that is cheap, then coarser."""
    if num_vectors <= EXACT_UP_TO:
        return "Flat"
    lists = 2 ** round(np.log2(4 * np.sqrt(num_vectors)))
    if num_vectors <= SCALAR_UP_TO or dim % 64:
        return f"IVF{lists},SQ8"
    return f"OPQ64,IVF{lists},PQ64"


def make_faiss_index(vectors_ND: np.ndarray, factory: str, seed: int) -> faiss.Index:
    """Train on a sample and add all vectors, a slice at a time.

    Raises:
        ConfigError: FAISS refuses the string, or training needs more vectors than there are.
    """
    dim = vectors_ND.shape[1]
    try:
        index = faiss.index_factory(dim, factory, faiss.METRIC_INNER_PRODUCT)
    except RuntimeError as error:
        raise ConfigError(
            f"FAISS does not accept the factory string {factory!r} for {dim} dimensions. Use 'auto', or a string such as "
            "'Flat', 'HNSW32' or 'IVF1024,SQ8'."
        ) from error
    try:
        if not index.is_trained:
            index.train(_sample(vectors_ND, _training_rows(index), seed))
        for start in range(0, len(vectors_ND), ADD_ROWS):
            index.add(np.ascontiguousarray(vectors_ND[start : start + ADD_ROWS], dtype=np.float32))
    except RuntimeError as error:
        raise ConfigError(
            f"FAISS could not build {factory!r} from {len(vectors_ND)} vectors of {dim} dimensions. It may need more "
            "vectors to train on: use 'auto' or fewer lists."
        ) from error
    return index


def tune_recall(
    index: faiss.Index, vectors_ND: np.ndarray, target: float, seed: int, refine_factor: int
) -> MeasuredRecall:
    """Measure recall@10 on sampled passages as queries and leave the index at the cheapest setting that reaches `target`.

    For an inverted-file index `nprobe` is doubled until the target is met, for HNSW `efSearch`; others are measured
    as they are.
    """
    if isinstance(index, faiss.IndexFlat):
        point = RecallPoint("", 0, 1.0, _milliseconds(index, _sample(vectors_ND, SAMPLE_QUERIES, seed), 10)[1])
        return MeasuredRecall(point, [point])
    queries_QD = _sample(vectors_ND, SAMPLE_QUERIES, seed + 1)
    truth = _exact_top(queries_QD, vectors_ND, min(10, len(vectors_ND)))
    curve: list[RecallPoint] = []
    for parameter, value in _settings_to_try(index):
        if parameter:
            faiss.ParameterSpace().set_index_parameter(index, parameter, value)
        found, milliseconds = _milliseconds(index, queries_QD, min(len(vectors_ND), 10 * refine_factor))
        curve.append(RecallPoint(parameter, value, _recall(queries_QD, vectors_ND, found, truth), milliseconds))
        if curve[-1].recall_at_10 >= target:
            break
    return MeasuredRecall(curve[-1], curve)


def _settings_to_try(index: faiss.Index) -> list[tuple[str, int]]:
    inner = faiss.downcast_index(index.index) if isinstance(index, faiss.IndexPreTransform) else index
    if isinstance(inner, faiss.IndexIVF):
        # The last value visits every list, also where their number is no power of two.
        return [("nprobe", min(2**power, inner.nlist)) for power in range(int(np.ceil(np.log2(inner.nlist))) + 1)]
    if isinstance(inner, faiss.IndexHNSW):
        return [("efSearch", 2**power) for power in range(4, 11)]
    return [("", 0)]


def _training_rows(index: faiss.Index) -> int:
    inner = faiss.downcast_index(index.index) if isinstance(index, faiss.IndexPreTransform) else index
    lists = inner.nlist if isinstance(inner, faiss.IndexIVF) else 256
    return max(TRAIN_ROWS_PER_LIST * lists, 20_000)


def _sample(vectors_ND: np.ndarray, rows: int, seed: int) -> np.ndarray:
    chosen = np.random.default_rng(seed).choice(len(vectors_ND), size=min(rows, len(vectors_ND)), replace=False)
    return np.ascontiguousarray(vectors_ND[np.sort(chosen)], dtype=np.float32)


def _exact_top(queries_QD: np.ndarray, vectors_ND: np.ndarray, k: int) -> np.ndarray:
    """Rows (Q, k) of the largest inner products, from slices of the mapped vectors."""
    heap = faiss.ResultHeap(len(queries_QD), k, keep_max=True)
    for start in range(0, len(vectors_ND), ADD_ROWS):
        part = np.ascontiguousarray(vectors_ND[start : start + ADD_ROWS], dtype=np.float32)
        scores, rows = faiss.knn(queries_QD, part, min(k, len(part)), metric=faiss.METRIC_INNER_PRODUCT)
        heap.add_result(scores, rows + start)
    heap.finalize()
    return heap.I


def _recall(queries_QD: np.ndarray, vectors_ND: np.ndarray, found_QP: np.ndarray, truth_QK: np.ndarray) -> float:
    """Share of the true neighbours among the best K of what was found after exact re-scoring."""
    hits = 0
    for query_D, found_P, truth_K in zip(queries_QD, found_QP, truth_QK, strict=True):
        found_P = found_P[found_P >= 0]
        scores_P = vectors_ND[found_P].astype(np.float32) @ query_D
        best = found_P[np.argsort(-scores_P, kind="stable")[: len(truth_K)]]
        hits += len(np.intersect1d(best, truth_K))
    return hits / truth_QK.size


def _milliseconds(index: faiss.Index, queries_QD: np.ndarray, k: int) -> tuple[np.ndarray, float]:
    start = time.perf_counter()
    _, rows_QK = index.search(queries_QD, k)
    return rows_QK, 1000 * (time.perf_counter() - start) / len(queries_QD)
