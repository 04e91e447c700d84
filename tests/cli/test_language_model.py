"""A decoder-only model with a chat template and LoRA, through the commands: train, kill, resume, infer, evaluate, ask.

The model is a tiny Llama with random weights; the services are real.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from transformers import LlamaConfig, LlamaForCausalLM

from flows.cli.main import run
from rag_core.embeddings.text_encoder import fingerprint_of_weights
from rag_core.index.passage_index import PassageIndex
from rag_core.model.rag_model import RagModel
from rag_core.model.reader import DecodingConfig, load_generator
from tests.support.models.chat_tokenizers import chat_tokenizer
from tests.support.servers.processes import environment_in, kill_tree
from tests.support.small_corpus import QUESTIONS, make_encoder, make_index, write_questions_jsonl

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

Rag = Callable[..., tuple[int, str]]


def make_language_model(folder: Path) -> Path:
    """A Llama of two layers with grouped-query attention, a byte-level tokenizer and a ChatML template."""
    tokenizer = chat_tokenizer("chatml")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = LlamaForCausalLM(
            LlamaConfig(
                vocab_size=len(tokenizer),
                hidden_size=32,
                intermediate_size=64,
                num_hidden_layers=2,
                num_attention_heads=4,
                num_key_value_heads=2,
                max_position_embeddings=512,
                eos_token_id=tokenizer.eos_token_id,
                bos_token_id=None,
                pad_token_id=None,
                initializer_range=0.2,
            )
        )
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@dataclass
class Site:
    """Base model, index, questions, and the arguments of `rag train`."""

    folder: Path
    base: Path
    index: Path
    questions: Path

    def train_arguments(self, out: str) -> list[str]:
        files = ["--index", self.index, "--questions", self.questions, "--dev", self.questions]
        config = ["--config", self.folder / "run.yaml", "--out", self.folder / out]
        return ["train", "--variant", "token", *map(str, [*files, *config])]


@pytest.fixture(scope="module")
def site(services: Path, tmp_path_factory: pytest.TempPathFactory) -> Site:
    folder = tmp_path_factory.mktemp("language-model")
    encoder = make_encoder(folder / "encoder")
    site = Site(
        folder, make_language_model(folder / "base"), make_index(folder, encoder).path, folder / "questions.jsonl"
    )
    write_questions_jsonl(site.questions)
    settings = {
        "model": {
            "question_encoder": str(encoder),
            "generator": str(site.base),
            "score_scale": 4.0,
            "num_docs": 3,
            "prompt": {
                "template": "chat",
                "system": "Answer briefly.",
                "max_context_tokens": 200,
                "max_answer_tokens": 12,
            },
        },
        "train": {
            "lora": {"rank": 4, "alpha": 8, "dropout": 0.1},
            "gradient_checkpointing": True,
            "rates": {"question_encoder": 1e-3, "generator": 5e-3},
            "optimizer": {
                "steps": 12,
                "batch_size": 4,
                "log_every": 4,
                "eval_every": 12,
                "checkpoint_every": 2,
                "precision": "float32",
            },
            "num_workers": 1,
        },
    }
    (folder / "run.yaml").write_text(yaml.safe_dump(settings))
    return site


@pytest.fixture
def rag(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], services: Path) -> Rag:
    """Run a command in this process; returns the exit code and standard output."""

    def call(*arguments: object) -> tuple[int, str]:
        monkeypatch.setattr(sys, "argv", ["rag", *(str(argument) for argument in arguments)])
        with pytest.raises(SystemExit) as ended:
            run()
        captured = capsys.readouterr()
        print(captured.err, file=sys.stderr)
        return int(ended.value.code or 0), captured.out

    return call


def kill_after_steps(arguments: list[str], folder: Path, steps: int) -> None:
    """Start `rag` with a store of its own, and kill it and its children as soon as a checkpoint has `steps` steps."""
    environment = environment_in(folder / "killed", MLFLOW_TRACKING_URI=f"sqlite:///{folder}/killed.db")
    command = subprocess.Popen(
        [sys.executable, "-m", "flows.cli.main", *arguments], cwd=folder, env=environment, start_new_session=True
    )
    end = time.monotonic() + 300
    while not any(int(path.name[5:]) >= steps for path in folder.glob(".resumed.training-*/step-*")):
        assert command.poll() is None, "training ended before it could be killed"
        assert time.monotonic() < end
        time.sleep(0.01)
    kill_tree(command)


def test_a_killed_training_ends_with_the_weights_of_an_undisturbed_one(site: Site, rag: Rag) -> None:
    kill_after_steps(site.train_arguments("resumed"), site.folder, 4)
    assert not (site.folder / "resumed").exists()
    for out in ("resumed", "rag-token"):
        code, _ = rag(*site.train_arguments(out))
        assert code == 0
    resumed, undisturbed = (RagModel.from_pretrained(site.folder / out) for out in ("resumed", "rag-token"))
    assert resumed.fingerprint() == undisturbed.fingerprint()


def test_the_model_holds_adapters_reads_chats_and_answers_through_every_command(site: Site, rag: Rag) -> None:
    code, _ = rag(*site.train_arguments("rag-token"))  # skipped, if the test before has run
    assert code == 0
    generator = site.folder / "rag-token" / "generator"
    assert json.loads((generator / "base_model.json").read_text())["source"] == str(site.base)
    assert not list(generator.glob("model*.safetensors"))

    model, index = RagModel.from_pretrained(site.folder / "rag-token"), PassageIndex.open(site.index)
    assert fingerprint_of_weights(model.generator) != fingerprint_of_weights(load_generator(site.base)[0])
    decoding = DecodingConfig(num_beams=3, max_new_tokens=8, precision="float32")
    questions = [question for question, *_ in QUESTIONS]
    expected = model.answer(questions, index, decoding=decoding)

    out = site.folder / "predictions"
    options = ["--num-beams", 3, "--max-new-tokens", 8, "--precision", "float32", "--num-workers", 1]
    files = ["--model", site.folder / "rag-token", "--index", site.index, "--questions", site.questions]
    code, _ = rag("infer", *files, "--out", out, *options)
    assert code == 0
    rows = [json.loads(line) for line in (out / "predictions.jsonl").read_text().splitlines()]
    assert [row["answer"] for row in rows] == [answer.text for answer in expected]
    assert [row["log_prob"] for row in rows] == pytest.approx([answer.log_prob for answer in expected], abs=1e-4)

    code, printed = rag("evaluate", "--predictions", out, "--questions", site.questions, "--json")
    assert code == 0
    assert json.loads(printed)["counts"]["em"] == len(questions)

    files = ["--model", site.folder / "rag-token", "--index", site.index]
    code, printed = rag("ask", questions[0], *files, "--num-beams", 3, "--json")
    assert code == 0
    asked: dict[str, Any] = json.loads(printed)
    assert asked["answer"] == model.answer(questions[:1], index, decoding=DecodingConfig(num_beams=3))[0].text

    code, printed = rag("doctor", "--model", site.folder / "rag-token")
    assert code == 0
    assert all(text in printed for text in ("<|im_start|>system", "Answer briefly.<|im_end|>", "<|im_start|>assistant"))
    assert rag("verify", site.folder / "rag-token")[0] == 0


def test_the_registered_model_answers_and_an_exported_one_needs_no_base(site: Site, rag: Rag) -> None:
    import mlflow
    import pandas as pd
    from mlflow import MlflowClient

    code, _ = rag(*site.train_arguments("rag-token"))
    assert code == 0
    model, index = RagModel.from_pretrained(site.folder / "rag-token"), PassageIndex.open(site.index)
    questions = [question for question, *_ in QUESTIONS][:2]
    expected = [answer.text for answer in model.answer(questions, index)]
    newest = max(MlflowClient().search_model_versions("name = 'rag-token'"), key=lambda v: int(v.version))
    registered = mlflow.pyfunc.load_model(f"models:/rag-token/{newest.version}")
    assert list(registered.predict(pd.DataFrame({"question": questions}))["answer"]) == expected

    code, _ = rag("export", site.folder / "rag-token", "--out", site.folder / "exported")
    assert code == 0
    exported = RagModel.from_pretrained(site.folder / "exported")
    assert (site.folder / "exported" / "generator" / "model.safetensors").is_file()
    decoding = DecodingConfig(num_beams=3, max_new_tokens=8, precision="float32")  # bf16 would round merged weights
    of_exported, of_adapted = (one.answer(questions, index, decoding=decoding) for one in (exported, model))
    assert [answer.text for answer in of_exported] == [answer.text for answer in of_adapted]
