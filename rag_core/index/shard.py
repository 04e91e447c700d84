"""One shard of an index: a FAISS index, the stored vectors and the passages of a contiguous range of rows.

Owner of the three files in its folder: `index.faiss` (may be compressed), `vectors.npy` (every passage's vector at
stored precision, memory-mapped) and `passages.arrow` (memory-mapped text). FAISS proposes rows. The scores that this
module returns are always inner products with the stored vectors, never FAISS's own, because gradients flow through
them.

An index in one piece is a single shard. This module does not need PyTorch: a process that only searches starts
without it.

Shapes: n passages of the shard, B questions, K passages per question, P proposed rows, D embedding.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence, Set
from pathlib import Path
from typing import Any

import faiss
import numpy as np

from rag_core.corpus.passages import Passage
from rag_core.errors import ArtifactError
from rag_core.index.factory import refine_factor
from rag_core.index.files import open_faiss as mapped_faiss
from rag_core.index.files import open_vectors as mapped_vectors
from rag_core.index.files import propose, set_search_parameter
from rag_core.index.passage_store import PassageStore
from rag_core.index.retriever import Retrieved, best_first

INDEX_FILE, VECTORS_FILE, PASSAGES_FILE = "index.faiss", "vectors.npy", "passages.arrow"
# Rows that an exact index proposes beyond K, so that it seldom has to search twice.
SPARE_ROWS = 8


class IndexShard:
    """A shard's folder, opened for searching; any number of processes may share the mapped files.

    Args:
        folder: holds the three files.
        first_row: the row of the whole index at which this shard starts.
        details: those of the index's manifest: `factory`, `search_parameter`, `search_value`.
    """

    def __init__(self, folder: Path, first_row: int, details: Mapping[str, Any]) -> None:
        self._first_row = first_row
        self._passages = PassageStore(folder / PASSAGES_FILE)
        self._vectors_nD = open_vectors(folder)
        if len(self._passages) != len(self._vectors_nD):
            raise ArtifactError(
                f"{folder} has {len(self._passages)} passages and {len(self._vectors_nD)} vectors. Build the index "
                "again."
            )
        self._file = folder / INDEX_FILE
        self._faiss = open_faiss(folder, *self._vectors_nD.shape)
        self._exact = isinstance(self._faiss, faiss.IndexFlat)
        self._refine_factor = 1 if self._exact else refine_factor(details["factory"])
        self._rounding: float | None = None
        if details["search_parameter"]:
            set_search_parameter(folder, self._faiss, details["search_parameter"], details["search_value"])

    def __len__(self) -> int:
        return len(self._vectors_nD)

    def search(self, queries_BD: np.ndarray, k: int) -> Retrieved:
        """The k passages (all, if the shard has fewer) with the largest inner products, best first, equal ones by row.

        Args:
            queries_BD: float32, contiguous.
        """
        k = min(k, len(self))
        if self._exact:
            rows_BK, scores_BK = self._search_exactly(queries_BD, k, k + max(k, SPARE_ROWS))
        else:
            _, rows_BP = propose(self._file, self._faiss, queries_BD, min(len(self), k * self._refine_factor))
            rows_BK, scores_BK = _best(rows_BP, self._inner_products(queries_BD, rows_BP), k)
        vectors_BKD = self._vectors_nD[rows_BK].astype(np.float32, copy=False)
        return Retrieved(np.where(rows_BK < 0, -1, rows_BK + self._first_row), vectors_BKD, scores_BK)

    def ids_among(self, wanted: Set[str]) -> set[str]:
        """The members of `wanted` that are ids of passages in the shard."""
        return self._passages.ids_among(wanted)

    def passages(self, rows: Sequence[int] | np.ndarray) -> list[Passage]:
        """The passages at rows of the whole index."""
        return self._passages.take([int(row) - self._first_row for row in rows])

    def _search_exactly(self, queries_BD: np.ndarray, k: int, proposed: int) -> tuple[np.ndarray, np.ndarray]:
        """Rows and scores (B, k) of a Flat index, independent of FAISS's rounding and its order of equal scores.

        A row that FAISS did not propose scores at most as high as the last proposed row, up to the rounding of both
        computations. If that does not rule out a better row, more rows are proposed.
        """
        proposed = min(proposed, len(self))
        faiss_scores_BP, rows_BP = propose(self._file, self._faiss, queries_BD, proposed)
        rows_BK, scores_BK = _best(rows_BP, self._inner_products(queries_BD, rows_BP), k)
        if proposed < len(self):
            limit_B = faiss_scores_BP[:, -1] + self._rounding_of_unit_queries() * np.linalg.norm(queries_BD, axis=1)
            unsure_b = np.flatnonzero(~(scores_BK[:, -1] > limit_B))  # NaN counts as unsure
            if len(unsure_b):
                again = self._search_exactly(queries_BD[unsure_b], k, 8 * proposed)
                rows_BK[unsure_b], scores_BK[unsure_b] = again
        return rows_BK, scores_BK

    def _rounding_of_unit_queries(self) -> float:
        """The most by which two float32 inner products of a unit query and a vector of this shard can differ.

        For any order in which D products are added, the error is at most γ_D |q| |v| with γ_D = Du / (1 − Du) (Higham,
        Accuracy and Stability of Numerical Algorithms, section 3.1); 1% more covers the rounding of norms and sums.
        """
        if self._rounding is None:
            squares_n = np.empty(len(self), dtype=np.float32)
            dim = self._faiss.d
            faiss.fvec_norms_L2sqr(faiss.swig_ptr(squares_n), self._faiss.get_xb(), dim, len(self))  # type: ignore[attr-defined]
            units = dim * 2.0**-24
            self._rounding = 1.01 * 2 * units / (1 - units) * float(np.sqrt(squares_n.max(), dtype=np.float64))
        return self._rounding

    def _inner_products(self, queries_BD: np.ndarray, rows_BP: np.ndarray) -> np.ndarray:
        """Inner products (B, P) with stored vectors, −inf where the row is −1 (FAISS found fewer).

        The kernel computes every pair by itself, so a score depends neither on the other pairs nor on the shard.
        """
        scores_BP = np.full(rows_BP.shape, -np.inf, dtype=np.float32)
        vectors_nD, places_BP = self._vectors_nD, np.ascontiguousarray(rows_BP, dtype=np.int64)
        if vectors_nD.dtype != np.float32:  # FAISS reads float32 in place, with all cores; other types are copied.
            needed, places = np.unique(np.maximum(rows_BP, 0), return_inverse=True)
            vectors_nD = np.ascontiguousarray(vectors_nD[needed], dtype=np.float32)
            places_BP = np.where(rows_BP < 0, -1, places.reshape(rows_BP.shape)).astype(np.int64)
        sizes = queries_BD.shape[1], *rows_BP.shape
        pointers = (faiss.swig_ptr(array) for array in (scores_BP, queries_BD, vectors_nD, places_BP))
        faiss.fvec_inner_products_by_idx(*pointers, *sizes)  # type: ignore[attr-defined]
        scores_BP[rows_BP < 0] = -np.inf
        return scores_BP


def open_vectors(folder: Path) -> np.ndarray:
    """A shard's stored vectors (n, D), memory-mapped; ArtifactError if the file holds none."""
    return mapped_vectors(folder / VECTORS_FILE)


def open_faiss(folder: Path, rows: int, dim: int) -> faiss.Index:
    """A shard's FAISS index, mapped where FAISS can. ArtifactError unless it has this number of rows and dimensions."""
    return mapped_faiss(folder / INDEX_FILE, rows, dim)


def _best(rows_BP: np.ndarray, scores_BP: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    best_BK = best_first(rows_BP, scores_BP, k)
    return np.take_along_axis(rows_BP, best_BK, axis=1), np.take_along_axis(scores_BP, best_BK, axis=1)
