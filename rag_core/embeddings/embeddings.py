"""The embeddings artifact: one Parquet shard of vectors for each shard of the corpus, row for row.

Owner of its layout: `embeddings-00000.parquet`, … with columns `id` (string) and `embedding` (fixed-size list of
float16 or float32), in the corpus's order. This module does not decide which process embeds which shard.

Shapes: N passages, D embedding.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Literal, cast, get_args

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from pydantic import BaseModel, ConfigDict, Field

from rag_core.corpus.formats.rows import first_line
from rag_core.cpu.heap import return_freed_blocks
from rag_core.embeddings.text_encoder import WINDOW, Precision, TextEncoder, passage_text
from rag_core.errors import ArtifactError
from rag_core.storage.artifact import Manifest, finished_file, local_copy, open_artifact
from rag_core.storage.places import as_place

KIND = "embeddings"
VectorDtype = Literal["float32", "float16"]


class EmbedConfig(BaseModel):
    """How to embed passages."""

    model_config = ConfigDict(extra="forbid")

    encoder: str = Field(description="document encoder: a folder, a hub name, or package:NAME/FOLDER")
    prompt: str | None = Field(
        None, description="put before every passage, such as 'passage: '; empty: what the encoder's folder says"
    )
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
    trust_remote_code: bool = Field(False, description="run code that comes with the encoder")


def load_document_encoder(config: EmbedConfig) -> TextEncoder:
    """Load the encoder of passages; errors as in `TextEncoder.from_pretrained`."""
    return TextEncoder.from_pretrained(
        config.encoder, side="passage", prompt=config.prompt, trust_remote_code=config.trust_remote_code
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
    """Embed one shard of a corpus into one shard of embeddings; return the number of rows.

    Raises:
        ArtifactError: a vector is not finite (the encoder's weights are damaged, or float16 overflowed) or all zeros.
    """
    table = pq.read_table(corpus_shard, columns=["id", "title", "text"])
    vector = pa.list_(pa.from_numpy_dtype(config.dtype), encoder.dim)
    schema = pa.schema([("id", table.schema.field("id").type), ("embedding", vector)])
    with finished_file(out_file) as unfinished, pq.ParquetWriter(unfinished, schema, compression="zstd") as writer:
        # Embed as many rows at a time as the encoder sorts. Keeping a whole shard's vectors (also copied and encoded as
        # Parquet) and the blocks that tokenizer and encoder free in pieces took more than half of a worker's memory.
        for start in range(0, table.num_rows, WINDOW):
            part = table.slice(start, WINDOW)
            vectors_nD = _embed_rows(encoder, part, config, on_progress)
            if fault := vector_fault(vectors_nD):
                row, problem = fault
                raise ArtifactError(
                    f"{corpus_shard} row {start + row + 1} (id {part['id'][row].as_py()!r}): the encoder gave a "
                    f"vector that is {problem} as {config.dtype}. Check the encoder's weights, or store float32."
                )
            embedding = pa.FixedSizeListArray.from_arrays(pa.array(vectors_nD.reshape(-1)), encoder.dim)
            writer.write_table(pa.table([part["id"], embedding], schema=schema), row_group_size=10_000)
            del vectors_nD, embedding
            pa.default_memory_pool().release_unused()
            return_freed_blocks()
    return table.num_rows


def vector_fault(vectors_ND: np.ndarray) -> tuple[int, str] | None:
    """The first row whose vector breaks search, and why: not finite, or all zeros. None if all vectors are sound."""
    largest_N = np.abs(vectors_ND).max(axis=1)
    bad_N = ~np.isfinite(largest_N) | (largest_N == 0)
    if not bad_N.any():
        return None
    row = int(np.argmax(bad_N))
    return row, "all zeros" if largest_N[row] == 0 else "not finite"


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


class Embeddings:
    """A published embeddings artifact, opened and checked."""

    def __init__(self, path: Path, manifest: Manifest) -> None:
        self.path = path
        self.place = path  # `path`, or the place in an object store that `path` is a copy of
        self.manifest = manifest
        self.dim, self.dtype = _width_and_type(path, manifest)
        names = [name for name in manifest.files if name.endswith(".parquet")]
        # By length first: from shard 100,000 on, numbers have more than five digits.
        self.shards = [path / name for name in sorted(names, key=lambda name: (len(name), name))]

    @classmethod
    def open(cls, path: Path, *, check_content: bool = True) -> Embeddings:
        """Open an artifact; raises ArtifactError if it is missing or damaged."""
        local = local_copy(path)
        embeddings = cls(local, open_artifact(local, KIND, check_content=check_content))
        embeddings.place = as_place(path)
        return embeddings

    def __len__(self) -> int:
        return self.manifest.counts["passages"]

    def iter_vectors(self) -> Iterator[tuple[list[str], np.ndarray]]:
        """Yield ids and vectors (n, D) in their stored type, a few thousand rows at a time, in the corpus's order.

        Raises:
            ArtifactError: a shard cannot be read; its vectors have another width or type than the manifest says; or a
                vector is missing, not finite or all zeros (the message names its row and id).
        """
        for shard in self.shards:
            row = 0
            try:
                with pq.ParquetFile(shard, buffer_size=2**20) as file:
                    self._check_columns(shard, file.schema_arrow)
                    for batch in file.iter_batches(batch_size=4096, columns=["id", "embedding"]):
                        yield self._checked(shard, row, batch)
                        row += batch.num_rows
            except (pa.ArrowException, OSError, ValueError) as error:
                raise ArtifactError(
                    f"{shard} cannot be read after row {row} ({first_line(error)}); expected a Parquet file of ids and "
                    f"vectors. Run `rag verify --repair {self.place}`, or embed the corpus again."
                ) from error

    def _check_columns(self, shard: Path, schema: pa.Schema) -> None:
        expected = pa.list_(pa.from_numpy_dtype(np.dtype(self.dtype)), self.dim)
        types = {name: schema.field(name).type for name in ("id", "embedding") if name in schema.names}
        if types.get("id") != pa.string() or types.get("embedding") != expected:
            found = ", ".join(f"{name} ({kind})" for name, kind in types.items()) or "neither"
            raise ArtifactError(
                f"{shard}: found {found}; expected columns id (string) and embedding ({self.dim} dimensions of "
                f"{self.dtype}, as the manifest says). Embed the corpus again."
            )

    def _checked(self, shard: Path, row: int, batch: pa.RecordBatch) -> tuple[list[str], np.ndarray]:
        batch.validate(full=True)
        ids, column = batch.column("id"), batch.column("embedding")
        vectors_ND = column.flatten().to_numpy(zero_copy_only=False).reshape(-1, self.dim)
        if ids.null_count or column.null_count or len(vectors_ND) != batch.num_rows:
            raise ArtifactError(
                f"{shard} rows {row + 1} to {row + batch.num_rows}: an id or a vector is missing. Embed the corpus "
                "again."
            )
        fault = vector_fault(vectors_ND)
        if fault:
            raise ArtifactError(
                f"{shard} row {row + fault[0] + 1} (id {ids[fault[0]].as_py()!r}): the vector is {fault[1]}. Embed "
                "the corpus again; if that does not help, check the encoder's weights."
            )
        return ids.to_pylist(), vectors_ND


def _width_and_type(path: Path, manifest: Manifest) -> tuple[int, VectorDtype]:
    dim, dtype = manifest.details.get("dim"), manifest.details.get("dtype")
    if not isinstance(dim, int) or dim < 1 or dtype not in get_args(VectorDtype) or "passages" not in manifest.counts:
        raise ArtifactError(
            f"{path}: the manifest says {dim!r} dimensions of {dtype!r} and counts {manifest.counts}; expected a "
            f"width, one of {', '.join(get_args(VectorDtype))}, and a number of passages. Embed the corpus again."
        )
    return dim, cast(VectorDtype, dtype)
