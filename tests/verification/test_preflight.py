"""All problems of a run are reported together before its first stage, and nothing is written."""

from __future__ import annotations

import copy
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml
from transformers import DPRConfig, DPRContextEncoder, DPRQuestionEncoder

from rag_core.errors import RagError
from rag_core.verification.preflight import Problems, check_place
from tests.cli.test_errors import Rag, is_one_paragraph, rag
from tests.support.small_corpus import (
    PROMPT,
    QUESTIONS,
    make_encoder,
    make_generator,
    make_index,
    model_config,
    write_passages_jsonl,
    write_questions_jsonl,
)

__all__ = ["rag"]

Settings = dict[str, Any]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Models and files of a small run, and unusable ones."""
    folder = tmp_path_factory.mktemp("preflight")
    make_encoder(folder / "encoder")
    make_encoder(folder / "wide", hidden_size=64)
    make_generator(folder / "generator", folder / "encoder")
    write_passages_jsonl(folder / "passages.jsonl")
    write_questions_jsonl(folder / "questions.jsonl")
    (folder / "unanswered.jsonl").write_text('{"question": "who?"}\n')
    (folder / "broken.jsonl").write_text('{"question": "who?"\n')
    (folder / "nothing.jsonl").write_text("")
    (folder / "no-gold.jsonl").write_text('{"question": "who?", "answers": ["she"]}\n')
    second = {"question": "who?", "answers": ["x"], "gold_passage_ids": ["rome", QUESTIONS[0][2]]}
    (folder / "second-gold.jsonl").write_text(json.dumps(second) + "\n")
    (folder / "other-gold.jsonl").write_text('{"question": "who?", "answers": ["x"], "gold_passage_ids": ["rome"]}\n')
    (folder / "long.jsonl").write_text(json.dumps({"question": "lyon " * 60, "answers": ["she"]}) + "\n")
    (folder / "no-words").mkdir()
    shutil.copytree(folder / "encoder", folder / "no-words", dirs_exist_ok=True)
    for name in ("vocab.txt", "tokenizer.json"):
        (folder / "no-words" / name).unlink(missing_ok=True)
    shutil.copytree(folder / "encoder", folder / "no-weights")
    (folder / "no-weights" / "model.safetensors").unlink()
    shape = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 1, "intermediate_size": 8}
    vocab_size = json.loads((folder / "encoder" / "config.json").read_text())["vocab_size"]
    for name, model_class in (("dpr-question", DPRQuestionEncoder), ("dpr-context", DPRContextEncoder)):
        shutil.copytree(folder / "encoder", folder / name)
        (folder / name / "text_encoder.json").unlink()
        model_class(DPRConfig(vocab_size=vocab_size, max_position_embeddings=64, **shape)).save_pretrained(
            folder / name
        )
    return folder


@pytest.fixture
def settings(folder: Path) -> Settings:
    """A correct run."""
    optimizer = {"steps": 2, "batch_size": 4}
    model = model_config(folder / "encoder", folder / "generator").model_dump(mode="json")
    return {
        "sources": [str(folder / "passages.jsonl")],
        "corpus": {"format": "jsonl"},
        "questions": dict.fromkeys(("train", "dev", "test"), str(folder / "questions.jsonl")),
        "embed": {"encoder": str(folder / "encoder")},
        "model": {name: value for name, value in model.items() if value is not None},
        "train": {"optimizer": optimizer, "num_workers": 1},
        "infer": {"decoding": {"num_beams": 1, "max_new_tokens": 4}},
    }


def pretrain(folder: Path) -> Settings:
    """A correct section `pretrain`."""
    prompt = PROMPT.model_dump(mode="json")
    layers = {"encoder_layers": 1, "decoder_layers": 1}
    optimizer = {"steps": 4, "batch_size": 4}
    return {"encoder": str(folder / "encoder"), "copy_steps": 2, "prompt": prompt, "optimizer": optimizer, **layers}


def check(settings: Settings, out: Path) -> Any:
    from flows.config import PipelineConfig
    from flows.preflight import checked

    return checked(PipelineConfig.model_validate(settings), out)


def with_change(settings: Settings, path: str, value: Any) -> Settings:
    """The settings with the one at this dotted path replaced."""
    changed = copy.deepcopy(settings)
    *parents, name = path.split(".")
    place = changed
    for parent in parents:
        place = place.setdefault(parent, {})
    place[name] = value
    return changed


def test_a_correct_run_goes_on_with_pinned_names(
    settings: Settings, folder: Path, tmp_path: Path, services: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(folder)
    relative = with_change(settings, "embed.encoder", "encoder")
    config = check(relative, tmp_path / "out")
    assert config.embed.encoder == "encoder", "a folder is recorded as it was named"
    assert check(settings | {"pretrain": pretrain(folder)}, tmp_path / "out").pretrain is not None
    assert list(tmp_path.iterdir()) == [], "the check left something behind"


@pytest.mark.parametrize(
    ("path", "value", "words"),
    [
        ("sources", ["{folder}/missing.jsonl"], "missing.jsonl does not exist"),
        ("sources", ["{folder}/questions.jsonl"], "They look like those of questions"),
        ("corpus.format", "parquet", "passages.jsonl"),
        ("questions.train", "{folder}/missing.jsonl", "missing.jsonl cannot be read"),
        ("questions.train", "{folder}/unanswered.jsonl", "so it cannot be trained on"),
        ("questions.train", "{folder}/long.jsonl", "tokens without any passage, but max_context_tokens is 48"),
        ("questions.dev", "{folder}/nothing.jsonl", "nothing.jsonl is empty"),
        ("questions.dev", "{folder}/unanswered.jsonl", "so it cannot be evaluated"),
        ("questions.test", "{folder}/broken.jsonl", "broken JSON"),
        ("questions.test", "{folder}/unanswered.jsonl", "so it cannot be evaluated"),
        ("embed.encoder", "{folder}/missing", "There is no model folder"),
        ("embed.encoder", "{folder}/generator", "a text encoder such as BERT"),
        ("embed.encoder", "{folder}/no-words", "has no tokenizer"),
        ("embed.encoder", "{folder}/no-weights", "cannot be loaded"),
        ("model.question_encoder", "{folder}/wide", "of 32 dimensions, the question encoder of 64"),
        ("model.pooling", "dpr", "pooling 'dpr' does not go"),
        ("model.generator", "{folder}/missing", "There is no model folder"),
        ("model.generator", "{folder}/encoder", "is an encoder (bert)"),
        ("model.prompt.template", "chat", "has no chat template, as those of base models"),
        ("model.prompt.max_context_tokens", 65, "Set prompt.max_context_tokens to at most 64"),
        ("model.prompt.max_answer_tokens", 65, "Set prompt.max_answer_tokens to at most 64"),
        ("infer.decoding.max_new_tokens", 65, "Set max_new_tokens to at most 64"),
        ("index.factory", "NOPE7", "does not accept the factory string 'NOPE7'"),
        ("index.factory", "PQ7", "does not accept the factory string 'PQ7' for 32 dimensions"),
        ("train.optimizer.batch_size", 3, None),
        ("train.optimizer.accumulation", 3, "batch_size 4 cannot be divided into 1 workers × 3"),
        ("train.num_workers", 3, "batch_size 4 cannot be divided into 3 workers × 1"),
        ("train.rates", {"question_encoder": 0, "generator": 0}, "every learning rate is 0"),
        ("train.lora", {"targets": ["q_proj"]}, "'q_proj' matches no layer"),
        ("train.lora", {"rank": 2}, None),
        ("model.generator_dtype", "bfloat16", "model.generator_dtype is bfloat16, but train.lora is not set"),
        ("infer.retrieval", {"mode": "sharded", "resources": {"shelf": 1}}, "infer.retrieval.resources asks for shelf"),
    ],
)
def test_each_wrong_value_is_reported_before_the_first_stage(
    settings: Settings, folder: Path, tmp_path: Path, services: Path, path: str, value: Any, words: str | None
) -> None:
    filled = json.loads(json.dumps(value).replace("{folder}", str(folder)))
    changed = with_change(settings, path, filled)
    if words is None:
        check(changed, tmp_path / "out")
        return
    with pytest.raises(RagError) as raised:
        check(changed, tmp_path / "out")
    assert words in str(raised.value), raised.value
    assert "\n" not in str(raised.value), f"one problem is one paragraph: {raised.value}"


@pytest.mark.parametrize(
    ("path", "value", "words"),
    [
        ("questions.train", "{folder}/no-gold.jsonl", "no question names both a gold passage"),
        ("questions.dev", "{folder}/no-gold.jsonl", "and an answer, so no weights can be chosen"),
        ("pretrain.encoder", "{folder}/generator", "a generator can only be made from a BERT"),
        ("pretrain.encoder_layers", 9, "has 2 layers, but the settings keep 9"),
        ("pretrain.prompt.max_context_tokens", 65, "Set prompt.max_context_tokens to at most 64"),
        ("model.prompt.max_context_tokens", 65, "Set prompt.max_context_tokens to at most 64"),
        ("pretrain.copy_steps", 4, "copy_steps is 4 of 4 steps"),
        ("pretrain.optimizer.accumulation", 3, "batch_size 4 cannot be divided"),
    ],
)
def test_each_wrong_value_of_pretraining_is_reported_before_the_first_stage(
    settings: Settings, folder: Path, tmp_path: Path, services: Path, path: str, value: Any, words: str
) -> None:
    filled = json.loads(json.dumps(value).replace("{folder}", str(folder)))
    # The run makes the generator, so the path in the configuration need not exist yet.
    settings["model"]["generator"] = str(folder / "made-by-the-run")
    changed = with_change(settings | {"pretrain": pretrain(folder)}, path, filled)
    with pytest.raises(RagError) as raised:
        check(changed, tmp_path / "out")
    assert words in str(raised.value), raised.value


def test_swapped_dpr_encoders_are_reported(settings: Settings, folder: Path, tmp_path: Path, services: Path) -> None:
    for documents, questions in (("context", "question"), ("question", "context")):
        changed = with_change(settings, "embed.encoder", str(folder / f"dpr-{documents}"))
        changed = with_change(changed, "model.question_encoder", str(folder / f"dpr-{questions}"))
        if documents == "context":
            check(changed, tmp_path / "out")
            continue
        with pytest.raises(RagError, match="they are swapped"):
            check(changed, tmp_path / "out")


def test_all_problems_are_reported_at_once_with_exit_code_2_and_without_a_run(
    rag: Rag, settings: Settings, folder: Path, tmp_path: Path
) -> None:
    import mlflow

    settings["embed"]["encoder"] = settings["model"]["question_encoder"] = str(folder / "missing")
    settings["model"]["generator"] = str(folder / "encoder")
    settings["questions"]["dev"] = str(folder / "nothing.jsonl")
    settings["train"]["num_workers"] = 3
    settings["name"] = "never-started"
    config = tmp_path / "run.yaml"
    config.write_text(yaml.safe_dump(settings))
    code, error = rag("pipeline", "--config", config, "--out", tmp_path / "out")
    flat = " ".join(error.split())
    assert code == 2
    assert "Traceback" not in error
    assert "4 problems were found before the first stage, so nothing was started." in flat
    for number, words in enumerate(
        (
            f"embed.encoder, model.question_encoder: There is no model folder {folder}/missing",
            f"questions.dev: {folder}/nothing.jsonl is empty",
            f"model.generator: {folder}/encoder is an encoder (bert)",
            "train.optimizer: batch_size 4 cannot be divided",
        ),
        1,
    ):
        assert f"{number}. {words}" in flat
    assert not (tmp_path / "out").exists()
    runs = mlflow.search_runs(search_all_experiments=True, filter_string="attributes.run_name = 'never-started'")
    assert len(runs) == 0


@pytest.mark.parametrize("values", [[], [0], [1, -5]])
def test_no_k_or_a_k_below_1_is_refused(rag: Rag, settings: Settings, tmp_path: Path, values: list[int]) -> None:
    config = tmp_path / "run.yaml"
    config.write_text(yaml.safe_dump(settings | {"ks": values}))
    code, error = rag("pipeline", "--config", config, "--out", tmp_path / "out")
    assert code == 2
    assert is_one_paragraph(error, config, "ks")


@pytest.mark.parametrize("section", ["train.optimizer", "index"])
def test_a_negative_seed_is_refused(rag: Rag, settings: Settings, tmp_path: Path, section: str) -> None:
    config = tmp_path / "run.yaml"
    config.write_text(yaml.safe_dump(with_change(settings, f"{section}.seed", -1)))
    code, error = rag("pipeline", "--config", config, "--out", tmp_path / "out")
    assert code == 2
    assert is_one_paragraph(error, config, f"{section}.seed")


@pytest.mark.parametrize(
    ("path", "value", "words"),
    [
        ("model.num_docs", 10, "model.num_docs is 10, but there are 9 passages"),
        ("infer.num_docs", 10, "infer.num_docs is 10, but there are 9 passages"),
        ("index.shards", 10, "index.shards is 10, but there are 9 passages"),
        ("index.factory", "IVF16,Flat", "has 16 lists, but a shard has 9 passages"),
        ("questions.train", "{folder}/other-gold.jsonl", "none of its gold passages ('rome', …) is in the corpus"),
        ("questions.dev", "{folder}/other-gold.jsonl", "so no weights can be chosen"),
    ],
)
def test_a_corpus_that_is_too_small_or_lacks_gold_passages_is_reported_before_it_is_embedded(
    settings: Settings, folder: Path, tmp_path: Path, services: Path, path: str, value: Any, words: str
) -> None:
    from flows.config import PipelineConfig
    from flows.preflight import check_corpus

    make_index(tmp_path, folder / "encoder")
    filled = json.loads(json.dumps(value).replace("{folder}", str(folder)))
    whole = settings | {"pretrain": pretrain(folder)}
    check_corpus(PipelineConfig.model_validate(whole), tmp_path / "corpus")
    # One gold passage in the corpus is enough, even if it is not the first of its question.
    some = with_change(whole, "questions.train", str(folder / "second-gold.jsonl"))
    check_corpus(PipelineConfig.model_validate(some), tmp_path / "corpus")
    with pytest.raises(RagError) as raised:
        check_corpus(PipelineConfig.model_validate(with_change(whole, path, filled)), tmp_path / "corpus")
    assert words in str(raised.value), raised.value


# Places


@pytest.mark.parametrize("name", ["embeddings", "rag-token", "predictions/rag-sequence"])
def test_a_stages_folder_with_foreign_files_is_left_alone(
    settings: Settings, tmp_path: Path, services: Path, name: str
) -> None:
    (tmp_path / name).mkdir(parents=True)
    (tmp_path / name / "thesis.txt").write_text("ten years of work")
    with pytest.raises(RagError, match=rf"{name} already holds files and no"):
        check(settings, tmp_path)
    assert (tmp_path / name / "thesis.txt").read_text() == "ten years of work"


def test_a_file_in_place_of_a_folder_is_reported(settings: Settings, tmp_path: Path, services: Path) -> None:
    (tmp_path / "out").write_text("")
    with pytest.raises(RagError, match=r"out is a file, so .* cannot be made below it"):
        check(settings, tmp_path / "out")


@pytest.mark.parametrize("place", ["/proc/rag/index", "/sys/rag/index"])  # not writable even for root
def test_a_place_that_cannot_be_written_is_reported(place: str) -> None:
    with pytest.raises(RagError, match=f"{place} cannot be written: "):
        check_place(Path(place))


# The list


def test_a_problem_of_two_parts_is_listed_once_and_a_single_problem_keeps_its_class() -> None:
    from rag_core.errors import ArtifactError

    def fail(message: str) -> None:
        raise ArtifactError(message)

    problems = Problems()
    for part in ("a", "b", "a"):
        with problems.of(part):
            fail("one")
    with pytest.raises(ArtifactError, match=r"^one$"):
        problems.raise_any("early")
    with problems.of("c"):
        fail("two")
    with pytest.raises(RagError, match=r"^2 problems were found early\.\n1\. a, b: one\n2\. c: two$"):
        problems.raise_any("early")
    Problems().raise_any("early")


# Stages by themselves


def test_training_reports_all_its_problems(rag: Rag, settings: Settings, folder: Path, tmp_path: Path) -> None:
    make_index(tmp_path, folder / "encoder")
    changed = with_change(settings, "model.num_docs", 10)
    changed = with_change(changed, "model.prompt.max_context_tokens", 65)
    changed = with_change(changed, "train.optimizer.accumulation", 3)
    config = tmp_path / "run.yaml"
    config.write_text(yaml.safe_dump({name: changed[name] for name in ("model", "train")}))
    files = ("--questions", folder / "unanswered.jsonl", "--dev", folder / "nothing.jsonl")
    arguments = ("--variant", "token", "--index", tmp_path / "index", *files, "--config", config)
    code, error = rag("train", *arguments, "--out", tmp_path / "out")
    flat = " ".join(error.split())
    assert code == 2
    assert "5 problems were found before training, so it was not started." in flat
    for words in (
        "10 passages per question",
        "max_context_tokens",
        "cannot be trained on",
        "is empty",
        "cannot be divided",
    ):
        assert words in flat


def test_inference_refuses_answers_longer_than_the_positions_before_it_starts(
    rag: Rag, folder: Path, tmp_path: Path
) -> None:
    from rag_core.model.rag_model import RagModel

    make_index(tmp_path, folder / "encoder")
    model = RagModel.from_parts(model_config(folder / "encoder", folder / "generator"))
    model.settings.variant = "token"
    model.save_pretrained(tmp_path / "model")
    parts = ("--model", tmp_path / "model", "--index", tmp_path / "index")
    questions = ("--questions", folder / "questions.jsonl", "--max-new-tokens", 65)
    code, error = rag("infer", *parts, *questions, "--out", tmp_path / "out")
    assert code == 2
    assert is_one_paragraph(error, "max_new_tokens", "65", "64")
