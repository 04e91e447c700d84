"""The embeddings artefact: one Parquet shard of vectors for each shard of the corpus, row for row.

Owner of its layout: `embeddings-00000.parquet`, … with columns `id` (string) and `embedding` (fixed-size list of
float16 or float32), in the corpus's order. Which process embeds which shard is somebody else's business.

Shapes: N passages, D embedding.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Literal

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from pydantic import BaseModel, ConfigDict, Field

from rag_core.artefact import Manifest, finished_file, local_copy, open_artefact
from rag_core.errors import ArtefactError
from rag_core.heap import return_freed_blocks
from rag_core.places import as_place
from rag_core.text_encoder import WINDOW, Precision, TextEncoder, passage_text

KIND = "embeddings"
VectorDtype = Literal["float32", "float16"]


class EmbedConfig(BaseModel):
    """How passages are embedded."""

    model_config = ConfigDict(extra="forbid")

    encoder: str = Field(description="document encoder: a folder, a hub name, or package:NAME/FOLDER")
    dtype: VectorDtype = Field("float32", description="type of the stored vectors; float16 halves the disk")
    precision: Precision = Field(
        "auto", description="arithmetic of the encoder; auto: bfloat16 where the processor has it"
    )
    batch_tokens: int | None = Field(
        None,
        ge=64,
        description="tokens in a batch, padding included; null: 512 on a processor, 16,384 on an accelerator",
    )
    num_workers: int = Field(
        0, ge=0, description="embedding actors; 0: one for each accelerator, else one for the machine's cores"
    )


def shard_name(number: int) -> str:
    """File name of the embeddings of the corpus's shard `number`."""
    return f"embeddings-{number:05d}.parquet"


def embed_shard(
    encoder: TextEncoder,
    corpus_shard: Path,
    out_file: Path,
    config: EmbedConfig,
    on_progress: Callable[[int], None] | None = None,
) -> int:
    """Embed one shard of a corpus into one shard of embeddings; returns the number of rows.

    Raises:
        ArtefactError: a vector is not finite (the encoder's weights are damaged, or float16 overflowed).
    """
    table = pq.read_table(corpus_shard, columns=["id", "title", "text"])
    vector = pa.list_(pa.from_numpy_dtype(config.dtype), encoder.dim)
    schema = pa.schema([("id", table.schema.field("id").type), ("embedding", vector)])
    with finished_file(out_file) as unfinished, pq.ParquetWriter(unfinished, schema, compression="zstd") as writer:
        # As many rows at a time as the encoder sorts. A whole shard's vectors, copied and encoded as Parquet, and blocks
        # that tokenizer and encoder free in pieces were more than half of what a worker took.
        for start in range(0, table.num_rows, WINDOW):
            part = table.slice(start, WINDOW)
            vectors_nD = _embed_rows(encoder, part, config, on_progress)
            _check_finite(vectors_nD, part["id"], f"{corpus_shard} row", start, config.dtype)
            embedding = pa.FixedSizeListArray.from_arrays(pa.array(vectors_nD.reshape(-1)), encoder.dim)
            writer.write_table(pa.table([part["id"], embedding], schema=schema), row_group_size=10_000)
            del vectors_nD, embedding
            pa.default_memory_pool().release_unused()
            return_freed_blocks()
    return table.num_rows


def _embed_rows(
    encoder: TextEncoder, part: pa.Table, config: EmbedConfig, on_progress: Callable[[int], None] | None
) -> np.ndarray:
    texts = zip(part["title"].to_pylist(), part["text"].to_pylist(), strict=True)
    vectors_nD = encoder.encode(
        [passage_text(title, text, encoder.settings) for title, text in texts],
        batch_tokens=config.batch_tokens,
        precision=config.precision,
        on_progress=on_progress,
    )
    return vectors_nD.astype(config.dtype, copy=False)


def _check_finite(vectors_nD: np.ndarray, ids: pa.ChunkedArray, place: str, start: int, dtype: VectorDtype) -> None:
    finite_n = np.isfinite(vectors_nD).all(axis=1)
    if not finite_n.all():
        row = int(np.argmin(finite_n))
        raise ArtefactError(
            f"{place} {start + row + 1} (id {ids[row].as_py()!r}): the encoder gave a vector that is not finite as "
            f"{dtype}. Check the encoder's weights, or store float32."
        )


class Embeddings:
    """A published embeddings artefact, opened and checked."""

    def __init__(self, path: Path, manifest: Manifest) -> None:
        self.path = path
        self.place = path  # what it was opened as: `path`, or where in an object store that is a copy of
        self.manifest = manifest
        self.dim: int = manifest.details["dim"]
        self.dtype: VectorDtype = manifest.details["dtype"]
        self.shards = [path / name for name in sorted(manifest.files) if name.endswith(".parquet")]

    @classmethod
    def open(cls, path: Path, *, check_content: bool = True) -> Embeddings:
        """Open an artefact; raises ArtefactError if it is missing or damaged."""
        local = local_copy(path)
        embeddings = cls(local, open_artefact(local, KIND, check_content=check_content))
        embeddings.place = as_place(path)
        return embeddings

    def __len__(self) -> int:
        return self.manifest.counts["passages"]

    def iter_vectors(self) -> Iterator[tuple[list[str], np.ndarray]]:
        """Ids and vectors (n, D) in their stored type, a few thousand rows at a time, in the corpus's order.

        Raises:
            ArtefactError: a shard's vectors have another width than the manifest says.
        """
        for shard in self.shards:
            for batch in pq.ParquetFile(shard, buffer_size=2**20).iter_batches(batch_size=4096):
                column = batch.column("embedding")
                if column.type.list_size != self.dim:
                    raise ArtefactError(
                        f"{shard}: vectors have {column.type.list_size} dimensions, the manifest says {self.dim}. "
                        "Embed the corpus again."
                    )
                yield batch.column("id").to_pylist(), column.flatten().to_numpy().reshape(-1, self.dim)
