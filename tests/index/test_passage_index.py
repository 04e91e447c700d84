"""The index: the same passages as brute force, scores of the stored vectors, and a recall that was measured."""

from __future__ import annotations

from pathlib import Path

import faiss
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from rag_core.corpus.corpus import Corpus, CorpusConfig, write_corpus
from rag_core.embeddings.embeddings import Embeddings, shard_name
from rag_core.errors import ArtifactError, ConfigError
from rag_core.index.factory import choose_factory, make_faiss_index, tune_recall
from rag_core.index.passage_index import IndexConfig, PassageIndex, build_index
from rag_core.storage.artifact import publish

N, D = 3000, 32
QUERIES_BD = np.random.default_rng(9).normal(size=(20, D)).astype(np.float32)


def _vectors(dtype: str = "float32", n: int = N) -> np.ndarray:
    """Vectors around forty centres, of very different lengths, so that inner product is not cosine."""
    rng = np.random.default_rng(5)
    centres = rng.normal(size=(40, D))
    vectors_ND = centres[rng.integers(0, 40, n)] + 0.4 * rng.normal(size=(n, D))
    return (vectors_ND * rng.uniform(0.5, 2.0, size=(n, 1))).astype(dtype)


def _corpus(folder: Path, n: int = N) -> Corpus:
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / "passages.jsonl"
    file.write_text("".join(f'{{"id": "p{row}", "title": "t{row}", "text": "text {row}"}}\n' for row in range(n)))
    write_corpus([file], folder / "corpus", CorpusConfig(format="jsonl", shard_rows=700))
    return Corpus.open(folder / "corpus")


def _embeddings(folder: Path, corpus: Corpus, vectors_ND: np.ndarray) -> Embeddings:
    with publish(folder, "embeddings", made_from={"corpus": corpus.manifest.fingerprint}) as draft:
        start = 0
        for number, shard in enumerate(corpus.shards):
            ids = pq.read_table(shard)["id"]
            part_nD = vectors_ND[start : start + len(ids)]
            column = pa.FixedSizeListArray.from_arrays(pa.array(part_nD.reshape(-1)), D)
            pq.write_table(pa.table({"id": ids, "embedding": column}), draft.folder / shard_name(number))
            start += len(ids)
        draft.counts["passages"] = start
        draft.details = {"dim": D, "dtype": str(vectors_ND.dtype), "encoder": "none", "encoder_fingerprint": "f" * 64}
    return Embeddings.open(folder)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Corpus:
    return _corpus(tmp_path_factory.mktemp("index"))


@pytest.fixture(scope="module")
def embeddings(corpus: Corpus) -> Embeddings:
    return _embeddings(corpus.path.parent / "embeddings", corpus, _vectors())


def _built(embeddings: Embeddings, corpus: Corpus, factory: str, target: float = 0.95) -> PassageIndex:
    out = embeddings.path.parent / f"index-{factory.replace(',', '-')}-{target}"
    build_index(embeddings, corpus, out, IndexConfig(factory=factory, target_recall=target))
    return PassageIndex.open(out)


def _brute_force(vectors_ND: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    scores_BN = QUERIES_BD.astype(np.float64) @ vectors_ND.astype(np.float64).T
    rows_BK = np.argsort(-scores_BN, axis=1)[:, :k]
    return rows_BK, np.take_along_axis(scores_BN, rows_BK, axis=1)


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_exact_search_equals_brute_force_in_the_stored_precision(corpus: Corpus, tmp_path: Path, dtype: str) -> None:
    vectors_ND = _vectors(dtype)
    index = _built(_embeddings(tmp_path / "embeddings", corpus, vectors_ND), corpus, "auto")
    assert index.manifest.details["factory"] == "Flat"
    assert np.load(index.path / "vectors.npy").dtype == dtype
    found = index.search(QUERIES_BD, 7)
    rows_BK, scores_BK = _brute_force(vectors_ND, 7)
    np.testing.assert_array_equal(found.rows_BK, rows_BK)
    np.testing.assert_allclose(found.scores_BK, scores_BK, rtol=1e-5)
    np.testing.assert_array_equal(found.vectors_BKD, vectors_ND[rows_BK].astype(np.float32))
    assert found.scores_BK.dtype == found.vectors_BKD.dtype == np.float32


@pytest.mark.parametrize("factory", ["IVF32,SQ8", "IVF16,PQ8x4", "PCA16,IVF16,SQ8", "OPQ8,IVF16,PQ8x4fs", "HNSW16"])
def test_scores_of_an_approximate_index_are_inner_products_with_the_stored_vectors(
    embeddings: Embeddings, corpus: Corpus, factory: str
) -> None:
    index, vectors_ND = _built(embeddings, corpus, factory, target=0.9), _vectors()
    found = index.search(QUERIES_BD, 5)
    expected_BK = (QUERIES_BD[:, None].astype(np.float64) * vectors_ND[found.rows_BK]).sum(-1)
    np.testing.assert_allclose(found.scores_BK, expected_BK, rtol=1e-5)
    np.testing.assert_array_equal(found.vectors_BKD, vectors_ND[found.rows_BK])
    assert (np.diff(found.scores_BK, axis=1) <= 0).all()
    assert all(len(set(rows_K)) == 5 for rows_K in found.rows_BK.tolist())
    # FAISS alone knows rounded vectors only: its own scores are others.
    if factory != "HNSW16":
        own_BK, _ = index._shards[0]._faiss.search(QUERIES_BD, 5)
        assert np.abs(own_BK - expected_BK).max() > 1e-3


def test_rescoring_finds_more_of_the_true_neighbours_than_the_compressed_index(
    embeddings: Embeddings, corpus: Corpus
) -> None:
    index = _built(embeddings, corpus, "PQ8x4")
    truth_BK, _ = _brute_force(_vectors(), 10)
    share = lambda rows_BK: np.mean([len({*a} & {*b}) / 10 for a, b in zip(rows_BK, truth_BK, strict=True)])  # noqa: E731
    assert share(index.search(QUERIES_BD, 10).rows_BK) > share(index._shards[0]._faiss.search(QUERIES_BD, 10)[1]) + 0.1


@pytest.mark.parametrize("factory", ["IVF64,Flat", "IVF48,Flat", "IVF64,SQ4"])
def test_tuning_takes_the_fewest_lists_that_reach_the_target(factory: str) -> None:
    vectors_ND = _vectors() / np.linalg.norm(_vectors(), axis=1, keepdims=True)
    vectors_ND += np.random.default_rng(3).normal(size=vectors_ND.shape).astype(np.float32) * 0.15
    index = make_faiss_index(vectors_ND, factory, seed=0)
    target = 0.99 if "Flat" in factory else 0.9
    measured = tune_recall([index], [vectors_ND], target, seed=0, refine_factor=4)
    curve = [point.recall_at_10 for point in measured.curve]
    tried = [point.value for point in measured.curve]
    assert len(curve) > 1
    assert tried == sorted(set(tried))
    assert measured.chosen.recall_at_10 >= target
    place = measured.curve.index(measured.chosen)
    assert all(recall < target for recall in curve[:place])
    # One list fewer does not reach it; from twenty lists on, one in twenty.
    assert tried[place] - tried[place - 1] <= max(1, 0.05 * tried[place])
    assert index.nprobe == measured.chosen.value
    # The same recall, counted independently over the same sample of queries: 200 rows drawn with seed + 1.
    rows = np.sort(np.random.default_rng(1).choice(N, size=200, replace=False))
    scores_QN = vectors_ND[rows] @ vectors_ND.T
    for point in measured.curve:
        index.nprobe = point.value
        _, found_QP = index.search(vectors_ND[rows], 40)
        hits = 0
        for query, found_P in enumerate(found_QP.tolist()):
            best = sorted((row for row in found_P if row >= 0), key=lambda row: -scores_QN[query, row])[:10]
            hits += len({*best} & {*np.argsort(-scores_QN[query])[:10].tolist()})
        assert point.recall_at_10 == pytest.approx(hits / 2000, abs=0.002)


def test_a_target_of_one_may_visit_every_list_even_if_their_number_is_not_a_power_of_two() -> None:
    vectors_ND = np.random.default_rng(0).normal(size=(N, D)).astype(np.float32)
    measured = tune_recall([make_faiss_index(vectors_ND, "IVF12,Flat", 0)], [vectors_ND], 1.0, 0, 1)
    assert measured.chosen.recall_at_10 == 1.0
    assert {1, 2, 4, 8, 12} <= {point.value for point in measured.curve}
    assert all(point.recall_at_10 < 1 for point in measured.curve if point.value < measured.chosen.value)


def test_the_chosen_setting_is_used_again_after_opening(embeddings: Embeddings, corpus: Corpus) -> None:
    index = _built(embeddings, corpus, "IVF32,SQ8", target=0.999)
    details = index.manifest.details
    assert details["search_parameter"] == "nprobe"
    assert index._shards[0]._faiss.nprobe == details["search_value"] > 1
    assert details["recall_at_10"] >= 0.999


def test_the_choice_follows_the_size() -> None:
    assert choose_factory(9, 384) == choose_factory(50_000, 384) == "Flat"
    assert choose_factory(50_001, 384) == "OPQ96,IVF512,PQ96x4fs"
    assert choose_factory(234_908, 384) == "OPQ96,IVF1024,PQ96x4fs"
    assert choose_factory(5_000_000, 384) == "OPQ96,IVF8192,PQ96x4fs"
    assert choose_factory(234_908, 100) == "IVF1024,SQ8"
    assert choose_factory(21_000_000, 768) == "OPQ64,IVF16384,PQ64"
    # 64 sub-vectors need a width that 64 divides.
    assert choose_factory(21_000_000, 100) == "IVF16384,SQ8"
    assert faiss.index_factory(768, choose_factory(21_000_000, 768), faiss.METRIC_INNER_PRODUCT).d == 768


def test_the_closed_form_rotation_keeps_inner_products_and_spreads_the_variance() -> None:
    vectors_ND = _vectors()
    index = make_faiss_index(vectors_ND, "OPQ8,IVF16,PQ8x4fs", seed=0)  # It owns the rotation.
    rotation = faiss.downcast_VectorTransform(index.chain.at(0))
    turned_ND = rotation.apply(vectors_ND)
    np.testing.assert_allclose(turned_ND[:50] @ turned_ND.T, vectors_ND[:50] @ vectors_ND.T, rtol=1e-4, atol=1e-3)
    spread = lambda rows_ND: np.ptp(np.log(rows_ND.var(axis=0)).reshape(8, 4).sum(axis=1))  # noqa: E731
    principal_ND = (vectors_ND - vectors_ND.mean(0)) @ np.linalg.svd(vectors_ND - vectors_ND.mean(0))[2].T
    assert spread(turned_ND) < 0.2 * spread(principal_ND)


def test_tuning_on_questions_measures_on_them(embeddings: Embeddings, corpus: Corpus, tmp_path: Path) -> None:
    # Questions lie elsewhere than passages, so more lists are needed for the same recall.
    config = IndexConfig(factory="IVF64,SQ8", target_recall=0.99)
    on_passages = build_index(embeddings, corpus, tmp_path / "passages", config)
    on_questions = build_index(embeddings, corpus, tmp_path / "questions", config, QUERIES_BD)
    assert on_questions.details["search_value"] > on_passages.details["search_value"]
    truth_BK, _ = _brute_force(_vectors(), 10)
    found_BK = PassageIndex.open(tmp_path / "questions").search(QUERIES_BD, 10).rows_BK
    recall = np.mean([len({*a} & {*b}) / 10 for a, b in zip(found_BK, truth_BK, strict=True)])
    assert recall == pytest.approx(on_questions.details["recall_at_10"])


def test_a_factory_string_that_faiss_does_not_know_is_refused(embeddings: Embeddings, corpus: Corpus) -> None:
    with pytest.raises(ConfigError, match=r"'Nonsense12' for 32 dimensions"):
        _built(embeddings, corpus, "Nonsense12")
    assert not (embeddings.path.parent / "index-Nonsense12-0.95").exists()


def test_more_lists_than_vectors_are_refused_with_the_numbers() -> None:
    with pytest.raises(ConfigError, match=r"'IVF256,Flat' from 100 vectors of 32 dimensions"):
        make_faiss_index(_vectors(n=100), "IVF256,Flat", 0)


@pytest.mark.parametrize("k", [0, -1, N + 1])
def test_a_number_of_passages_outside_the_corpus_is_refused(embeddings: Embeddings, corpus: Corpus, k: int) -> None:
    index = _built(embeddings, corpus, "Flat")
    assert index.search(QUERIES_BD[:1], N).rows_BK.shape == (1, N) == (1, len(index))
    with pytest.raises(ConfigError, match=rf"^{k} passages per question .* holds {N}\. Ask for 1 to {N}\."):
        index.search(QUERIES_BD, k)


def test_queries_of_another_width_are_refused_with_both_widths(embeddings: Embeddings, corpus: Corpus) -> None:
    with pytest.raises(ConfigError, match=r"gives 16 dimensions, the index .* holds 32"):
        _built(embeddings, corpus, "Flat").search(QUERIES_BD[:, :16], 3)


def test_an_index_that_finds_too_few_says_so_instead_of_inventing_passages(
    embeddings: Embeddings, corpus: Corpus
) -> None:
    index = _built(embeddings, corpus, "IVF32,SQ8")
    index._shards[0]._faiss.nprobe = 1
    with pytest.raises(ConfigError, match="found fewer than 2000 passages"):
        index.search(QUERIES_BD, 2000)


def test_rows_lead_to_the_passages_that_were_embedded(embeddings: Embeddings, corpus: Corpus) -> None:
    index = _built(embeddings, corpus, "Flat")
    rows_BK = np.array([[0, 2999], [701, 700]])
    assert [[p.id for p in passages] for passages in index.passages_of(rows_BK)] == [["p0", "p2999"], ["p701", "p700"]]
    assert index.passages_of(np.array([[1403]]))[0][0].text == "text 1403"


def test_embeddings_of_another_corpus_are_refused(tmp_path: Path, embeddings: Embeddings) -> None:
    with pytest.raises(ArtifactError, match="made from another corpus"):
        build_index(embeddings, _corpus(tmp_path, n=20), tmp_path / "index", IndexConfig())
    assert not (tmp_path / "index").exists()


def test_embeddings_that_miss_rows_are_refused(tmp_path: Path, corpus: Corpus) -> None:
    short = _embeddings(tmp_path / "embeddings", corpus, _vectors())
    with publish(tmp_path / "short", "embeddings", made_from=short.manifest.made_from) as draft:
        for shard in short.shards[:-1]:
            (draft.folder / shard.name).write_bytes(shard.read_bytes())
        draft.counts["passages"] = 2800
        draft.details = short.manifest.details
    with pytest.raises(ArtifactError, match=r"3000 passages, .* 2800"):
        build_index(Embeddings.open(tmp_path / "short"), corpus, tmp_path / "index", IndexConfig())
