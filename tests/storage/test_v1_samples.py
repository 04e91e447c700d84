"""Artifacts with schema version 1 stay readable for ever: the stored samples give the values they were made with.

The numbers here were recorded when the samples were made (`tests/storage/make_v1_samples.py`), not by today's code.
"""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest

from rag_core.corpus.corpus import Corpus
from rag_core.embeddings.embeddings import Embeddings
from rag_core.evaluation.predictions import read_predictions
from rag_core.index.passage_index import PassageIndex
from rag_core.model.rag_model import RagModel
from rag_core.model.reader import DecodingConfig, load_generator
from rag_core.storage.manifest import read_manifest
from rag_core.verification.verification import artifacts_below, verify

SAMPLES = Path(__file__).parents[1] / "samples" / "v1"
FINGERPRINTS = {
    "corpus": "5835375525ae3b0e935480f7610b468f372b4a7a5112e5efd7f0aa3dfde1c90d",
    "embeddings": "1567c0c79e6c5508db4970788c4714bf8c9751fd70afbf6fe7b99342c5a1d259",
    "index": "70597b2d83d9730bda24cd6c76f68d37739503b498f4c51e555f8a33a2a2fb3d",
    "generator": "394d2ccda91558e310a5a71a464913e3000766a1eb8ae17f022053c2093c11f8",
    "rag-model": "4237b1eba35ee8e62ed24ad419790fb0e559b9ab2b992ce8e348db04ea57ad98",
    "predictions": "2fed674eae9bb4240c95be32093090487f29a620c7308eaec5a5d00c1245bdd2",
}
IDS = [f"{city}:{fact}" for city in ("lyon", "oslo", "cork") for fact in ("country", "people", "river")]
ANSWER_OF_THE_REGISTERED_MODEL = "country 000 flows///flows/the river///000 000 oslo oslo//people has/city has."
FIRST_VECTOR = [0.148364, -0.211084, 1.109668, -0.190283, -0.084668, 0.063574, -0.294238, -0.540332]


def test_every_sample_is_whole_and_keeps_its_fingerprint(tmp_path: Path) -> None:
    # In a copy elsewhere, no inputs except the samples themselves can be found.
    shutil.copytree(SAMPLES, tmp_path / "v1")
    fingerprints = {}
    for path in artifacts_below(tmp_path / "v1"):
        report = verify(path)
        assert report.findings == []
        manifest = read_manifest(path)
        assert manifest.schema_version == 1
        fingerprints[manifest.kind] = manifest.fingerprint
    assert fingerprints == FINGERPRINTS


def test_the_corpus_holds_its_passages() -> None:
    passages = list(Corpus.open(SAMPLES / "corpus").iter_passages())
    assert [passage.id for passage in passages] == IDS
    assert (passages[5].title, passages[5].text) == ("Oslo", "The river of Oslo is the Akerselva.")


def test_the_embeddings_hold_their_vectors() -> None:
    parts = list(Embeddings.open(SAMPLES / "embeddings").iter_vectors())
    assert [id for ids, _ in parts for id in ids] == IDS
    vectors_ND = np.concatenate([vectors_nD for _, vectors_nD in parts])
    assert (vectors_ND.shape, vectors_ND.dtype) == ((9, 8), np.float32)
    assert vectors_ND[0] == pytest.approx(FIRST_VECTOR, abs=1e-6)


def test_the_index_finds_the_recorded_passages() -> None:
    index = PassageIndex.open(SAMPLES / "index")
    _, vectors_nD = next(Embeddings.open(SAMPLES / "embeddings").iter_vectors())
    hits = index.search(vectors_nD[1:2], 3)
    assert hits.rows_BK.tolist() == [[7, 1, 4]]
    assert hits.scores_BK[0] == pytest.approx([2.182316, 2.105896, 2.010338], abs=1e-5)
    passages = index.passages_of(hits.rows_BK)[0]
    assert [passage.id for passage in passages] == ["cork:people", "lyon:people", "oslo:people"]


def test_the_generator_loads() -> None:
    generator, tokenizer = load_generator(SAMPLES / "generator")
    assert sum(weights.numel() for weights in generator.parameters()) == 6_442
    assert (
        tokenizer("Lyon", add_special_tokens=False)["input_ids"]
        == tokenizer("lyon", add_special_tokens=False)["input_ids"]
    )


def test_the_model_gives_the_recorded_answer() -> None:
    model = RagModel.from_pretrained(SAMPLES / "rag-model")
    decoding = DecodingConfig(num_beams=2, max_new_tokens=6, num_return_sequences=2, precision="float32")
    (answer,) = model.answer(["which country is Lyon in?"], PassageIndex.open(SAMPLES / "index"), decoding=decoding)
    assert answer.text == "country 000 flows/the"
    assert answer.log_prob == pytest.approx(-21.6118, abs=1e-2)
    assert [read.passage.id for read in answer.passages] == ["cork:people", "cork:country", "lyon:people"]


def test_the_predictions_hold_their_rows() -> None:
    rows = list(read_predictions(SAMPLES / "predictions"))
    assert [row["id"] for row in rows] == [str(number) for number in range(8)]
    assert rows[0]["question"] == "which country is Lyon in?"
    assert rows[0]["candidates"][1] == {"answer": "country 000 flows///", "log_prob": -21.637250900268555}
    assert rows[0]["passages"][0]["prior"] == 0.3989976212868236


def test_a_model_that_mlflow_registered_before_modules_moved_still_answers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # The sample contains the loading code of the day it was registered; its weights come from the rag-model sample.
    import mlflow

    shutil.copytree(SAMPLES / "registered-model", tmp_path / "model")
    shutil.copytree(SAMPLES / "rag-model", tmp_path / "model" / "artifacts" / "rag-model")
    config = {"index": str(SAMPLES / "index")}
    answers = mlflow.pyfunc.load_model(str(tmp_path / "model"), model_config=config).predict(
        [{"question": "which country is Lyon in?"}]
    )
    assert answers["answer"].tolist() == [ANSWER_OF_THE_REGISTERED_MODEL]
    assert answers["log_prob"].tolist() == pytest.approx([-115.164360], abs=1e-2)
