"""Stage 5: a question file to predictions."""

from __future__ import annotations

from prefect import flow

from rag_core.artefacts.places import ArtefactPath
from rag_core.rag_model import ModelConfig
from tasks.answering import InferConfig
from tasks.batch_infer import batch_infer as run_task
from tasks.results import StageResult


@flow(name="batch-infer")
def batch_infer(
    model: ArtefactPath | ModelConfig,
    index: ArtefactPath,
    questions: ArtefactPath,
    out: ArtefactPath,
    config: InferConfig,
    parent_run_id: str | None = None,
    stage: str = "batch-infer",
) -> StageResult:
    """Answer every question of a file; `model` is a trained folder, or the parts of an untrained one."""
    return run_task(model, index, questions, out, config, parent_run_id, stage)
