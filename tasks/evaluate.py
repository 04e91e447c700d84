"""Stage 6: how good answers and retrieval are, in MLflow, in a Prefect table, and as a JSON-like result."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path

from prefect import task

from rag_core.artefacts.artefact import fingerprint_of_files, open_artefact
from rag_core.artefacts.places import as_place
from rag_core.evaluation import Scores, evaluate_predictions
from rag_core.predictions import KIND as PREDICTIONS
from rag_core.question_checks import check_answers
from rag_core.questions import AnswersAre, files_of_questions, read_question_file
from tasks.plots import recall_curve, scores_by_type
from tasks.results import StageResult
from tasks.retries import STAGE_RETRIES
from tasks.stage import publish_table
from tasks.tracking import open_run, run_link


@task(name="evaluate", **STAGE_RETRIES)
def evaluate(
    predictions: Path,
    questions: Path,
    ks: Sequence[int] = (1, 5),
    parent_run_id: str | None = None,
    stage: str = "evaluate",
    answers_are: AnswersAre | None = None,
) -> tuple[StageResult, dict[str, Scores]]:
    """EM, F1 and recall@k, overall and by question type. It is quick and writes no artefact, so it always runs."""
    started = time.monotonic()
    manifest = open_artefact(predictions, PREDICTIONS)
    file = read_question_file(questions, answers_are)
    check_answers(file)
    with open_run(stage, parent_run_id) as run:
        run.log_input("predictions", predictions, manifest.fingerprint)
        run.log_input("questions", questions, fingerprint_of_files(files_of_questions(questions)))
        scores = evaluate_predictions(predictions, file.questions, ks)
        run.log_metrics(scores["overall"])
        for kind, values in scores.items():
            if kind != "overall":
                run.log_metrics({f"{kind}/{name}": value for name, value in values.items()})
        run.log_dict(scores, "scores.json")
        for name in ("em", "recall@1"):
            run.log_figure(scores_by_type(scores, name), f"{name.replace('@', '_at_')}_by_type.png")
        run.log_figure(recall_curve(scores["overall"]), "recall_at_k.png")
        seconds = time.monotonic() - started
        run.log_metrics({"seconds": seconds})
        rows = {"MLflow run": run_link(run)} | {name: f"{value:.3f}" for name, value in scores["overall"].items()}
        publish_table(stage, rows)
        result = StageResult(
            stage=stage,
            path=as_place(predictions).resolve(),
            fingerprint=manifest.fingerprint,
            metrics=run.metrics,
            run_id=run.run_id,
            seconds=seconds,
        )
    return result, scores
