"""An index in shards gives the answers of the index in one piece, to the last bit and the last of equal scores."""

from __future__ import annotations

import tempfile
from pathlib import Path

import faiss
import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rag_core.corpus.corpus import Corpus
from rag_core.embeddings.embeddings import Embeddings
from rag_core.errors import ArtifactError, ConfigError
from rag_core.index.passage_index import IndexConfig, PassageIndex, build_index, index_inputs
from rag_core.index.passage_store import write_passage_store
from rag_core.index.retriever import Retrieved
from rag_core.storage.artifact import Manifest, open_artifact, stage_key
from rag_core.verification.repair import repair
from rag_core.verification.verification import verify
from tests.index.test_passage_index import QUERIES_BD, D, N, _brute_force, _corpus, _embeddings, _vectors

SHARDS = (1, 2, 3, 7)


def _flat_index(folder: Path, vectors_ND: np.ndarray, shards: int) -> PassageIndex:
    """The files of a Flat index, without a corpus."""
    ends = [len(vectors_ND) * (at + 1) // shards for at in range(shards)]
    ranges = []
    for number, (first, end) in enumerate(zip([0, *ends], ends, strict=False)):
        shard = folder if shards == 1 else folder / f"shard-{number:05d}"
        shard.mkdir(parents=True)
        np.save(shard / "vectors.npy", vectors_ND[first:end])
        flat = faiss.IndexFlatIP(vectors_ND.shape[1])
        flat.add(vectors_ND[first:end].astype(np.float32))
        faiss.write_index(flat, str(shard / "index.faiss"))
        names = pa.array([f"p{row}" for row in range(first, end)])
        write_passage_store([pa.table({"id": names, "title": names, "text": names})], shard / "passages.arrow")
        ranges.append({"first_row": first, "rows": end - first})
    details = {"dim": vectors_ND.shape[1], "encoder_fingerprint": "f", "factory": "Flat", "search_parameter": ""}
    details |= {"shards": ranges} if shards > 1 else {}
    manifest = Manifest(
        kind="index",
        created_at="",
        key="",
        fingerprint="",
        counts={"passages": len(vectors_ND)},
        details=details,
        files={},
    )
    return PassageIndex(folder, manifest)


def assert_same(ours: Retrieved, theirs: Retrieved) -> None:
    """Rows, scores and vectors are equal to the last bit."""
    for name in Retrieved.__slots__:
        our_array, their_array = getattr(ours, name), getattr(theirs, name)
        assert our_array.dtype == their_array.dtype
        np.testing.assert_array_equal(our_array, their_array)
        assert our_array.tobytes() == their_array.tobytes()


@st.composite
def _corpora(draw: st.DrawFn) -> tuple[np.ndarray, np.ndarray, int]:
    """Vectors with many equal and nearly equal ones, questions (also more than FAISS takes one by one), and K."""
    n, dim = draw(st.integers(1, 90)), draw(st.sampled_from([1, 2, 7, 33]))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    kind = draw(st.sampled_from(["whole numbers", "near", "far"]))
    if kind == "whole numbers":
        vectors_ND = rng.integers(-1, 2, size=(n, dim)).astype(np.float32)
        queries_BD = rng.integers(-2, 3, size=(draw(st.sampled_from([1, 3, 25])), dim)).astype(np.float32)
    else:
        centres = rng.normal(size=(draw(st.integers(1, 4)), dim))
        noise = {"near": 1e-7, "far": 1.0}[kind] * rng.normal(size=(n, dim))
        vectors_ND = (centres[rng.integers(0, len(centres), n)] + noise).astype(np.float32)
        queries_BD = rng.normal(size=(draw(st.sampled_from([1, 3, 25])), dim)).astype(np.float32)
    if draw(st.booleans()):
        vectors_ND = vectors_ND.astype(np.float16)
    return vectors_ND, queries_BD, draw(st.integers(1, n))


@settings(max_examples=30)
@given(_corpora())
def test_any_number_of_shards_gives_the_bits_of_the_index_in_one_piece(
    case: tuple[np.ndarray, np.ndarray, int],
) -> None:
    vectors_ND, queries_BD, k = case
    with tempfile.TemporaryDirectory() as folder:
        counts = [shards for shards in SHARDS if shards <= len(vectors_ND)]
        opened = [_flat_index(Path(folder) / str(shards), vectors_ND, shards) for shards in counts]
        results = [index.search(queries_BD, k) for index in opened]
        for result in results[1:]:
            assert_same(result, results[0])
        passages = opened[-1].passages_of(results[-1].rows_BK)
        assert [[p.id for p in row] for row in passages] == [[f"p{row}" for row in rows] for rows in results[0].rows_BK]
    scores_BN = queries_BD.astype(np.float64) @ vectors_ND.astype(np.float64).T
    if np.array_equal(vectors_ND, np.rint(vectors_ND)):  # sums of whole numbers are exact: the order is known
        np.testing.assert_array_equal(results[0].rows_BK, np.argsort(-scores_BN, axis=1, kind="stable")[:, :k])
    best_BK = -np.sort(-scores_BN, axis=1)[:, :k]
    np.testing.assert_allclose(results[0].scores_BK, best_BK, rtol=1e-5, atol=1e-5)


def test_of_equal_passages_those_in_the_lower_rows_are_found(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    vectors_ND = np.repeat(rng.normal(size=(1, 16)), 5000, axis=0).astype(np.float32)
    vectors_ND[[7, 4000]] *= 2
    queries_BD = np.concatenate([vectors_ND[:1]] * 24)
    for shards in (1, 3):
        rows_BK = _flat_index(tmp_path / str(shards), vectors_ND, shards).search(queries_BD, 6).rows_BK
        assert rows_BK.tolist() == [[7, 4000, 0, 1, 2, 3]] * 24


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Corpus:
    return _corpus(tmp_path_factory.mktemp("sharded"))


@pytest.fixture(scope="module")
def embeddings(corpus: Corpus) -> Embeddings:
    return _embeddings(corpus.path.parent / "embeddings", corpus, _vectors())


@pytest.mark.parametrize("shards", [2, 3, 7])
def test_shards_are_contiguous_ranges_of_the_corpus_and_answer_like_one_piece(
    corpus: Corpus, embeddings: Embeddings, tmp_path: Path, shards: int
) -> None:
    build_index(embeddings, corpus, tmp_path / "whole", IndexConfig())
    manifest = build_index(embeddings, corpus, tmp_path / "index", IndexConfig(shards=shards))
    ranges = manifest.details["shards"]
    assert [shard["first_row"] for shard in ranges] == [
        sum(shard["rows"] for shard in ranges[:at]) for at in range(shards)
    ]
    assert sum(shard["rows"] for shard in ranges) == N == manifest.counts["passages"]
    assert max(shard["rows"] for shard in ranges) - min(shard["rows"] for shard in ranges) <= 1
    names = {
        f"shard-{at:05d}/{name}" for at in range(shards) for name in ("index.faiss", "vectors.npy", "passages.arrow")
    }
    assert set(manifest.files) == names
    stored = [np.load(tmp_path / "index" / f"shard-{at:05d}" / "vectors.npy") for at in range(shards)]
    np.testing.assert_array_equal(np.concatenate(stored), _vectors())
    whole, index = PassageIndex.open(tmp_path / "whole"), PassageIndex.open(tmp_path / "index")
    for k in (1, 10, N // shards, N // shards + 2, N):  # up to more than a shard has
        assert_same(index.search(QUERIES_BD, k), whole.search(QUERIES_BD, k))
    every_row = np.arange(N)[None]
    assert index.passages_of(every_row) == whole.passages_of(every_row)


@pytest.mark.parametrize("factory", ["IVF16,SQ8", "OPQ8,IVF16,PQ8x4fs", "HNSW16"])
def test_recall_of_approximate_shards_is_tuned_and_reported_for_the_whole(
    corpus: Corpus, embeddings: Embeddings, tmp_path: Path, factory: str
) -> None:
    config = IndexConfig(factory=factory, target_recall=0.9, shards=3)
    manifest = build_index(embeddings, corpus, tmp_path / "index", config, QUERIES_BD)
    found = PassageIndex.open(tmp_path / "index").search(QUERIES_BD, 10)
    truth_BK, _ = _brute_force(_vectors(), 10)
    recall = np.mean([len({*a} & {*b}) / 10 for a, b in zip(found.rows_BK, truth_BK, strict=True)])
    assert recall == pytest.approx(manifest.details["recall_at_10"])
    assert recall >= 0.9
    expected_BK = (QUERIES_BD[:, None].astype(np.float64) * _vectors()[found.rows_BK]).sum(-1)
    np.testing.assert_allclose(found.scores_BK, expected_BK, rtol=1e-5)
    np.testing.assert_array_equal(found.vectors_BKD, _vectors()[found.rows_BK])


def test_an_index_in_one_piece_keeps_its_former_key_and_layout(
    corpus: Corpus, embeddings: Embeddings, tmp_path: Path
) -> None:
    manifest = build_index(embeddings, corpus, tmp_path / "index", IndexConfig())
    config = {"factory": "auto", "target_recall": 0.95, "seed": 0}
    assert manifest.key == stage_key("index", config, index_inputs(embeddings, corpus))
    assert set(manifest.files) == {"index.faiss", "vectors.npy", "passages.arrow"}
    assert "shards" not in manifest.details
    assert stage_key("index", IndexConfig(shards=2).for_key(), index_inputs(embeddings, corpus)) != manifest.key


def test_more_shards_than_passages_are_refused(corpus: Corpus, embeddings: Embeddings, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=rf"{N + 1} shards were asked for, but there are {N} passages"):
        build_index(embeddings, corpus, tmp_path / "index", IndexConfig(shards=N + 1))
    assert not (tmp_path / "index").exists()


def test_a_shard_whose_file_was_changed_is_refused_with_its_name(
    corpus: Corpus, embeddings: Embeddings, tmp_path: Path
) -> None:
    build_index(embeddings, corpus, tmp_path / "index", IndexConfig(shards=3))
    file = tmp_path / "index" / "shard-00001" / "vectors.npy"
    whole = bytearray(file.read_bytes())
    whole[len(whole) // 2] ^= 1
    file.write_bytes(whole)
    with pytest.raises(ArtifactError, match=r"shard-00001/vectors\.npy was changed since it was published"):
        PassageIndex.open(tmp_path / "index")
    file.write_bytes(whole[:-D])
    with pytest.raises(ArtifactError, match=r"shard-00001/vectors\.npy has \d+ bytes"):
        PassageIndex.open(tmp_path / "index", check_content=False)
    file.unlink()
    with pytest.raises(ArtifactError, match=r"shard-00001/vectors\.npy is missing"):
        open_artifact(tmp_path / "index", "index", check_content=False)


def test_damaged_files_of_shards_are_found_and_made_again_byte_for_byte(
    corpus: Corpus, embeddings: Embeddings, tmp_path: Path
) -> None:
    path = tmp_path / "index"
    build_index(embeddings, corpus, path, IndexConfig(factory="IVF16,SQ8", shards=3))
    assert verify(path).findings == []
    damaged = ["shard-00000/index.faiss", "shard-00002/passages.arrow"]
    whole = {name: (path / name).read_bytes() for name in damaged}
    for name in damaged:
        (path / name).write_bytes(whole[name][:-9])
    assert [finding.file for finding in verify(path).findings] == damaged
    assert repair(path) == damaged
    assert {name: (path / name).read_bytes() for name in damaged} == whole


def test_shards_that_hold_other_ranges_than_the_manifest_says_are_found(
    corpus: Corpus, embeddings: Embeddings, tmp_path: Path
) -> None:
    path = tmp_path / "index"
    build_index(embeddings, corpus, path, IndexConfig(shards=2))
    manifest = path / "manifest.json"
    manifest.write_text(manifest.read_text().replace('"rows": 1500', '"rows": 1501'))
    (first, second) = verify(path).findings
    assert (first.file, first.found) == ("shard-00000", "1500 passages")
    assert second.file == "shard-00001"
