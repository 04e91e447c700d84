"""The whole pipeline on a small corpus, with real Ray, Prefect and MLflow; a second run skips every stage."""

from __future__ import annotations

import json
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from rag_core.corpus.corpus import Corpus, CorpusConfig
from rag_core.embeddings.embeddings import EmbedConfig, Embeddings
from rag_core.errors import ArtifactError
from rag_core.index.passage_index import PassageIndex
from rag_core.model.rag_model import RagModel
from rag_core.model.reader import DecodingConfig
from rag_core.storage.artifact import open_artifact
from rag_core.training.pretraining import PretrainConfig
from tests.support.small_corpus import (
    FACTS,
    PROMPT,
    QUESTIONS,
    make_encoder,
    model_config,
    optimizer,
    write_passages_jsonl,
    write_questions_jsonl,
)

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]


def _dev_questions(questions: Path) -> Path:
    """Seven questions, which two workers cannot share evenly, mixed with three unanswerable ones."""
    rows = [json.loads(line) for line in questions.read_text().splitlines()][:7]
    for place in (0, 3, 8):
        rows.insert(place, {"id": f"none-{place}", "question": "who rules Lyon?", "answers": [], "is_impossible": True})
    file = questions.with_name("dev.jsonl")
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


@pytest.fixture(scope="module")
def ran(services: Path, tmp_path_factory: pytest.TempPathFactory):  # type: ignore[no-untyped-def]
    """A finished pipeline: its configuration, its folder and its result."""
    from flows.config import PipelineConfig, QuestionFiles
    from flows.pipeline import pipeline
    from tasks.on_ray.answering import InferConfig
    from tasks.stages.train import TrainConfig

    folder = tmp_path_factory.mktemp("pipeline")
    encoder = make_encoder(folder / "encoder")
    questions = write_questions_jsonl(folder / "questions.jsonl")
    config = PipelineConfig(
        name="small",
        sources=[write_passages_jsonl(folder / "passages.jsonl")],
        corpus=CorpusConfig(format="jsonl", shard_rows=4),
        questions=QuestionFiles(train=questions, dev=_dev_questions(questions), test=questions),
        embed=EmbedConfig(encoder=str(encoder)),
        pretrain=PretrainConfig(
            encoder=str(encoder),
            encoder_layers=2,
            decoder_layers=1,
            copy_steps=2,
            prompt=PROMPT,
            optimizer=optimizer(4),
        ),
        model=model_config(encoder, folder / "made-by-the-pipeline"),
        # Two data-parallel workers, so that processes really exchange gradients.
        train=TrainConfig(optimizer=optimizer(4, eval_every=2), eval_questions=8, num_workers=2),
        infer=InferConfig(
            decoding=DecodingConfig(num_beams=2, max_new_tokens=6, num_return_sequences=2, precision="float32"),
            shard_questions=3,
        ),
        baselines=True,
        ks=[1, 3],
    )
    return config, folder / "out", pipeline(config, folder / "out")


def test_every_stage_leaves_a_checked_artifact(ran) -> None:  # type: ignore[no-untyped-def]
    _, out, result = ran
    kinds = {
        "corpus": "corpus",
        "embeddings": "embeddings",
        "index": "index",
        "generator": "generator",
        "rag-sequence": "rag-model",
        "rag-token": "rag-model",
        "predictions/untrained": "predictions",
        "predictions/rag-sequence": "predictions",
        "predictions/rag-token": "predictions",
        "predictions/closed-book": "predictions",
    }
    for name, kind in kinds.items():
        assert open_artifact(out / name, kind).counts
    assert not any(stage.skipped for stage in result.stages)
    assert not list(out.glob(".*draft*")) + list(out.glob(".*training*")), "work folders were left behind"


def test_embedding_shards_on_ray_follow_the_corpus_row_for_row(ran) -> None:  # type: ignore[no-untyped-def]
    config, out, _ = ran
    from rag_core.embeddings.text_encoder import TextEncoder, passage_text

    corpus, embeddings = Corpus.open(out / "corpus"), Embeddings.open(out / "embeddings")
    assert [shard.name for shard in embeddings.shards] == [f"embeddings-0000{number}.parquet" for number in range(3)]
    encoder = TextEncoder.from_pretrained(config.embed.encoder)
    passages = list(corpus.iter_passages())
    expected_ND = encoder.encode([passage_text(passage.title, passage.text, encoder.settings) for passage in passages])
    row = 0
    for ids, vectors_nD in embeddings.iter_vectors():
        assert ids == [passage.id for passage in passages[row : row + len(ids)]]
        assert abs(vectors_nD - expected_ND[row : row + len(ids)]).max() < 1e-5
        row += len(ids)
    assert row == len(FACTS)


def test_predictions_keep_the_order_of_the_file_in_both_formats(ran) -> None:  # type: ignore[no-untyped-def]
    _, out, _ = ran
    for system in ("rag-sequence", "rag-token"):
        folder = out / "predictions" / system
        rows = [json.loads(line) for line in (folder / "predictions.jsonl").read_text().splitlines()]
        assert [row["question"] for row in rows] == [question for question, *_ in QUESTIONS]
        assert set(rows[0]) == {"id", "question", "answer", "log_prob", "candidates", "passages"}
        assert pq.read_table(folder / "predictions.parquet").to_pylist() == rows
        for row in rows:
            assert len(row["passages"]) == 3
            assert sum(passage["prior"] for passage in row["passages"]) == pytest.approx(1, abs=1e-5)
            assert row["candidates"][0] == {"answer": row["answer"], "log_prob": row["log_prob"]}
            assert row["log_prob"] <= 0


def test_batch_inference_on_ray_answers_as_the_library_does(ran) -> None:  # type: ignore[no-untyped-def]
    config, out, _ = ran
    model, index = RagModel.from_pretrained(out / "rag-token"), PassageIndex.open(out / "index")
    answers = model.answer([question for question, *_ in QUESTIONS], index, decoding=config.infer.decoding)
    rows = [json.loads(line) for line in (out / "predictions/rag-token/predictions.jsonl").read_text().splitlines()]
    assert [answer.text for answer in answers] == [row["answer"] for row in rows]
    assert [answer.log_prob for answer in answers] == pytest.approx([row["log_prob"] for row in rows], abs=1e-4)


def test_training_on_two_workers_changes_both_parts(ran) -> None:  # type: ignore[no-untyped-def]
    config, out, _ = ran
    start = RagModel.from_parts(config.model.model_copy(update={"generator": str(out / "generator")}))
    for variant in ("sequence", "token"):
        trained = RagModel.from_pretrained(out / f"rag-{variant}")
        assert trained.settings.variant == variant
        assert trained.settings.score_scale == config.model.score_scale
        assert trained.question_encoder.fingerprint() != start.question_encoder.fingerprint()
        assert trained.fingerprint() != start.fingerprint()


def test_dev_scores_of_two_workers_are_those_of_one_and_leave_out_unanswerable_questions(ran) -> None:  # type: ignore[no-untyped-def]
    from mlflow import MlflowClient

    from rag_core.questions.questions import read_questions
    from rag_core.training.objectives import EndToEnd
    from tasks.stages.train import dev_scores

    config, out, result = ran
    run = next(stage.run_id for stage in result.stages if stage.stage == "train-token")
    metrics = MlflowClient().get_run(run).data.metrics
    assert (metrics["dev_questions"], metrics["dev_unanswerable"], metrics["train_unanswerable"]) == (7, 3, 0)
    model, index = RagModel.from_pretrained(out / "rag-token"), PassageIndex.open(out / "index")
    objective = EndToEnd(model, index, "token", config.train.rates).eval()
    dev = [question for question in read_questions(config.questions.dev) if question.answers]
    alone = dev_scores(model, objective, index, dev, "token", config.train)
    assert set(alone) == {"dev_nll", "dev_em", "dev_f1", "dev_recall@1", "dev_recall@3", "dev_contexts_cut_share"}
    for name, value in alone.items():
        assert metrics[f"best_{name.replace('@', '_at_')}"] == pytest.approx(value, rel=1e-3, abs=1e-6), name


def test_closed_book_answers_have_no_recall_anywhere(ran) -> None:  # type: ignore[no-untyped-def]
    from mlflow import MlflowClient

    _, _, result = ran
    run = next(stage.run_id for stage in result.stages if stage.stage == "evaluate closed-book")
    assert not [name for name in MlflowClient().get_run(run).data.metrics if "recall" in name]
    assert set(result.scores["closed-book"].overall.means) == {"em", "f1"}
    assert "recall_at_1" in next(stage for stage in result.stages if stage.stage == "evaluate RAG-Token").metrics


def test_mlflow_shows_one_parent_with_a_child_for_every_stage(ran) -> None:  # type: ignore[no-untyped-def]
    from mlflow import MlflowClient

    _, _, result = ran
    client = MlflowClient()
    parent = client.get_run(result.run_id)
    assert parent.info.status == "FINISHED"
    children = client.search_runs(
        [parent.info.experiment_id], f"tags.mlflow.parentRunId = '{result.run_id}'", max_results=100
    )
    assert {run.info.run_name for run in children} == {stage.stage for stage in result.stages}
    assert len(children) == len(result.stages), "workers opened runs of their own"
    assert {run.info.status for run in children} == {"FINISHED"}
    by_name = {run.info.run_name: run for run in children}
    training = by_name["train-token"]
    curve = client.get_metric_history(training.info.run_id, "train_nll")
    assert [point.step for point in curve] == [1, 2, 3, 4]
    assert len(client.get_metric_history(training.info.run_id, "dev_em")) == 2
    assert training.data.params["train.optimizer.steps"] == "4"
    names = {entry.dataset.name for entry in training.inputs.dataset_inputs}
    assert names == {"index", "questions", "dev"}
    plots = {file.path for file in client.list_artifacts(training.info.run_id, "plots")}
    assert plots == {"plots/loss.png", "plots/dev_scores.png"}
    index_plots = {file.path for file in client.list_artifacts(by_name["build-index"].info.run_id, "plots")}
    assert index_plots == {"plots/index_recall_against_latency.png"}
    assert "recall_at_1" in by_name["evaluate RAG-Token"].data.metrics


def test_both_variants_are_registered_with_a_signature_and_answer(ran) -> None:  # type: ignore[no-untyped-def]
    import mlflow
    import pandas as pd
    from mlflow import MlflowClient

    _, out, result = ran
    run_ids = {stage.stage: stage.run_id for stage in result.stages}
    for variant in ("sequence", "token"):
        versions = MlflowClient().search_model_versions(f"run_id = '{run_ids[f'train-{variant}']}'")
        assert [version.name for version in versions] == [f"rag-{variant}"]
        loaded = mlflow.pyfunc.load_model(f"models:/rag-{variant}/{versions[0].version}")
        assert loaded.metadata.signature.inputs.input_names() == ["question"]
        assert loaded.metadata.signature.outputs.input_names() == ["answer", "log_prob"]
    questions = pd.DataFrame({"question": [question for question, *_ in QUESTIONS[:2]]})
    answers = loaded.predict(questions)
    library = RagModel.from_pretrained(out / "rag-token").answer(
        list(questions["question"]), PassageIndex.open(out / "index")
    )
    assert list(answers["answer"]) == [answer.text for answer in library]


def test_prefect_shows_the_flow_runs_with_readable_summaries(ran) -> None:  # type: ignore[no-untyped-def]
    from prefect.client.orchestration import get_client
    from prefect.client.schemas.filters import ArtifactFilter

    with get_client(sync_client=True) as client:
        names = {flow.name for flow in client.read_flows()}
        assert {"pipeline", "corpus", "embed-corpus", "build-index", "train-sequence", "train-token"} <= names
        artifacts = client.read_artifacts(artifact_filter=ArtifactFilter())
    summaries = {artifact.key: str(artifact.data) for artifact in artifacts}
    assert "MLflow run" in summaries["train-token"]
    assert "| RAG-Token |" in summaries["pipeline-summary"]


def test_a_second_run_skips_every_stage_even_under_other_names(ran, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    import shutil

    from flows.pipeline import pipeline

    config, out, first = ran
    # Same contents under other names: the cache is keyed on content.
    source = Path(shutil.copy(config.sources[0], tmp_path / "renamed.jsonl"))
    again = pipeline(config.model_copy(update={"sources": [source]}), out)
    work = [stage for stage in again.stages if not stage.stage.startswith("evaluate")]
    assert all(stage.skipped for stage in work), [stage.stage for stage in work if not stage.skipped]
    assert again.scores == first.scores


def test_a_changed_source_runs_the_stages_that_depend_on_it(ran, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    from flows.stages.make_corpus import make_corpus

    config, _, _ = ran
    source = write_passages_jsonl(tmp_path / "passages.jsonl")
    first = make_corpus([source], tmp_path / "corpus", config.corpus)
    source.write_text(source.read_text().replace("France", "Gaul"))
    second = make_corpus([source], tmp_path / "corpus", config.corpus)
    assert not second.skipped
    assert second.fingerprint != first.fingerprint


def test_the_command_line_answers_and_scores_from_the_pipelines_folders(ran, capsys, monkeypatch) -> None:  # type: ignore[no-untyped-def]
    import sys

    from flows.cli.main import run

    config, out, result = ran

    def rag(*arguments: object) -> str:
        monkeypatch.setattr(sys, "argv", ["rag", *map(str, arguments)])
        with pytest.raises(SystemExit) as ended:
            run()
        captured = capsys.readouterr()
        assert ended.value.code == 0, captured.err
        return str(captured.out)

    row = json.loads(rag("ask", QUESTIONS[0][0], "--model", out / "rag-token", "--index", out / "index", "--json"))
    assert len(row["passages"]) == 3
    questions = config.questions.test
    scores = json.loads(rag("retrieve", "--index", out / "index", "--questions", questions, "--k", "1,5", "--json"))
    assert 0 <= scores["recall@1"] <= scores["recall@5"] <= 1
    predictions = out / "predictions" / "rag-token"
    scores = json.loads(rag("evaluate", "--predictions", predictions, "--questions", questions, "--k", "1,3", "--json"))
    assert scores == result.scores["RAG-Token"].as_json()
    table = rag("evaluate", "--predictions", predictions, "--questions", questions, "--match", "characters")
    assert "Answers compared by characters." in table


def test_verify_finds_nothing_wrong_with_what_the_pipeline_made(ran) -> None:  # type: ignore[no-untyped-def]
    _, out, _ = ran
    from rag_core.verification.verification import artifacts_below, verify

    reports = [verify(path) for path in artifacts_below(out)]
    assert [problem for report in reports for problem in (*report.findings, *report.notes)] == []
    kinds = {report.manifest.kind for report in reports if report.manifest}
    assert kinds == {"corpus", "embeddings", "index", "generator", "rag-model", "predictions"}


def test_damaged_files_of_every_stage_are_made_again_byte_for_byte(ran) -> None:  # type: ignore[no-untyped-def]
    _, out, _ = ran
    from rag_core.verification.repair import repair

    for name in (
        "corpus/passages-00001.parquet",
        "embeddings/embeddings-00001.parquet",
        "index/index.faiss",
        "predictions/rag-token/predictions.parquet",
        "predictions/rag-token/predictions.jsonl",
    ):
        file = out / name
        whole = file.read_bytes()
        file.write_bytes(whole[:-1])
        assert repair(file.parent) == [file.name]
        assert file.read_bytes() == whole


def test_parts_that_workers_wrote_out_of_sight_are_an_error_and_not_a_shorter_artifact(  # type: ignore[no-untyped-def]
    ran, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    from flows.stages.batch_infer import batch_infer
    from flows.stages.embed_corpus import embed_corpus
    from rag_core.reading.contexts import ContextCount

    config, out, _ = ran
    monkeypatch.setattr("tasks.stages.embed_corpus.embed_on_ray", lambda corpus, folder, config: len(corpus))
    with pytest.raises(ArtifactError, match=r"3 of 3 finished parts .* every machine mounts"):
        embed_corpus(out / "corpus", tmp_path / "embeddings", config.embed)
    monkeypatch.setattr("tasks.stages.batch_infer.answer_on_ray", lambda *arguments: ContextCount())
    with pytest.raises(ArtifactError, match=r"3 of 3 finished parts .* every machine mounts"):
        batch_infer(out / "rag-token", out / "index", config.questions.test, tmp_path / "predictions", config.infer)
