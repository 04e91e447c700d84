"""Stage 6: scores answers and retrieval; the scores go to MLflow, to a Prefect table and to the caller."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path

from prefect import task

from rag_core.evaluation.evaluation import evaluate_predictions, spaceless_hint
from rag_core.evaluation.metrics import Match
from rag_core.evaluation.predictions import KIND as PREDICTIONS
from rag_core.evaluation.scores import Evaluation
from rag_core.questions.questions import AnswersAre, files_of_questions, read_question_file
from rag_core.storage.artifact import fingerprint_of_files, open_artifact
from rag_core.storage.places import as_place
from rag_core.verification.question_checks import check_answers
from tasks.notices import warn_once
from tasks.reports.plots import recall_curve, scores_by_type
from tasks.reports.score_tables import MATCH_NAMES, scores_markdown, types_markdown
from tasks.results import StageResult
from tasks.retries import STAGE_RETRIES
from tasks.stage import publish_table
from tasks.tracking.metric_names import metric_name, metric_prefixes, score_metrics
from tasks.tracking.runs import StageRun, open_run, run_link


@task(name="evaluate", **STAGE_RETRIES)
def evaluate(
    predictions: Path,
    questions: Path,
    ks: Sequence[int] = (1, 5),
    parent_run_id: str | None = None,
    stage: str = "evaluate",
    match: Match = "words",
    answers_are: AnswersAre | None = None,
) -> tuple[StageResult, Evaluation]:
    """Compute EM, F1 and recall@k, overall and by question type.

    The stage is quick and writes no artifact, so it is never skipped.
    """
    started = time.monotonic()
    manifest = open_artifact(predictions, PREDICTIONS)
    file = read_question_file(questions, answers_are)
    check_answers(file)
    with open_run(stage, parent_run_id) as run:
        run.log_params({"match": match, "k": ",".join(map(str, ks))})
        run.log_input("predictions", predictions, manifest.fingerprint)
        run.log_input("questions", questions, fingerprint_of_files(files_of_questions(questions)))
        if hint := spaceless_hint(file.questions, match):
            warn_once(hint)
        evaluation = evaluate_predictions(predictions, file.questions, ks, match)
        _log(run, evaluation)
        seconds = time.monotonic() - started
        run.log_metrics({"seconds": seconds})
        rows = {"MLflow run": run_link(run), "answers compared by": MATCH_NAMES[match]}
        publish_table(stage, rows | scores_markdown(evaluation.overall), below=types_markdown(evaluation))
        result = StageResult(
            stage=stage,
            path=as_place(predictions).resolve(),
            fingerprint=manifest.fingerprint,
            metrics=run.metrics,
            run_id=run.run_id,
            seconds=seconds,
        )
    return result, evaluation


def _log(run: StageRun, evaluation: Evaluation) -> None:
    run.log_metrics(score_metrics(evaluation))
    content = evaluation.as_json()
    for kind, prefix in metric_prefixes(evaluation.by_type).items():
        if prefix != kind:
            content["by_type"][kind]["metrics"] = f"{prefix}/…"
    run.log_dict(content, "scores.json")
    for name in ("em", "recall@1"):
        if figure := scores_by_type(evaluation, name):
            run.log_figure(figure, f"{metric_name(name)}_by_type.png")
    if figure := recall_curve(evaluation.overall):
        run.log_figure(figure, "recall_at_k.png")
