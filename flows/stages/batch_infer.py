"""Stage 5: answers a question file."""

from __future__ import annotations

from prefect import flow

from rag_core.model.settings import ModelConfig
from rag_core.storage.places import ArtifactPath
from tasks.on_ray.answering import InferConfig
from tasks.results import StageResult
from tasks.stages.batch_infer import batch_infer as batch_infer_task


@flow(name="batch-infer")
def batch_infer(
    model: ArtifactPath | ModelConfig,
    index: ArtifactPath,
    questions: ArtifactPath,
    out: ArtifactPath,
    config: InferConfig,
    parent_run_id: str | None = None,
    stage: str = "batch-infer",
) -> StageResult:
    """Answer every question of a file; `model` is a trained model's folder, or the parts of an untrained model."""
    return batch_infer_task(model, index, questions, out, config, parent_run_id, stage)
