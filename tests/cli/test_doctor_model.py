"""`rag doctor --model` shows one context of a trained model, with its special tokens, and what an answer is trained as."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

import pytest
from transformers import BartConfig, BartForConditionalGeneration

from rag_core.corpus.corpus import Corpus
from rag_core.model.rag_model import RagModel
from rag_core.model.settings import ModelConfig
from rag_core.reading.prompt import PromptConfig
from tests.support.models.chat_tokenizers import chat_tokenizer
from tests.support.small_corpus import make_encoder, make_index

pytestmark = pytest.mark.usefixtures("nothing_set")
pytest_plugins = ["tests.support.environment_fixtures"]


def rag(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *arguments: object
) -> tuple[int, str, str]:
    """Run the command line in this process; return the exit code, standard output and standard error."""
    from flows.cli.main import run

    monkeypatch.setattr(sys, "argv", ["rag", *map(str, arguments)])
    monkeypatch.setenv("COLUMNS", "160")
    with pytest.raises(SystemExit) as ended:
        run()
    printed = capsys.readouterr()
    return int(ended.value.code or 0), printed.out, printed.err


def test_one_context_is_shown_as_the_generator_reads_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    encoder, tokenizer = make_encoder(tmp_path / "encoder"), chat_tokenizer("llama2")
    index = make_index(tmp_path / "index", encoder)
    layers = {"encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 1, "decoder_attention_heads": 1}
    sizes = {"d_model": 8, "encoder_ffn_dim": 8, "decoder_ffn_dim": 8, "max_position_embeddings": 256}
    bart = BartConfig(vocab_size=len(tokenizer), eos_token_id=tokenizer.eos_token_id, **layers, **sizes)
    BartForConditionalGeneration(bart).save_pretrained(tmp_path / "generator")
    tokenizer.save_pretrained(tmp_path / "generator")
    prompt = PromptConfig(template="chat", system="[b]Be short[/b] :smile:", user="{text}\n{question}")
    generator = str(tmp_path / "generator")
    config = ModelConfig(question_encoder=str(encoder), generator=generator, num_docs=1, prompt=prompt)
    RagModel.from_parts(config).save_pretrained(tmp_path / "model")

    code, out, error = rag(monkeypatch, capsys, "doctor", "--model", tmp_path / "model")
    assert code == 0, error
    lines = [line.strip("│ ").rstrip() for line in out.splitlines()]
    assert re.match(r"╭─ A context of BartForConditionalGeneration: \d+ tokens, at most 256 ─", lines[0])
    assert "<s>[INST] <<SYS>>" in lines
    assert "[b]Be short[/b] :smile:" in lines
    assert "Which country is Lyon in? [/INST]" in lines
    assert any(line.split() == ["the", "answer", "is", "trained", "as", "'", "France'</s>"] for line in lines)
    assert any(line.startswith("decoding ends at") and line.endswith("</s>") for line in lines)

    questions = tmp_path / "questions.jsonl"
    rows = [{"id": "1", "question": "\x1b[2Jwho?", "answers": ["Oslo </s>"]}]
    questions.write_text("".join(json.dumps(row) + "\n" for row in rows))
    command = ("doctor", "--model", tmp_path / "model", "--index", index.path, "--questions", questions)
    code, out, error = rag(monkeypatch, capsys, *command)
    assert code == 0, error
    assert "\\x1b[2Jwho? [/INST]" in out
    assert "' Oslo < /s>'</s>" in out
    ids = {passage.id for passage in Corpus.open(index.path.parent / "corpus").iter_passages()}
    assert any(line.split()[:1] == ["passage"] and line.split()[1] in ids for line in out.splitlines())


def test_an_index_without_a_model_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    code, _, error = rag(monkeypatch, capsys, "doctor", "--index", tmp_path)
    assert (code, error.strip().count("\n")) == (2, 0)
    assert "Give --model, too." in error
