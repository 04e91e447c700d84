"""Passages by row from a mapped file, and vectors that must be finite before anything is made from them."""

from __future__ import annotations

import itertools
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from rag_core.corpus.passages import Passage
from rag_core.embeddings.embeddings import EmbedConfig, embed_shard
from rag_core.embeddings.text_encoder import TextEncoder
from rag_core.errors import ArtifactError
from rag_core.index.passage_store import BATCH_ROWS, PassageStore, write_passage_store
from tests.support.small_corpus import make_encoder

ROWS = 2 * BATCH_ROWS + 57


def _table(start: int, end: int, text: str = "text") -> pa.Table:
    rows = range(start, end)
    columns = {"text": [f"{text} {row} — é" for row in rows], "id": [f"p{row}" for row in rows]}
    return pa.table({**columns, "title": [f"t{row}" for row in rows]})


def test_ids_are_found_in_every_record_batch(tmp_path: Path) -> None:
    write_passage_store([_table(0, 2 * BATCH_ROWS + 5)], tmp_path / "store")
    wanted = {"p0", f"p{BATCH_ROWS}", f"p{2 * BATCH_ROWS + 4}"}
    assert PassageStore(tmp_path / "store").ids_among(wanted | {"p-1", "P0"}) == wanted


@pytest.mark.parametrize("cuts", [[0, ROWS], [0, 4, 8, 5000, 5000, ROWS], [0, BATCH_ROWS, 2 * BATCH_ROWS, ROWS]])
def test_rows_keep_their_order_across_tables_and_record_batches(tmp_path: Path, cuts: list[int]) -> None:
    tables = (_table(start, end) for start, end in itertools.pairwise(cuts))
    assert write_passage_store(tables, tmp_path / "store") == ROWS
    store = PassageStore(tmp_path / "store")
    assert len(store) == ROWS
    assert [store[row].id for row in range(0, ROWS, 61)] == [f"p{row}" for row in range(0, ROWS, 61)]
    edges = [ROWS - 1, 0, BATCH_ROWS - 1, BATCH_ROWS, 2 * BATCH_ROWS - 1, 2 * BATCH_ROWS]
    assert store.take(edges) == [Passage(f"p{row}", f"t{row}", f"text {row} — é") for row in edges]


@pytest.mark.parametrize("count", [0, 1, BATCH_ROWS, 2 * BATCH_ROWS])
def test_rows_outside_raise_index_error(tmp_path: Path, count: int) -> None:
    write_passage_store([_table(0, count)], tmp_path / "store")
    store = PassageStore(tmp_path / "store")
    assert len(store) == count
    assert list(store.take(range(count)))[-1:] == ([store[count - 1]] if count else [])
    for row in (-1, count, count + BATCH_ROWS):
        with pytest.raises(IndexError, match=f"row {row} of {count}"):
            store[row]


def test_opening_and_reading_maps_the_file_instead_of_loading_it(tmp_path: Path) -> None:
    write_passage_store([_table(0, ROWS, text="x" * 2000)], tmp_path / "store")
    assert (tmp_path / "store").stat().st_size > 16_000_000
    before = pa.total_allocated_bytes()
    store = PassageStore(tmp_path / "store")
    assert store[5000].text.endswith("5000 — é")
    # A record batch of 4096 such rows is 8 MB; a copy of one would show here.
    assert pa.total_allocated_bytes() - before < 1_000_000


def _shard(folder: Path) -> Path:
    pq.write_table(_table(0, 6).select(["id", "title", "text"]), folder / "corpus-00003.parquet")
    return folder / "corpus-00003.parquet"


@pytest.mark.filterwarnings("ignore:overflow encountered in cast")
@pytest.mark.parametrize(("damage", "dtype"), [(float("nan"), "float32"), (1e30, "float16")])
def test_a_vector_that_is_not_finite_is_refused_with_file_row_and_id(tmp_path: Path, damage: float, dtype: str) -> None:
    encoder = TextEncoder.from_pretrained(make_encoder(tmp_path / "encoder"))
    plain_encode = encoder.encode

    def encode(*args, **options):
        vectors_ND = plain_encode(*args, **options)
        vectors_ND[4, 2] = damage
        return vectors_ND

    encoder.encode = encode  # type: ignore[method-assign]
    with pytest.raises(ArtifactError, match=rf"corpus-00003\.parquet row 5 \(id 'p4'\).*not finite as {dtype}"):
        embed_shard(encoder, _shard(tmp_path), tmp_path / "out.parquet", EmbedConfig(encoder="e", dtype=dtype))
    assert not (tmp_path / "out.parquet").exists()


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_a_shard_of_several_windows_has_every_row_once_in_its_order(
    tmp_path: Path, dtype: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    encoder, config = (
        TextEncoder.from_pretrained(make_encoder(tmp_path / "encoder")),
        EmbedConfig(encoder="e", dtype=dtype),
    )
    pq.write_table(_table(0, 23).select(["id", "title", "text"]), tmp_path / "corpus.parquet")
    assert embed_shard(encoder, tmp_path / "corpus.parquet", tmp_path / "whole.parquet", config) == 23
    monkeypatch.setattr("rag_core.embeddings.embeddings.WINDOW", 10)
    assert embed_shard(encoder, tmp_path / "corpus.parquet", tmp_path / "windows.parquet", config) == 23
    whole, windows = (pq.read_table(tmp_path / f"{name}.parquet") for name in ("whole", "windows"))
    assert windows.schema == whole.schema
    assert windows["id"].to_pylist() == [f"p{row}" for row in range(23)]
    vectors = [torch.tensor(table["embedding"].to_pylist()) for table in (whole, windows)]
    torch.testing.assert_close(*vectors, atol=1e-3 if dtype == "float16" else 1e-6, rtol=0)


def test_damaged_weights_are_noticed_while_embedding(tmp_path: Path) -> None:
    encoder = TextEncoder.from_pretrained(make_encoder(tmp_path / "encoder"))
    with torch.no_grad():
        encoder.model.encoder.layer[0].output.dense.bias[0] = float("nan")
    with pytest.raises(ArtifactError, match="row 1 "):
        embed_shard(encoder, _shard(tmp_path), tmp_path / "out.parquet", EmbedConfig(encoder="e"))
