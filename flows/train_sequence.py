"""Stage 4a: RAG-Sequence, end to end."""

from __future__ import annotations

from prefect import flow

from rag_core.artefacts.places import ArtefactPath
from rag_core.rag_model import ModelConfig
from tasks.results import StageResult
from tasks.train import TrainConfig
from tasks.train import train as run_task


@flow(name="train-sequence")
def train_sequence(
    index: ArtefactPath,
    questions: ArtefactPath,
    dev: ArtefactPath,
    out: ArtefactPath,
    model: ModelConfig,
    config: TrainConfig,
    parent_run_id: str | None = None,
) -> StageResult:
    """Train RAG-Sequence from the answers' marginal likelihood."""
    return run_task("sequence", index, questions, dev, out, model, config, parent_run_id)
