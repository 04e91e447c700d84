"""Wrong input ends a command with exit code 2 and one paragraph that says what to do, never with a traceback."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import yaml

from flows.cli.main import run
from tests.support.small_corpus import (
    make_encoder,
    make_generator,
    make_index,
    model_config,
    write_questions_jsonl,
)

Rag = Callable[..., tuple[int, str]]


@dataclass
class Parts:
    """Folders and files of a small system."""

    folder: Path
    encoder: Path
    generator: Path
    questions: Path
    passages: Path
    config: Path
    model: Path

    @property
    def index(self) -> Path:
        return self.folder / "index"


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory) -> Parts:
    from rag_core.model.rag_model import RagModel

    folder = tmp_path_factory.mktemp("parts")
    encoder = make_encoder(folder / "encoder")
    generator = make_generator(folder / "generator", encoder)
    make_index(folder, encoder)
    settings = model_config(encoder, generator)
    config = folder / "run.yaml"
    config.write_text(yaml.safe_dump({"model": settings.model_dump(mode="json"), "train": {"optimizer": {"steps": 1}}}))
    model = RagModel.from_parts(settings)
    model.settings.variant = "token"
    model.save_pretrained(folder / "model")
    questions = write_questions_jsonl(folder / "questions.jsonl")
    return Parts(folder, encoder, generator, questions, folder / "passages.jsonl", config, folder / "model")


@pytest.fixture
def rag(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], services: Path) -> Rag:
    """A function that runs the command line in this process and returns the exit code and standard error."""

    def call(*arguments: object) -> tuple[int, str]:
        monkeypatch.setattr(sys, "argv", ["rag", *(str(argument) for argument in arguments)])
        with pytest.raises(SystemExit) as ended:
            run()
        return int(ended.value.code or 0), capsys.readouterr().err

    return call


def is_one_paragraph(error: str, *words: object) -> bool:
    """Assert that the error is one line, starts with "Error:", contains all `words`, and is no traceback."""
    flat = " ".join(error.split())
    lines = [line for line in error.strip().splitlines() if line.strip()]
    assert "Traceback" not in error, error
    assert len(lines) == 1, error
    assert lines[0].startswith("Error:"), error
    for word in words:
        assert str(word) in flat, f"{word!r} is not in: {flat}"
    return True


def test_a_missing_source_is_named(rag: Rag, tmp_path: Path) -> None:
    code, error = rag("corpus", tmp_path / "nothing.jsonl", "--out", tmp_path / "out")
    assert code == 2
    assert is_one_paragraph(error, tmp_path / "nothing.jsonl")
    assert not (tmp_path / "out").exists()


def test_an_unknown_corpus_format_lists_the_known_ones(rag: Rag, parts: Parts, tmp_path: Path) -> None:
    code, error = rag("corpus", parts.passages, "--format", "xml", "--out", tmp_path / "out")
    assert code == 2
    assert is_one_paragraph(error, "jsonl", "dpr-tsv", "parquet", "squad", "text")


def test_a_beir_corpus_is_recognised_and_reported_in_one_line(rag: Rag, tmp_path: Path) -> None:
    file = tmp_path / "corpus[bold].jsonl"
    file.write_text('{"_id": "d1", "title": "Lyon", "text": "A city.", "metadata": {}}\n')
    code, shown = rag("corpus", file, "--out", tmp_path / "out")
    assert (code, shown) == (0, "corpus: read as beir (BEIR), JSON Lines\n")


def test_a_corpus_file_of_no_known_layout_is_refused_with_the_key_that_was_meant(rag: Rag, tmp_path: Path) -> None:
    file = tmp_path / "corpus.jsonl"
    file.write_text('{"id": "1", "contnets": "x"}\n')
    code, error = rag("corpus", file, "--out", tmp_path / "out")
    assert code == 2
    assert is_one_paragraph(error, file, "did you mean `contents` for `contnets`?")


def test_an_unknown_column_is_named_with_the_columns_found(rag: Rag, tmp_path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    file = tmp_path / "passages.parquet"
    pq.write_table(pa.table({"id": ["1"], "body": ["text"]}), file)
    code, error = rag("corpus", file, "--format", "parquet", "--out", tmp_path / "out")
    assert code == 2
    assert is_one_paragraph(error, file, "text", "body")


def test_an_output_folder_with_foreign_files_is_left_alone(rag: Rag, parts: Parts, tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("ten years of work")
    code, error = rag("corpus", parts.passages, "--out", tmp_path)
    assert code == 2
    assert is_one_paragraph(error, tmp_path, "--out")
    assert (tmp_path / "thesis.txt").read_text() == "ten years of work"


def test_an_unreadable_encoder_folder_is_named(rag: Rag, parts: Parts, tmp_path: Path) -> None:
    empty = tmp_path / "encoder"
    empty.mkdir()
    corpus = parts.folder / "corpus"
    code, error = rag("embed", "--corpus", corpus, "--encoder", empty, "--out", tmp_path / "out")
    assert code == 2
    assert is_one_paragraph(error, empty, "config.json")


def test_embeddings_of_another_corpus_are_refused(rag: Rag, parts: Parts, tmp_path: Path) -> None:
    other = tmp_path / "other.jsonl"
    other.write_text(json.dumps({"id": "1", "text": "Another corpus."}) + "\n")
    assert rag("corpus", other, "--out", tmp_path / "corpus")[0] == 0
    embeddings = parts.folder / "embeddings"
    code, error = rag("index", "--embeddings", embeddings, "--corpus", tmp_path / "corpus", "--out", tmp_path / "out")
    assert code == 2
    assert is_one_paragraph(error, "another corpus")


def test_a_wrong_factory_string_is_refused(rag: Rag, parts: Parts, tmp_path: Path) -> None:
    folders = ("--embeddings", parts.folder / "embeddings", "--corpus", parts.folder / "corpus")
    code, error = rag("index", *folders, "--factory", "NOPE7", "--out", tmp_path / "out")
    assert code == 2
    assert is_one_paragraph(error, "NOPE7", "auto")


def train_arguments(parts: Parts, out: Path, **changes: object) -> list[object]:
    options: dict[str, object] = {
        "variant": "token",
        "index": parts.index,
        "questions": parts.questions,
        "dev": parts.questions,
        "config": parts.config,
        "out": out,
        **changes,
    }
    return ["train", *(part for name, value in options.items() for part in (f"--{name}", value))]


def test_an_unknown_variant_is_refused(rag: Rag, parts: Parts, tmp_path: Path) -> None:
    code, error = rag(*train_arguments(parts, tmp_path / "out", variant="both"))
    assert code == 2
    assert is_one_paragraph(error, "both", "sequence", "token")


def test_an_empty_question_file_is_refused(rag: Rag, parts: Parts, tmp_path: Path) -> None:
    empty = tmp_path / "empty.jsonl"
    empty.write_text("")
    code, error = rag(*train_arguments(parts, tmp_path / "out", questions=empty))
    assert code == 2
    assert is_one_paragraph(error, empty)


def test_a_training_question_without_answer_is_named(rag: Rag, parts: Parts, tmp_path: Path) -> None:
    file = tmp_path / "questions.jsonl"
    file.write_text(json.dumps({"id": "q7", "question": "who?"}) + "\n")
    code, error = rag(*train_arguments(parts, tmp_path / "out", questions=file))
    assert code == 2
    assert is_one_paragraph(error, file, "q7", "answers")


def test_regular_expressions_cannot_be_trained_on(rag: Rag, parts: Parts, tmp_path: Path) -> None:
    file = tmp_path / "questions.jsonl"
    file.write_text(json.dumps({"id": "q7", "question": "who?", "answers": ["a|b"], "answers_are": "regex"}) + "\n")
    code, error = rag(*train_arguments(parts, tmp_path / "out", questions=file))
    assert code == 2
    assert is_one_paragraph(error, f"{file} line 1", "q7", "regular expressions")


def test_pretraining_questions_without_answer_are_named(rag: Rag, parts: Parts, tmp_path: Path) -> None:
    file = tmp_path / "questions.jsonl"
    file.write_text(json.dumps({"id": "q7", "question": "who?", "gold_passage_ids": ["lyon:country"]}) + "\n")
    config = tmp_path / "run.yaml"
    config.write_text(yaml.safe_dump({"pretrain": {"encoder_layers": 1, "decoder_layers": 1, "copy_steps": 1}}))
    folders = ("--corpus", parts.folder / "corpus", "--encoder", parts.encoder, "--out", tmp_path / "out")
    code, error = rag("pretrain", *folders, "--questions", file, "--dev", parts.questions, "--config", config)
    assert code == 2
    assert is_one_paragraph(error, f"{file} line 1", "q7", "answers")


def test_a_file_without_answers_is_refused_by_evaluate(rag: Rag, parts: Parts, tmp_path: Path) -> None:
    from rag_core.evaluation.predictions import join_parts, write_part
    from rag_core.storage.artifact import publish

    row = {"id": "1", "question": "who?", "answer": "a", "log_prob": -1.0, "candidates": [], "passages": []}
    with publish(tmp_path / "predictions", "predictions") as draft:
        write_part([row], draft.folder / "part.jsonl")
        join_parts([draft.folder / "part.jsonl"], draft.folder)
    file = tmp_path / "questions.jsonl"
    file.write_text(json.dumps({"id": "1", "question": "who?", "golden": ["a"], "gold_passage_ids": ["p"]}) + "\n")
    code, error = rag("evaluate", "--predictions", tmp_path / "predictions", "--questions", file)
    assert code == 2
    assert is_one_paragraph(error, f"{file} line 1", "golden", "answers")


def test_a_misspelt_setting_names_file_section_and_field(rag: Rag, parts: Parts, tmp_path: Path) -> None:
    content = yaml.safe_load(parts.config.read_text())
    content["model"]["num_dox"] = 5
    config = tmp_path / "run.yaml"
    config.write_text(yaml.safe_dump(content))
    code, error = rag(*train_arguments(parts, tmp_path / "out", config=config))
    assert code == 2
    assert is_one_paragraph(error, config, "model", "num_dox")


def test_an_encoder_of_another_width_than_the_index_is_refused(rag: Rag, parts: Parts, tmp_path: Path) -> None:
    wide = make_encoder(tmp_path / "wide", hidden_size=64)
    arguments = [*train_arguments(parts, tmp_path / "out"), "--question-encoder", wide]
    code, error = rag(*arguments)
    assert code == 2
    assert is_one_paragraph(error, "64", "32", parts.index)


def test_more_passages_per_question_than_the_corpus_holds_are_refused(rag: Rag, parts: Parts, tmp_path: Path) -> None:
    folders = ("--model", parts.model, "--index", parts.index, "--questions", parts.questions)
    code, error = rag("infer", *folders, "--num-docs", 10, "--out", tmp_path / "out")
    assert code == 2
    assert is_one_paragraph(error, "10", "9", parts.index)


def test_k_larger_than_the_corpus_is_refused_by_retrieve(rag: Rag, parts: Parts) -> None:
    code, error = rag("retrieve", "--index", parts.index, "--questions", parts.questions, "--k", "1,50")
    assert code == 2
    assert is_one_paragraph(error, "50", "9")


def test_an_unreadable_model_folder_is_named(rag: Rag, parts: Parts, tmp_path: Path) -> None:
    folders = ("--index", parts.index, "--questions", parts.questions)
    code, error = rag("infer", "--model", tmp_path / "nothing", *folders, "--out", tmp_path / "out")
    assert code == 2
    assert is_one_paragraph(error, tmp_path / "nothing", "rag-model")


def test_a_damaged_index_is_refused_with_the_file(rag: Rag, parts: Parts, tmp_path: Path) -> None:
    import shutil

    index = tmp_path / "index"
    shutil.copytree(parts.index, index)
    content = bytearray((index / "vectors.npy").read_bytes())
    content[-1] ^= 1
    (index / "vectors.npy").write_bytes(content)
    code, error = rag("ask", "which country is Lyon in?", "--model", parts.model, "--index", index)
    assert code == 2
    assert is_one_paragraph(error, index / "vectors.npy", "SHA-256")


def test_predictions_of_other_questions_are_refused(rag: Rag, parts: Parts, tmp_path: Path) -> None:
    code, error = rag("evaluate", "--predictions", parts.index, "--questions", parts.questions)
    assert code == 2
    assert is_one_paragraph(error, parts.index, "predictions")


def test_a_malformed_list_of_k_is_refused(rag: Rag, parts: Parts) -> None:
    code, error = rag("retrieve", "--index", parts.index, "--questions", parts.questions, "--k", "1,many")
    assert code == 2
    assert is_one_paragraph(error, "1,many")


def test_a_configuration_that_is_no_yaml_is_refused(rag: Rag, tmp_path: Path) -> None:
    config = tmp_path / "run.yaml"
    config.write_text("model: [unclosed")
    code, error = rag("pipeline", "--config", config, "--out", tmp_path / "out")
    assert code == 2
    assert is_one_paragraph(error, config, "YAML")


def test_an_encoder_is_refused_as_generator(rag: Rag, parts: Parts, tmp_path: Path) -> None:
    arguments = [*train_arguments(parts, tmp_path / "out"), "--generator", parts.encoder]
    code, error = rag(*arguments)
    assert code == 2
    assert is_one_paragraph(error, parts.encoder, "is an encoder")


def test_every_command_explains_itself() -> None:
    from typer.testing import CliRunner

    from flows.cli.main import app

    commands = [
        "corpus",
        "embed",
        "index",
        "pretrain",
        "train",
        "infer",
        "evaluate",
        "pipeline",
        "demo",
        "ask",
        "retrieve",
        "import-hf",
        "export-hf",
        "doctor",
    ]
    for command in commands:
        result = CliRunner().invoke(app, [command, "--help"], env={"COLUMNS": "200"})
        assert result.exit_code == 0
        assert "Usage" in result.output
        options = [line for line in result.output.splitlines() if "│ --" in line or "│ *  --" in line]
        assert all(len(line.strip("│ ").split()) > 2 for line in options), result.output


def test_the_installed_script_prints_the_paragraph_alone(tmp_path: Path) -> None:
    script = Path(sys.executable).with_name("rag")
    arguments = [script, "ask", "who?", "--model", tmp_path / "nothing"]
    done = subprocess.run(arguments, capture_output=True, text=True, timeout=120)
    assert done.returncode == 2
    assert done.stdout == ""
    assert is_one_paragraph(done.stderr, tmp_path / "nothing")


def test_doctor_finds_nothing_missing_here(rag: Rag, capsys: pytest.CaptureFixture[str]) -> None:
    code, _ = rag("doctor")
    assert code == 0
