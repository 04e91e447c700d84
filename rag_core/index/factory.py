"""Choose a FAISS index by the number of vectors, train it, and tune and measure its recall.

This module knows nothing about passages or files. Vectors go in; a FAISS index and measured points come out.

Cost of each choice at D dimensions, per vector:

- Flat: 4·D bytes, exact.
- IVF…,Flat: the same bytes; a search visits only some of the lists.
- IVF…,SQ8: D + 8 bytes.
- OPQ…,IVF…,PQ…x4fs: D/8 + 8 bytes, in blocks of 32 vectors (4 bits for each 4 dimensions, scanned in registers).
- OPQ64,IVF…,PQ64: about 72 bytes.

Results of all but Flat are re-scored with the stored vectors: the coarser the codes, the more rows (`refine_factor`).

Shapes: N passages, Q sample queries, D embedding.
"""

from __future__ import annotations

import mmap
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import faiss
import numpy as np

from rag_core.errors import ConfigError

EXACT_UP_TO = 50_000
SCALAR_UP_TO = 5_000_000
SLICE_ROWS = 16_384
TRAIN_ROWS_PER_LIST = 64
ROTATION_ROWS = 65_536
SAMPLE_QUERIES = 200
# Bisection of nprobe and efSearch ends when the two bounds are this close.
TUNING_STEP = 1.05


@dataclass(frozen=True, slots=True)
class RecallPoint:
    """Recall@10 against exact search, and time, at one value of a search parameter ("" if there is none)."""

    parameter: str
    value: int
    recall_at_10: float
    milliseconds_per_query: float


@dataclass(frozen=True, slots=True)
class MeasuredRecall:
    """The chosen setting, and every setting that was tried."""

    chosen: RecallPoint
    curve: list[RecallPoint]


def choose_factory(num_vectors: int, dim: int) -> str:
    """The FAISS factory string for a corpus of this size: exact while that is cheap, then coarser."""
    if num_vectors <= EXACT_UP_TO:
        return "Flat"
    lists = 2 ** round(np.log2(4 * np.sqrt(num_vectors)))
    # 2,048 or more lists pay off only if scanning the lists is what takes the time.
    lists = lists // 2 if num_vectors <= 1_000_000 else lists
    if num_vectors > SCALAR_UP_TO and dim % 64 == 0:
        return f"OPQ64,IVF{lists},PQ64"
    if num_vectors <= SCALAR_UP_TO and dim % 8 == 0:
        return f"OPQ{dim // 4},IVF{lists},PQ{dim // 4}x4fs"
    return f"IVF{lists},SQ8"


def refine_factor(factory: str) -> int:
    """By how much FAISS proposes more rows than requested; exact inner products then choose among them."""
    return 8 if factory.endswith("x4fs") else 4


def empty_index(factory: str, dim: int) -> faiss.Index:
    """An untrained index for a factory string; ConfigError if FAISS refuses the string for that width."""
    try:
        return faiss.index_factory(dim, factory, faiss.METRIC_INNER_PRODUCT)
    except RuntimeError as error:
        raise ConfigError(
            f"FAISS does not accept the factory string {factory!r} for {dim} dimensions. Use 'auto', or a string such "
            "as 'Flat', 'HNSW32' or 'IVF1024,SQ8' (PQ needs a number that divides the dimensions)."
        ) from error


def lists_of(index: faiss.Index) -> int:
    """The number of lists of an inverted file, each of which needs a training vector; 0 for other indexes."""
    inner = faiss.downcast_index(index.index) if isinstance(index, faiss.IndexPreTransform) else index
    return inner.nlist if isinstance(inner, faiss.IndexIVF) else 0


def make_faiss_index(vectors_ND: np.ndarray, factory: str, seed: int) -> faiss.Index:
    """Train on a sample and add all vectors, a slice at a time.

    Raises:
        ConfigError: FAISS refuses the string, or training needs more vectors than there are.
    """
    dim = vectors_ND.shape[1]
    index = empty_index(factory, dim)
    try:
        if not index.is_trained:
            _rotate(index, vectors_ND, seed)
            index.train(_sample([vectors_ND], _training_rows(index), seed))
        for _, part_nD in _slices([vectors_ND]):
            index.add(part_nD)
    except RuntimeError as error:
        raise ConfigError(
            f"FAISS could not build {factory!r} from {len(vectors_ND)} vectors of {dim} dimensions. It may need more "
            "vectors to train on: use 'auto' or fewer lists."
        ) from error
    return index


def tune_recall(
    indexes: Sequence[faiss.Index],
    vectors: Sequence[np.ndarray],
    target: float,
    seed: int,
    refine_factor: int,
    queries_QD: np.ndarray | None = None,
) -> MeasuredRecall:
    """Measure recall@10 and leave the indexes at the cheapest setting that reaches `target`.

    For an inverted-file index `nprobe` is doubled until the target is met, then bisected to within 5%; for HNSW
    `efSearch`; others are measured as they are.

    Args:
        indexes: the shards of one index, all of one type; recall is measured on the best of what all of them propose.
        vectors: the vectors (n, D) of each shard, in the order of the rows.
        queries_QD: question vectors. Without them, sampled passages serve as queries, which are easier: questions lie
            elsewhere, and their neighbours are spread over more lists.
    """
    if isinstance(indexes[0], faiss.IndexFlat):
        point = RecallPoint("", 0, 1.0, _propose(indexes, _sample(vectors, SAMPLE_QUERIES, seed), 10)[1])
        return MeasuredRecall(point, [point])
    if queries_QD is None:
        queries_QD = _sample(vectors, SAMPLE_QUERIES, seed + 1)
    truth = _exact_top(queries_QD, vectors, min(10, _count(vectors)))

    def measure(parameter: str, value: int) -> RecallPoint:
        if parameter:
            _set(indexes, parameter, value)
        rows_QP, milliseconds = _propose(indexes, queries_QD, 10 * refine_factor)
        return RecallPoint(parameter, value, _recall(queries_QD, vectors, rows_QP, truth), milliseconds)

    parameter, lowest, highest = _search_parameter(indexes[0])
    curve = [measure(parameter, lowest)]
    while curve[-1].recall_at_10 < target and curve[-1].value < highest:
        curve.append(measure(parameter, min(2 * curve[-1].value, highest)))
    chosen = curve[-1]
    below = curve[-2].value if len(curve) > 1 else chosen.value
    while chosen.recall_at_10 >= target and chosen.value - below > 1 and chosen.value > TUNING_STEP * below:
        curve.append(measure(parameter, (below + chosen.value) // 2))
        if curve[-1].recall_at_10 >= target:
            chosen = curve[-1]
        else:
            below = curve[-1].value
    if parameter:
        _set(indexes, parameter, chosen.value)
    return MeasuredRecall(chosen, sorted(curve, key=lambda point: point.value))


def _set(indexes: Sequence[faiss.Index], parameter: str, value: int) -> None:
    for index in indexes:
        faiss.ParameterSpace().set_index_parameter(index, parameter, value)


def _search_parameter(index: faiss.Index) -> tuple[str, int, int]:
    """Name, lowest and highest value of the parameter that trades time for recall; ("", 0, 0) if there is none."""
    inner = faiss.downcast_index(index.index) if isinstance(index, faiss.IndexPreTransform) else index
    if isinstance(inner, faiss.IndexIVF):
        return "nprobe", 1, inner.nlist
    if isinstance(inner, faiss.IndexHNSW):
        return "efSearch", 16, 1024
    return "", 0, 0


def _rotate(index: faiss.Index, vectors_ND: np.ndarray, seed: int) -> None:
    """Set the index's OPQ rotation, if it has one, in closed form instead of training it.

    The principal axes are dealt out so that the product of variances is about the same in every sub-vector: the
    parametric solution of "Optimized Product Quantization" (Ge et al., CVPR 2013, section 4.1). FAISS would train its
    own in 50 rounds, a minute at 384 dimensions, for the same recall here. A rotation keeps inner products; FAISS's
    "PCA" would not, because it subtracts the mean.
    """
    if not isinstance(index, faiss.IndexPreTransform):
        return
    rotation = faiss.downcast_VectorTransform(index.chain.at(0))  # type: ignore[attr-defined]
    if not isinstance(rotation, faiss.OPQMatrix) or rotation.d_in != rotation.d_out:
        return
    variances_D, axes_DD = np.linalg.eigh(_covariance(_sample([vectors_ND], ROTATION_ROWS, seed)))
    width = rotation.d_out // rotation.M
    parts: list[list[int]] = [[] for _ in range(rotation.M)]
    volumes = np.zeros(rotation.M)
    for axis in np.argsort(-variances_D):
        open_parts = (part for part in range(rotation.M) if len(parts[part]) < width)
        part = min(open_parts, key=lambda part: volumes[part])
        parts[part].append(axis)
        volumes[part] += np.log(max(variances_D[axis], 1e-12)) - np.log(1e-12)
    order = [axis for part in parts for axis in part]
    faiss.copy_array_to_vector(np.ascontiguousarray(axes_DD.T[order], dtype=np.float32).reshape(-1), rotation.A)
    rotation.is_trained = True


def _training_rows(index: faiss.Index) -> int:
    return max(TRAIN_ROWS_PER_LIST * (lists_of(index) or 256), 20_000)


def _count(vectors: Sequence[np.ndarray]) -> int:
    return sum(len(part_nD) for part_nD in vectors)


def _sample(vectors: Sequence[np.ndarray], rows: int, seed: int) -> np.ndarray:
    """Random rows (float32, copied), in their order."""
    total = _count(vectors)
    chosen = np.random.default_rng(seed).choice(total, size=min(rows, total), replace=False)
    return _rows(vectors, np.sort(chosen))


def _rows(vectors: Sequence[np.ndarray], rows_n: np.ndarray) -> np.ndarray:
    """Copies (n, D), float32, of rows in ascending order."""
    copied_nD = np.empty((len(rows_n), vectors[0].shape[1]), dtype=np.float32)
    for start, part_nD in _slices(vectors):
        first, last = np.searchsorted(rows_n, (start, start + len(part_nD)))
        copied_nD[first:last] = part_nD[rows_n[first:last] - start]
    return copied_nD


def _slices(vectors: Sequence[np.ndarray]) -> Iterator[tuple[int, np.ndarray]]:
    """Yield first row and float32 rows of each slice; release the pages of a mapped file after each."""
    first_row = 0
    for part_nD in vectors:
        for start in range(0, len(part_nD), SLICE_ROWS):
            yield first_row + start, np.ascontiguousarray(part_nD[start : start + SLICE_ROWS], dtype=np.float32)
            mapped = part_nD.base
            if isinstance(mapped, mmap.mmap) and not part_nD.flags.writeable and hasattr(mmap, "MADV_DONTNEED"):
                mapped.madvise(mmap.MADV_DONTNEED)
        first_row += len(part_nD)


def _covariance(sample_nD: np.ndarray) -> np.ndarray:
    """The covariance (D, D) in float64, without a float64 copy of the sample."""
    D = sample_nD.shape[1]
    mean_D, products_DD = sample_nD.mean(axis=0, dtype=np.float64), np.zeros((D, D))
    for _, part_nD in _slices([sample_nD]):
        centred_nD = part_nD - mean_D
        products_DD += centred_nD.T @ centred_nD
    return products_DD / len(sample_nD)


def _exact_top(queries_QD: np.ndarray, vectors: Sequence[np.ndarray], k: int) -> np.ndarray:
    """Rows (Q, k) of the largest inner products, from slices of the mapped vectors."""
    heap = faiss.ResultHeap(len(queries_QD), k, keep_max=True)
    for start, part_nD in _slices(vectors):
        scores, rows = faiss.knn(queries_QD, part_nD, min(k, len(part_nD)), metric=faiss.METRIC_INNER_PRODUCT)
        heap.add_result(scores, rows + start)
    heap.finalize()
    return heap.I


def _recall(queries_QD: np.ndarray, vectors: Sequence[np.ndarray], rows_QP: np.ndarray, truth_QK: np.ndarray) -> float:
    """Share of the true neighbours among the best K of the proposed rows after exact re-scoring."""
    needed_n = np.unique(rows_QP[rows_QP >= 0])
    needed_nD = _rows(vectors, needed_n)
    hits = 0
    for query_D, rows_P, truth_K in zip(queries_QD, rows_QP, truth_QK, strict=True):
        rows_P = rows_P[rows_P >= 0]
        scores_P = needed_nD[np.searchsorted(needed_n, rows_P)] @ query_D
        best = rows_P[np.argsort(-scores_P, kind="stable")[: len(truth_K)]]
        hits += len(np.intersect1d(best, truth_K))
    return hits / truth_QK.size


def _propose(indexes: Sequence[faiss.Index], queries_QD: np.ndarray, k: int) -> tuple[np.ndarray, float]:
    """The rows (Q, P) of the whole index that the shards propose, k each (−1: none), and milliseconds per query."""
    start, first_row = time.perf_counter(), 0
    proposed: list[np.ndarray] = []
    for index in indexes:
        _, rows_QP = index.search(queries_QD, min(k, index.ntotal))
        proposed.append(np.where(rows_QP < 0, -1, rows_QP + first_row))
        first_row += index.ntotal
    return np.concatenate(proposed, axis=1), 1000 * (time.perf_counter() - start) / len(queries_QD)
