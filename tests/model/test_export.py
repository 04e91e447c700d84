"""`rag export` and `rag export-hf`: adapters are merged, and the written model needs no base."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForSeq2SeqLM, RagTokenForGeneration

from flows.cli.commands.exchange import export
from rag_core.errors import ArtifactError, ConfigError
from rag_core.model.rag_model import RagModel
from rag_core.pretrained.rounded_weights import stored_type
from rag_core.verification.verification import verify
from tests.support.models.adapters import make_adapters
from tests.support.small_corpus import make_encoder, make_generator, model_config

IDS_BS = torch.tensor([[8, 9, 10, 11]])


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A RAG model whose generator is a folder of adapters, beside their base."""
    folder = tmp_path_factory.mktemp("export")
    encoder = make_encoder(folder / "encoder")
    adapters = make_adapters(folder / "adapters", make_generator(folder / "base", encoder))
    model = RagModel.from_parts(model_config(encoder, adapters))
    model.settings.variant = "token"
    model.save_pretrained(folder / "model")
    return folder / "model"


def logits(generator: Any) -> torch.Tensor:
    with torch.inference_mode():
        result: torch.Tensor = generator.eval()(input_ids=IDS_BS, decoder_input_ids=IDS_BS).logits
    return result


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_an_exported_generator_is_a_plain_model_with_the_same_logits(trained: Path, tmp_path: Path, dtype: str) -> None:
    moved = Path(shutil.copytree(trained.parent, tmp_path / "moved"))
    export(moved / "model", tmp_path / "out", dtype)
    expected = logits(RagModel.from_pretrained(moved / "model").generator)
    shutil.rmtree(moved)
    plain = AutoModelForSeq2SeqLM.from_pretrained(tmp_path / "out" / "generator", dtype=torch.float32)
    tolerance = 1e-4 if dtype == "float32" else 3e-2
    torch.testing.assert_close(logits(plain), expected, rtol=tolerance, atol=tolerance * float(expected.abs().max()))
    assert stored_type(str(tmp_path / "out" / "generator")) == getattr(torch, dtype)
    again = RagModel.from_pretrained(tmp_path / "out")
    assert torch.equal(logits(again.generator), logits(plain))
    assert again.settings == RagModel.from_pretrained(trained).settings
    report = verify(tmp_path / "out")
    assert report.findings == []


def test_an_export_to_a_foreign_folder_or_of_an_unknown_type_is_refused(trained: Path, tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(ArtifactError):
        export(trained, tmp_path)
    with pytest.raises(ConfigError, match=r"Unknown dtype 'int8'\. Give one of float32, bfloat16"):
        export(trained, tmp_path / "out", "int8")
    assert [file.name for file in tmp_path.iterdir()] == ["notes.txt"]


@pytest.mark.filterwarnings("ignore::rag_core.model.hf_rag.ExchangeWarning")
def test_an_export_for_hugging_faces_rag_merges_adapters(trained: Path, tmp_path: Path) -> None:
    model = RagModel.from_pretrained(trained)
    model.to_hf_rag(tmp_path / "hf")
    theirs = RagTokenForGeneration.from_pretrained(tmp_path / "hf")
    torch.testing.assert_close(logits(theirs.rag.generator), logits(model.generator), rtol=1e-4, atol=1e-4)


def test_verification_finds_a_missing_base(trained: Path, tmp_path: Path) -> None:
    assert verify(trained).findings == []
    moved = Path(shutil.copytree(trained.parent, tmp_path / "moved"))
    base = moved / "model" / "generator" / "base_model.json"
    assert str(trained.parent / "base") in base.read_text()
    trained.parent.joinpath("base").rename(tmp_path / "aside")
    shutil.rmtree(moved / "base")
    try:
        (finding,) = verify(moved / "model").findings
    finally:
        (tmp_path / "aside").rename(trained.parent / "base")
    assert "holds LoRA adapters only, and their base" in finding.found
