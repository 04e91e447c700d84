"""Stage 0: makes a generator from an encoder, for where no pretrained generator is available."""

from __future__ import annotations

from prefect import flow

from rag_core.storage.places import ArtifactPath
from rag_core.training.pretraining import PretrainConfig
from tasks.results import StageResult
from tasks.stages.pretrain_generator import pretrain_generator as pretrain_generator_task


@flow(name="pretrain-generator")
def pretrain_generator(
    corpus: ArtifactPath,
    questions: ArtifactPath,
    dev: ArtifactPath,
    out: ArtifactPath,
    config: PretrainConfig,
    num_workers: int = 0,
    parent_run_id: str | None = None,
) -> StageResult:
    """Teach a new seq2seq model to copy passages and to read answers from gold passages."""
    return pretrain_generator_task(corpus, questions, dev, out, config, num_workers, parent_run_id)
