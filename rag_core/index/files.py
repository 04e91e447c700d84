"""Open an index's vectors and FAISS file so that bad content, even malicious, ends in an error that names the file.

A manifest's checksums detect accidents, but not a file that was made to do harm. NumPy checks what it maps. FAISS is
limited by the file's size: no count in the file can make it allocate more memory or loop longer. The rows that it
proposes are checked against the number of rows before anything is read at them.
"""

from __future__ import annotations

import tokenize
from pathlib import Path
from typing import Any

import faiss
import numpy as np

from rag_core.corpus.formats.rows import first_line
from rag_core.errors import ArtifactError

# What FAISS may need beyond the file's size: tables that it makes, small lists that it pads.
SPARE_BYTES = 2**20
_NUMPY_RAISES = (OSError, ValueError, EOFError, OverflowError, MemoryError, SyntaxError, TypeError, KeyError)


def open_vectors(file: Path) -> np.ndarray:
    """Stored vectors (N, D), float32 or float16, memory-mapped.

    Raises:
        ArtifactError: the file holds no such array, or a truncated one.
    """
    try:
        vectors_ND: np.ndarray = np.load(file, mmap_mode="r", allow_pickle=False)
    except (*_NUMPY_RAISES, tokenize.TokenError) as error:  # TokenError: a header that is not a Python literal
        raise _damaged(file, first_line(error)) from error
    if (
        not isinstance(vectors_ND, np.ndarray)
        or vectors_ND.ndim != 2
        or vectors_ND.dtype not in (np.float32, np.float16)
    ):
        found = f"{vectors_ND.dtype} {vectors_ND.shape}" if isinstance(vectors_ND, np.ndarray) else "an archive"
        raise _damaged(file, f"found {found}, expected float32 or float16 in two dimensions")
    if not vectors_ND.flags.c_contiguous or not vectors_ND.size:
        raise _damaged(file, f"found shape {vectors_ND.shape}, empty or not stored row by row")
    return vectors_ND


def open_faiss(file: Path, rows: int, dim: int) -> Any:
    """A FAISS index of `rows` vectors of `dim` numbers by inner product; what FAISS can map is mapped.

    Raises:
        ArtifactError: FAISS cannot read the file, or it holds another index.
    """
    try:
        size = file.stat().st_size
        faiss.set_deserialization_vector_byte_limit(size + SPARE_BYTES)
        faiss.set_deserialization_loop_limit(size + SPARE_BYTES)
        index = faiss.read_index(str(file), faiss.IO_FLAG_MMAP)
    except (RuntimeError, OSError, MemoryError) as error:
        raise _damaged(file, first_line(error)[-300:]) from error
    expected = (rows, dim, faiss.METRIC_INNER_PRODUCT, True)
    found = (index.ntotal, index.d, index.metric_type, index.is_trained)
    if found != expected:
        raise _damaged(file, f"found (rows, dimensions, metric, trained) = {found}, expected {expected}")
    return index


def set_search_parameter(folder: Path, index: Any, parameter: Any, value: Any) -> None:
    """Set the parameter that an index was tuned to; ArtifactError if the index has no such parameter."""
    try:
        faiss.ParameterSpace().set_index_parameter(index, parameter, value)
    except (RuntimeError, TypeError) as error:
        raise ArtifactError(
            f"{folder}: the manifest's search parameter {parameter!r} = {value!r} does not go with the index. Build "
            "the index again."
        ) from error


def propose(file: Path, index: Any, queries_BD: np.ndarray, count: int) -> tuple[np.ndarray, np.ndarray]:
    """Scores and rows (B, count) that a FAISS index, opened from `file`, proposes; −1 means no row.

    Raises:
        ArtifactError: FAISS fails to search the index, or proposes a row that does not exist.
    """
    try:
        scores_BP, rows_BP = index.search(queries_BD, count)
    except (RuntimeError, MemoryError) as error:
        raise _damaged(file, first_line(error)[-300:]) from error
    if rows_BP.size and not (rows_BP.min() >= -1 and rows_BP.max() < index.ntotal):
        raise _damaged(file, f"it proposes rows from {rows_BP.min()} to {rows_BP.max()}, but has {index.ntotal} rows")
    return scores_BP, rows_BP


def _damaged(file: Path, reason: str) -> ArtifactError:
    return ArtifactError(f"{file} cannot be used: {reason}. Build the index again, or copy it again.")
