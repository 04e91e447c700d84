"""Stage 0: a generator from an encoder, where no pretrained one can be had."""

from __future__ import annotations

from prefect import flow

from rag_core.artefacts.places import ArtefactPath
from rag_core.pretraining import PretrainConfig
from tasks.pretrain_generator import pretrain_generator as run_task
from tasks.results import StageResult


@flow(name="pretrain-generator")
def pretrain_generator(
    corpus: ArtefactPath,
    questions: ArtefactPath,
    dev: ArtefactPath,
    out: ArtefactPath,
    config: PretrainConfig,
    num_workers: int = 0,
    parent_run_id: str | None = None,
) -> StageResult:
    """Teach a fresh seq2seq model to copy passages and to read answers off gold passages."""
    return run_task(corpus, questions, dev, out, config, num_workers, parent_run_id)
