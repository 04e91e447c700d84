"""Stage 6: scores answers and retrieval."""

from __future__ import annotations

from prefect import flow

from rag_core.evaluation.metrics import Match
from rag_core.evaluation.scores import Evaluation
from rag_core.questions.questions import AnswersAre
from rag_core.storage.places import ArtifactPath
from tasks.results import StageResult
from tasks.stages.evaluate import evaluate as evaluate_task


@flow(name="evaluate")
def evaluate(
    predictions: ArtifactPath,
    questions: ArtifactPath,
    ks: list[int] = [1, 5],  # noqa: B006 (Prefect shows the default in its form)
    parent_run_id: str | None = None,
    stage: str = "evaluate",
    match: Match = "words",
    answers_are: AnswersAre | None = None,
) -> tuple[StageResult, Evaluation]:
    """EM, F1 and recall@k of predictions, overall and by question type."""
    return evaluate_task(predictions, questions, ks, parent_run_id, stage, match, answers_are)
