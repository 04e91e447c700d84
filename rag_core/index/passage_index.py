"""Maximum inner product search over a frozen corpus: the index artifact, in one piece or in shards.

Owner of its layout. An index in one piece has the three files of a shard (`rag_core/index/shard.py`) in the artifact's
folder. An index in several shards has them in `shard-00000`, `shard-00001`, …, each for a contiguous range of passages.

Shapes: N passages, n passages of a shard, Q sample queries, D embedding.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Set
from dataclasses import asdict
from functools import cached_property
from pathlib import Path
from typing import Any

import faiss
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.lib.format import write_array_header_1_0
from pydantic import BaseModel, ConfigDict, Field

from rag_core.corpus.corpus import Corpus
from rag_core.corpus.passages import Passage
from rag_core.embeddings.embeddings import Embeddings
from rag_core.errors import ArtifactError, ConfigError
from rag_core.index.factory import choose_factory, make_faiss_index, refine_factor, tune_recall
from rag_core.index.passage_store import write_passage_store
from rag_core.index.retriever import Retrieved, Retriever, ShardRange, shard_name
from rag_core.index.shard import INDEX_FILE, PASSAGES_FILE, VECTORS_FILE, IndexShard, open_faiss, open_vectors
from rag_core.storage.artifact import Manifest, local_copy, open_artifact, publish
from rag_core.storage.inputs import input_paths

KIND = "index"


class IndexConfig(BaseModel):
    """Which FAISS index to build."""

    model_config = ConfigDict(extra="forbid")

    factory: str = Field(
        "auto", description="'auto', or a FAISS factory string such as 'Flat', 'HNSW32' or 'IVF1024,SQ8'"
    )
    target_recall: float = Field(0.95, gt=0, le=1, description="recall@10 against exact search that 'auto' tunes for")
    seed: int = Field(
        0, ge=0, lt=2**63, description="chooses the sample on which an approximate index is trained and measured"
    )
    shards: int = Field(
        1, ge=1, le=99_999, description="FAISS indexes that the passages are divided among, by ranges of equal size"
    )

    def for_key(self) -> dict[str, Any]:
        """The settings for the manifest and the stage's key. An index in one piece leaves `shards` out."""
        return self.model_dump(exclude={"shards"} if self.shards == 1 else None)


def index_inputs(embeddings: Embeddings, corpus: Corpus) -> dict[str, str]:
    """Fingerprints of the inputs of an index, for the stage's key."""
    return {"embeddings": embeddings.manifest.fingerprint, "corpus": corpus.manifest.fingerprint}


def build_index(
    embeddings: Embeddings, corpus: Corpus, out: Path, config: IndexConfig, queries_QD: np.ndarray | None = None
) -> Manifest:
    """Build and publish an index. With question vectors `queries_QD`, its recall is tuned on them.

    Shards are built one after the other, so that only one FAISS index is in memory; recall is tuned and measured over
    all of them.

    Raises:
        ArtifactError: the embeddings were made from another corpus.
        ConfigError: FAISS does not know the factory string, it does not fit the corpus, or there are more shards than
            passages.
    """
    if embeddings.manifest.made_from.get("corpus") != corpus.manifest.fingerprint:
        raise ArtifactError(
            f"The embeddings in {embeddings.path} were made from another corpus than {corpus.path}. "
            "Embed this corpus, or give the corpus that was embedded."
        )
    ranges = _divide(len(embeddings), config.shards)
    factory = config.factory
    if factory == "auto":  # the first shard is the largest
        factory = choose_factory(ranges[0].rows, embeddings.dim)
    with publish(out, KIND, config=config.for_key(), made_from=index_inputs(embeddings, corpus)) as draft:
        indexes = _write_shards(embeddings, corpus, draft.folder, ranges, factory, config.seed)
        measured = tune_recall(
            indexes,
            [open_vectors(draft.folder / shard.folder) for shard in ranges],
            config.target_recall,
            config.seed,
            refine_factor(factory),
            queries_QD,
        )
        if config.shards == 1:
            faiss.write_index(indexes[0], str(draft.folder / INDEX_FILE))
        draft.counts["passages"] = len(embeddings)
        prompt = embeddings.manifest.config.get("prompt")
        draft.details = {
            **{name: embeddings.manifest.details[name] for name in ("dim", "dtype", "encoder", "encoder_fingerprint")},
            **({"prompt": prompt} if prompt is not None else {}),
            "factory": factory,
            "recall_at_10": measured.chosen.recall_at_10,
            "search_parameter": measured.chosen.parameter,
            "search_value": measured.chosen.value,
            "recall_curve": [asdict(point) for point in measured.curve],
            "inputs": input_paths(embeddings=embeddings.place, corpus=corpus.place),
        }
        if config.shards > 1:
            draft.details["shards"] = [{"first_row": shard.first_row, "rows": shard.rows} for shard in ranges]
    return open_artifact(out, KIND, check_content=False)


class PassageIndex(Retriever):
    """A published index, opened for search in this process; any number of processes may share the mapped files."""

    @cached_property
    def _shards(self) -> list[IndexShard]:
        # Opened by the first search. A caller that only compares fingerprints and sizes loads nothing.
        return [IndexShard(self.path / shard.folder, shard.first_row, self.manifest.details) for shard in self.ranges]

    @classmethod
    def open(cls, path: Path, *, check_content: bool = True) -> PassageIndex:
        """Open an index; raises ArtifactError if it is missing or damaged."""
        path = local_copy(path)
        return cls(path, open_artifact(path, KIND, check_content=check_content))

    def ids_among(self, wanted: Set[str]) -> set[str]:
        """The members of `wanted` that are ids of passages in the index. Every id is read."""
        return set[str]().union(*(shard.ids_among(wanted) for shard in self._shards))

    def _search_shards(self, queries_BD: np.ndarray, k: int) -> list[Retrieved]:
        return [shard.search(queries_BD, k) for shard in self._shards]

    def _passages_of_shards(self, rows_n: Mapping[int, np.ndarray]) -> Mapping[int, list[Passage]]:
        return {number: self._shards[number].passages(rows) for number, rows in rows_n.items()}


def _divide(rows: int, shards: int) -> list[ShardRange]:
    """Contiguous ranges that differ by at most one row, longer ones first; a single one uses the index's own folder."""
    if shards == 1:
        return [ShardRange("", 0, rows)]
    if shards > rows:
        raise ConfigError(f"{shards} shards were asked for, but there are {rows} passages. Ask for 1 to {rows}.")
    size, longer = divmod(rows, shards)
    return [
        ShardRange(shard_name(number), number * size + min(number, longer), size + (number < longer))
        for number in range(shards)
    ]


def _write_shards(
    embeddings: Embeddings, corpus: Corpus, folder: Path, ranges: list[ShardRange], factory: str, seed: int
) -> list[faiss.Index]:
    """Write the files of every shard in one pass over vectors and passages.

    Returns the FAISS indexes, mapped from the written files. A single one is returned in memory and not written yet.
    """
    indexes: list[faiss.Index] = []
    vectors = _Rows(vectors_nD for _, vectors_nD in embeddings.iter_vectors())
    passages = _Rows(pq.read_table(file) for file in corpus.shards)
    for shard in ranges:
        shard_folder = folder / shard.folder
        shard_folder.mkdir(exist_ok=True)
        shape = (shard.rows, embeddings.dim)
        _write_vectors(vectors.take(shard.rows), shard_folder / VECTORS_FILE, shape, embeddings.dtype)
        write_passage_store(passages.take(shard.rows), shard_folder / PASSAGES_FILE)
        if not vectors.taken == passages.taken == shard.first_row + shard.rows:
            break
        indexes.append(make_faiss_index(open_vectors(shard_folder), factory, seed))
        if len(ranges) > 1:  # make room in memory for the next one
            faiss.write_index(indexes.pop(), str(shard_folder / INDEX_FILE))
            indexes.append(open_faiss(shard_folder, *open_vectors(shard_folder).shape))
    num_vectors, num_passages = vectors.count_all(), passages.count_all()
    if num_vectors != len(embeddings):
        raise ArtifactError(
            f"{embeddings.path} holds {num_vectors} vectors, its manifest says {len(embeddings)}. Embed again."
        )
    if num_passages != num_vectors:
        raise ArtifactError(f"{corpus.path} has {num_passages} passages, {embeddings.path} {num_vectors}. Embed again.")
    return indexes


def _write_vectors(parts: Iterable[np.ndarray], out_file: Path, shape: tuple[int, int], dtype: str) -> None:
    """Write vectors as one row-addressable file."""
    with out_file.open("wb") as file:  # not mapped: dirty pages would count as this process's memory
        write_array_header_1_0(file, {"descr": np.dtype(dtype).str, "fortran_order": False, "shape": shape})
        for vectors_nD in parts:
            file.write(np.ascontiguousarray(vectors_nD, dtype=dtype).data)
    pa.default_memory_pool().release_unused()


class _Rows:
    """A stream of arrays or tables that hands out any number of rows at a time."""

    def __init__(self, pieces: Iterable[Any]) -> None:
        self._pieces = iter(pieces)
        self._rest: Any = None
        self.taken = 0

    def take(self, rows: int) -> Iterator[Any]:
        """The next `rows` rows, piece by piece; fewer at the end of the stream."""
        while rows and (piece := self._next()) is not None:
            part, self._rest = (piece, None) if len(piece) <= rows else (_cut(piece, 0, rows), _cut(piece, rows, None))
            rows -= len(part)
            self.taken += len(part)
            yield part

    def count_all(self) -> int:
        """Consume the rest of the stream; return the number of rows of the whole stream."""
        while (piece := self._next()) is not None:
            self.taken += len(piece)
        return self.taken

    def _next(self) -> Any:
        piece, self._rest = self._rest, None
        return next(self._pieces, None) if piece is None else piece


def _cut(piece: Any, first: int, last: int | None) -> Any:
    return (
        piece[first:last]
        if isinstance(piece, np.ndarray)
        else piece.slice(first, None if last is None else last - first)
    )
