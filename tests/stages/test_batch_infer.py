"""A batch of questions is answered from the index, from the file's own contexts, or closed-book."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from rag_core.errors import ConfigError
from rag_core.index.passage_index import PassageIndex
from rag_core.model.rag_model import RagModel
from rag_core.model.reader import DecodingConfig
from rag_core.questions.questions import read_questions
from rag_core.storage.artifact import open_artifact
from tasks.markdown import text_cell
from tasks.on_ray.answering import InferConfig, answer_questions
from tasks.reports.summary import cut_note, stages_markdown
from tasks.results import StageResult
from tests.support.small_corpus import (
    PROMPT,
    QUESTIONS,
    make_encoder,
    make_generator,
    make_index,
    model_config,
    write_questions_jsonl,
)

CONFIG = InferConfig(
    variant="token",
    decoding=DecodingConfig(num_beams=2, max_new_tokens=4, num_return_sequences=1, precision="float32"),
)


@pytest.fixture(scope="module")
def system(tmp_path_factory: pytest.TempPathFactory) -> tuple[RagModel, PassageIndex]:
    folder = tmp_path_factory.mktemp("infer")
    encoder = make_encoder(folder / "encoder")
    model = RagModel.from_parts(model_config(encoder, make_generator(folder / "generator", encoder)))
    return model.eval(), make_index(folder, encoder)


def fid_file(folder: Path, *, scored: bool = True, bare_last: bool = False) -> Path:
    """A file with two questions: the first has two contexts of its own, the second has one."""
    contexts = [
        {"id": "x1", "title": "Lyon", "text": "Lyon is a city in Norway."},
        {"id": "x2", "title": "", "text": "About 522."},
    ]
    rows = [
        {"question": "which country is Lyon in?", "ctxs": contexts},
        {"question": "what is it?", "ctxs": contexts[1:]},
    ]
    if scored:
        for row in rows:
            row["ctxs"] = [dict(context, score=2.0 - rank) for rank, context in enumerate(row["ctxs"])]
    if bare_last:
        del rows[1]["ctxs"]
    file = folder / "fid.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def test_contexts_of_the_file_are_read_instead_of_retrieving(
    system: tuple[RagModel, PassageIndex], tmp_path: Path
) -> None:
    answers = answer_questions(*system, read_questions(fid_file(tmp_path)), CONFIG)
    assert [read.passage.text for read in answers[0].passages] == ["Lyon is a city in Norway.", "About 522."]
    assert len(answers[1].passages) == 1
    # softmax of the file's scores 2 and 1
    assert [read.prior for read in answers[0].passages] == pytest.approx([0.7310586, 0.2689414], abs=1e-6)


def test_contexts_without_scores_count_alike(system: tuple[RagModel, PassageIndex], tmp_path: Path) -> None:
    answers = answer_questions(*system, read_questions(fid_file(tmp_path, scored=False)), CONFIG)
    assert [read.prior for read in answers[0].passages] == pytest.approx([0.5, 0.5])


def test_a_file_with_contexts_for_some_questions_only_is_refused(
    system: tuple[RagModel, PassageIndex], tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match="separate files"):
        answer_questions(*system, read_questions(fid_file(tmp_path, bare_last=True)), CONFIG)


def test_closed_book_answers_read_no_passage(system: tuple[RagModel, PassageIndex], tmp_path: Path) -> None:
    questions = read_questions(fid_file(tmp_path))
    answers = answer_questions(*system, questions, CONFIG.model_copy(update={"closed_book": True}))
    assert all(read.passage.text == "" for answer in answers for read in answer.passages)


@pytest.mark.parametrize("own_contexts", [True, False])
def test_answers_are_in_the_files_order_and_the_same_however_they_are_batched(
    system: tuple[RagModel, PassageIndex], tmp_path: Path, own_contexts: bool
) -> None:
    file = fid_file(tmp_path) if own_contexts else write_questions_jsonl(tmp_path / "questions.jsonl")
    questions = read_questions(file) * 3
    config = CONFIG.model_copy(update={"decoding": CONFIG.decoding.model_copy(update={"batch_size": 3})})
    done: list[int] = []
    together = answer_questions(*system, questions, config, done.append)
    alone = [answer_questions(*system, [question], config)[0] for question in questions]
    assert sum(done) == len(questions) > max(done)
    assert [answer.text for answer in together] == [answer.text for answer in alone]
    assert [answer.log_prob for answer in together] == pytest.approx([answer.log_prob for answer in alone], abs=1e-4)
    assert [[read.passage for read in answer.passages] for answer in together] == [
        [read.passage for read in answer.passages] for answer in alone
    ]


def _result(contexts: int, cut: int) -> StageResult:
    counts = {"contexts": contexts, "contexts_cut": cut}
    return StageResult(stage="batch-infer", path=Path("x"), fingerprint="0", counts=counts, run_id="r")


def test_more_than_three_percent_of_contexts_cut_brings_the_numbers_and_the_remedy(
    capsys: pytest.CaptureFixture[str],
) -> None:
    from flows.cli.printing import print_stage

    assert cut_note(_result(100, 3)) == cut_note(_result(0, 0)) == ""
    assert cut_note(StageResult(stage="evaluate", path=Path("x"), fingerprint="0", run_id="r")) == ""
    note = cut_note(_result(2000, 80))
    assert "80 of 2,000 contexts (4%)" in note
    assert "Raise prompt.max_context_tokens" in note
    assert text_cell(note) in stages_markdown([_result(100, 3), _result(2000, 80)])
    assert "Raise" not in stages_markdown([_result(100, 3)])
    print_stage(_result(100, 3))
    assert "Raise" not in capsys.readouterr().out
    print_stage(_result(2000, 80))
    assert " ".join(capsys.readouterr().out.split()).endswith(note)


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_the_manifest_counts_the_contexts_of_all_shards_and_those_that_were_cut(services: Path, tmp_path: Path) -> None:
    from mlflow import MlflowClient

    from flows.stages.batch_infer import batch_infer

    encoder = make_encoder(tmp_path / "encoder")
    index = make_index(tmp_path / "corpus", encoder)
    short = PROMPT.model_copy(update={"max_context_tokens": 18})
    model = model_config(encoder, make_generator(tmp_path / "generator", encoder)).model_copy(update={"prompt": short})
    questions = write_questions_jsonl(tmp_path / "questions.jsonl")
    config = CONFIG.model_copy(update={"shard_questions": 3})
    result = batch_infer(model, index.path, questions, tmp_path / "out", config)
    rows = [json.loads(line) for line in (tmp_path / "out" / "predictions.jsonl").read_text().splitlines()]
    tokenizer = RagModel.from_parts(model).generator_tokenizer
    lengths = [
        len(tokenizer(f"{passage['text']} // {row['question']}")["input_ids"])
        for row in rows
        for passage in row["passages"]
    ]
    expected_cut = sum(length > 18 for length in lengths)
    assert 0 < expected_cut < len(lengths)
    counts = {"questions": len(QUESTIONS), "contexts": 3 * len(QUESTIONS), "contexts_cut": expected_cut}
    assert result.counts == open_artifact(tmp_path / "out", "predictions").counts == counts
    metrics = MlflowClient().get_run(result.run_id).data.metrics
    assert metrics["contexts_cut_share"] == pytest.approx(expected_cut / len(lengths))
    assert metrics["count_contexts_cut"] == expected_cut
