"""`rag train` with LoRA, on real Ray, Prefect and MLflow: what is published, who can answer with it, and what is refused."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from rag_core.embeddings.text_encoder import fingerprint_of_weights
from rag_core.errors import ConfigError
from rag_core.index.passage_index import PassageIndex
from rag_core.model.adapters.lora import LoraSettings, base_of
from rag_core.model.rag_model import RagModel
from rag_core.model.reader import DecodingConfig, load_generator
from rag_core.model.settings import ModelConfig
from rag_core.training.objectives import EndToEndRates
from rag_core.verification.verification import verify
from tests.support.small_corpus import (
    QUESTIONS,
    make_encoder,
    make_generator,
    make_index,
    model_config,
    optimizer,
    write_questions_jsonl,
)

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]
LORA = LoraSettings(rank=2, alpha=8, dropout=0.1)
RATES = EndToEndRates(question_encoder=1e-3, generator=5e-2)


@dataclass
class Site:
    """A folder with encoder, generator, index and questions."""

    folder: Path
    index: Path
    questions: Path
    model: ModelConfig

    def train(self, out: str, model: ModelConfig | None = None, **settings: Any) -> Any:
        from flows.stages.train import train_token
        from tasks.stages.train import TrainConfig

        config = TrainConfig(**{"optimizer": optimizer(4), "rates": RATES, "lora": LORA, "num_workers": 1, **settings})
        return train_token(self.index, self.questions, self.questions, self.folder / out, model or self.model, config)


@pytest.fixture(scope="module")
def site(services: Path, tmp_path_factory: pytest.TempPathFactory) -> Site:
    folder = tmp_path_factory.mktemp("lora")
    encoder = make_encoder(folder / "encoder")
    model = model_config(encoder, make_generator(folder / "generator", encoder))
    questions = write_questions_jsonl(folder / "questions.jsonl")
    return Site(folder, make_index(folder, encoder).path, questions, model)


@pytest.fixture(scope="module")
def trained(site: Site) -> Any:
    """Trained on two workers, with a base in bfloat16 and gradient checkpointing: `site.folder / "rag-token"`."""
    model = site.model.model_copy(update={"generator_dtype": "bfloat16"})
    return site.train("rag-token", model, gradient_checkpointing=True, num_workers=2)


def test_the_published_model_holds_adapters_and_names_its_base(site: Site, trained: Any) -> None:
    generator = site.folder / "rag-token" / "generator"
    assert not list(generator.glob("model*.safetensors"))
    base = json.loads((generator / "base_model.json").read_text())
    assert base == {
        "source": str(site.folder / "generator"),
        "fingerprint": fingerprint_of_weights(load_generator(site.folder / "generator")[0]),
        "dtype": "bfloat16",
    }
    loaded = RagModel.from_pretrained(site.folder / "rag-token").generator
    weights = dict(loaded.named_parameters())
    assert max(float(weight.detach().abs().max()) for name, weight in weights.items() if ".lora_B." in name) > 0
    assert any(weight.dtype == torch.bfloat16 for weight in weights.values())
    assert verify(site.folder / "rag-token").findings == []


def test_a_second_run_is_skipped_and_other_settings_are_not(site: Site, trained: Any) -> None:
    model = site.model.model_copy(update={"generator_dtype": "bfloat16"})
    assert site.train("rag-token", model).skipped, "checkpointing and the number of workers change no result"
    from tasks.stages.train import TrainConfig

    plain = TrainConfig().decisive()
    assert "lora" not in plain
    assert "gradient_checkpointing" not in TrainConfig(gradient_checkpointing=True).decisive()
    assert TrainConfig(lora=LORA).decisive() == plain | {"lora": LORA.model_dump()}
    assert "generator_dtype" not in site.model.decisive()
    assert model.decisive() == site.model.decisive() | {"generator_dtype": "bfloat16"}


def test_inference_and_the_registered_model_answer_with_the_adapters(
    site: Site, trained: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import mlflow
    import pandas as pd
    from mlflow import MlflowClient

    from flows.stages.batch_infer import batch_infer
    from tasks.on_ray.answering import InferConfig

    model, index = RagModel.from_pretrained(site.folder / "rag-token"), PassageIndex.open(site.index)
    decoding = DecodingConfig(num_beams=2, max_new_tokens=6, num_return_sequences=1, precision="float32")
    questions = [question for question, *_ in QUESTIONS]
    expected = model.answer(questions, index, decoding=decoding)
    bare = RagModel.from_parts(site.model).eval()
    without = bare.answer(questions, index, variant="token", decoding=decoding)
    assert [answer.log_prob for answer in expected] != pytest.approx([answer.log_prob for answer in without], abs=1e-2)
    # Workers have another current folder, and models may be given by relative paths.
    monkeypatch.chdir(site.folder)
    config = InferConfig(decoding=decoding, num_workers=1)
    batch_infer(Path("rag-token"), site.index, site.questions, tmp_path / "predictions", config)
    rows = [json.loads(line) for line in (tmp_path / "predictions" / "predictions.jsonl").read_text().splitlines()]
    assert [row["answer"] for row in rows] == [answer.text for answer in expected]
    assert [row["log_prob"] for row in rows] == pytest.approx([answer.log_prob for answer in expected], abs=1e-4)
    (version,) = MlflowClient().search_model_versions(f"run_id = '{trained.run_id}'")
    registered = mlflow.pyfunc.load_model(f"models:/rag-token/{version.version}")
    answers = registered.predict(pd.DataFrame({"question": questions[:2]}))
    assert list(answers["answer"]) == [answer.text for answer in model.answer(questions[:2], index)]


def test_adapters_are_trained_further(site: Site, trained: Any) -> None:
    start = site.folder / "rag-token" / "generator"
    model = site.model.model_copy(update={"generator": str(start)})
    site.train("further", model)
    again = RagModel.from_pretrained(site.folder / "further").generator
    base = base_of(again)
    assert base is not None
    assert (base.source, base.dtype) == (str(site.folder / "generator"), "bfloat16")
    assert fingerprint_of_weights(again) != fingerprint_of_weights(load_generator(start)[0])


def test_what_does_not_fit_is_refused_before_training(site: Site) -> None:
    """`tests/model/test_lora.py` has the others."""
    with pytest.raises(ConfigError, match=r"'q_proj' matches no layer.*query, key, value"):
        site.train("refused", lora=LoraSettings(targets=["q_proj"]))
    assert not (site.folder / "refused").exists()
