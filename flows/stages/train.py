"""Stage 4: trains RAG-Sequence (4a) or RAG-Token (4b) end to end."""

from __future__ import annotations

from prefect import flow

from rag_core.model.settings import ModelConfig
from rag_core.storage.places import ArtifactPath
from tasks.results import StageResult
from tasks.stages.train import TrainConfig
from tasks.stages.train import train as train_task


@flow(name="train-sequence")
def train_sequence(
    index: ArtifactPath,
    questions: ArtifactPath,
    dev: ArtifactPath,
    out: ArtifactPath,
    model: ModelConfig,
    config: TrainConfig,
    parent_run_id: str | None = None,
) -> StageResult:
    """Train RAG-Sequence on the answers' marginal likelihood."""
    return train_task("sequence", index, questions, dev, out, model, config, parent_run_id)


@flow(name="train-token")
def train_token(
    index: ArtifactPath,
    questions: ArtifactPath,
    dev: ArtifactPath,
    out: ArtifactPath,
    model: ModelConfig,
    config: TrainConfig,
    parent_run_id: str | None = None,
) -> StageResult:
    """Train RAG-Token on the answers' marginal likelihood."""
    return train_task("token", index, questions, dev, out, model, config, parent_run_id)
