"""Read every row of an artifact, and compare counts with its manifest and ids with its inputs.

The checksums have been compared before (`manifest.py`). So a fault found here was already there when the artifact was
published, or the artifact does not fit its input.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import zip_longest
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from rag_core.corpus.corpus import REJECTS, Corpus, read_shard
from rag_core.embeddings.embeddings import Embeddings
from rag_core.errors import RagError
from rag_core.evaluation.predictions import JSONL, PARQUET, read_predictions
from rag_core.evaluation.predictions import SCHEMA as PREDICTIONS_SCHEMA
from rag_core.storage.manifest import MANIFEST, Finding, Manifest

# Errors that readers (ours, Arrow, NumPy, FAISS) raise for content they cannot read.
UNREADABLE = (RagError, pa.ArrowException, OSError, ValueError, KeyError, RuntimeError, EOFError)


def content_findings(folder: Path, manifest: Manifest, corpus: Path | None) -> Iterator[Finding]:
    """Faults in the content of an artifact whose files match its manifest.

    Args:
        folder: the artifact.
        manifest: its manifest.
        corpus: the corpus it was made from, if known; ids are compared with it.
    """
    checks: dict[str, Callable[[], Iterator[Finding]]] = {
        "corpus": lambda: _corpus(folder, manifest),
        "embeddings": lambda: _embeddings(folder, manifest, corpus),
        "index": lambda: _index(folder, manifest, corpus),
        "generator": lambda: _generator(folder),
        "rag-model": lambda: _rag_model(folder),
        "predictions": lambda: _predictions(folder, manifest),
        "gguf": lambda: iter(()),  # a plain folder in the cache, whose files the manifest describes
    }
    check = checks.get(manifest.kind)
    if check is None:
        yield Finding(MANIFEST, "manifest", f"a kind among {', '.join(checks)}", f"kind {manifest.kind!r}")
        return
    try:
        yield from check()
    except UNREADABLE as error:
        yield Finding(".", "unreadable", f"readable content of kind {manifest.kind!r}", " ".join(str(error).split()))


def _compare_counts(file: str, unit: str, expected: int | None, counted: int) -> Iterator[Finding]:
    if expected != counted:
        yield Finding(file, "unreadable", f"{expected} {unit} (according to the manifest)", f"{counted} {unit}")


def _corpus(folder: Path, manifest: Manifest) -> Iterator[Finding]:
    rows = 0
    for shard in Corpus(folder, manifest).shards:
        try:
            rows += read_shard(shard).num_rows
        except RagError as error:
            yield Finding(shard.name, "unreadable", "a Parquet file with columns id, title, text", str(error))
            return
    yield from _compare_counts(".", "passages", manifest.counts.get("passages"), rows)
    with (folder / REJECTS).open("rb") as file:
        yield from _compare_counts(REJECTS, "rejects", manifest.counts.get("rejects"), sum(1 for _ in file))


def _embeddings(folder: Path, manifest: Manifest, corpus: Path | None) -> Iterator[Finding]:
    embeddings, rows = Embeddings(folder, manifest), 0
    for shard in embeddings.shards:
        with pq.ParquetFile(shard) as file:
            expected_type = pa.list_(pa.from_numpy_dtype(np.dtype(embeddings.dtype)), embeddings.dim)
            column_type = file.schema_arrow.field("embedding").type
            if column_type != expected_type:
                yield Finding(shard.name, "unreadable", f"embedding: {expected_type}", f"embedding: {column_type}")
                return
            rows += file.metadata.num_rows
    yield from _compare_counts(".", "passages", manifest.counts.get("passages"), rows)
    row = 0
    for ids, vectors_nD in embeddings.iter_vectors():
        bad_n = np.flatnonzero(~np.isfinite(vectors_nD).all(axis=1))
        if len(bad_n):
            yield Finding(
                ".", "unreadable", "finite numbers", f"row {row + bad_n[0] + 1} (id {ids[bad_n[0]]!r}) is not finite"
            )
            return
        row += len(ids)
    if corpus is not None:
        yield from _compare_ids((id for ids, _ in embeddings.iter_vectors() for id in ids), corpus)


def _index(folder: Path, manifest: Manifest, corpus: Path | None) -> Iterator[Finding]:
    import faiss

    from rag_core.index.passage_index import PassageIndex
    from rag_core.index.passage_store import PassageStore
    from rag_core.index.retriever import shard_ranges

    total = 0
    for shard_range in shard_ranges(manifest):
        shard = folder / shard_range.folder
        name = (Path(shard_range.folder) / "index.faiss").as_posix()
        indexed = faiss.read_index(str(folder / name), faiss.IO_FLAG_MMAP)
        vectors_nD = np.load(shard / "vectors.npy", mmap_mode="r", allow_pickle=False)
        passages = len(PassageStore(shard / "passages.arrow"))
        if not indexed.ntotal == len(vectors_nD) == passages:
            yield Finding(
                name,
                "unreadable",
                "as many rows as vectors and passages",
                f"{indexed.ntotal} rows, {len(vectors_nD)} vectors, {passages} passages",
            )
        if not indexed.d == vectors_nD.shape[1] == manifest.details["dim"]:
            yield Finding(
                name,
                "unreadable",
                f"{manifest.details['dim']} dimensions (according to the manifest)",
                f"{indexed.d} dimensions, vectors of {vectors_nD.shape[1]}",
            )
        if shard_range.folder and passages != shard_range.rows:
            yield from _compare_counts(shard_range.folder, "passages", shard_range.rows, passages)
        total += passages
    if total != manifest.counts.get("passages"):
        yield from _compare_counts(".", "passages", manifest.counts.get("passages"), total)
        return
    index = PassageIndex(folder, manifest)
    if corpus is not None:
        starts = range(0, len(index), 4096)
        ids = (
            passage.id
            for start in starts
            for passage in index.passages_of(np.arange(start, min(start + 4096, len(index)))[None])[0]
        )
        yield from _compare_ids(ids, corpus)


def _compare_ids(ids: Iterator[str], corpus: Path) -> Iterator[Finding]:
    corpus_ids = (passage.id for passage in Corpus.open(corpus, check_content=False).iter_passages())
    for row, (id, expected) in enumerate(zip_longest(ids, corpus_ids), 1):
        if id != expected:
            yield Finding(".", "unreadable", f"row {row} has id {expected!r}, as in {corpus}", f"id {id!r}")
            return


def _generator(folder: Path) -> Iterator[Finding]:
    from rag_core.model.reader import load_generator

    load_generator(folder)
    yield from ()


def _rag_model(folder: Path) -> Iterator[Finding]:
    from rag_core.model.rag_model import RagModel

    RagModel.from_pretrained(folder)
    yield from ()


def _predictions(folder: Path, manifest: Manifest) -> Iterator[Finding]:
    table = pq.read_table(folder / PARQUET)
    if not table.schema.equals(PREDICTIONS_SCHEMA):
        yield Finding(PARQUET, "unreadable", f"columns {PREDICTIONS_SCHEMA.names}", f"columns {table.schema.names}")
        return
    yield from _compare_counts(PARQUET, "questions", manifest.counts.get("questions"), table.num_rows)
    rows = (row for batch in table.to_batches(max_chunksize=1024) for row in batch.to_pylist())
    for number, (line, row) in enumerate(zip_longest(read_predictions(folder), rows), 1):
        if line != row:
            yield Finding(JSONL, "unreadable", f"line {number} equal to row {number} of {PARQUET}", "they differ")
            return
