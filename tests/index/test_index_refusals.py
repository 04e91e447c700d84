"""Where vectors would not fit each other, nothing is answered or measured: another encoder's index is refused."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from flows.cli.commands.inspection import ask, retrieve
from rag_core.errors import ArtifactError
from rag_core.model.rag_model import RagModel
from tests.support.small_corpus import make_encoder, make_generator, make_index, model_config, write_questions_jsonl


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An index, a model that was trained with it, and another index of the same passages by another encoder."""
    folder = tmp_path_factory.mktemp("refusals")
    encoder = make_encoder(folder / "encoder")
    model = RagModel.from_parts(model_config(encoder, make_generator(folder / "generator", encoder)))
    model.settings.variant = "token"
    model.settings.document_encoder_fingerprint = make_index(folder / "own", encoder).encoder_fingerprint
    model.save_pretrained(folder / "model")
    make_index(folder / "other", make_encoder(folder / "other-encoder", seed=5))
    write_questions_jsonl(folder / "questions.jsonl")
    return folder


def test_neither_answers_nor_recall_are_given_from_another_encoders_index(parts: Path) -> None:
    message = "was made by another document encoder"
    with pytest.raises(ArtifactError, match=message):
        ask("which country is Lyon in?", parts / "model", parts / "other" / "index")
    with pytest.raises(ArtifactError, match=message):
        retrieve(parts / "other" / "index", parts / "questions.jsonl", "1", parts / "model")


def test_recall_is_not_measured_with_an_encoder_that_was_replaced_after_indexing(parts: Path) -> None:
    retrieve(parts / "own" / "index", parts / "questions.jsonl", "1", None, None, as_json=True)
    shutil.rmtree(parts / "encoder")
    shutil.copytree(parts / "other-encoder", parts / "encoder")
    with pytest.raises(ArtifactError, match="is no longer the encoder that made the index"):
        retrieve(parts / "own" / "index", parts / "questions.jsonl", "1", None, None)
