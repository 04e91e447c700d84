"""Stage 1: source files to a corpus artefact."""

from __future__ import annotations

from prefect import flow

from rag_core.artefacts.places import ArtefactPath
from rag_core.corpus import CorpusConfig
from tasks.make_corpus import make_corpus as run_task
from tasks.results import StageResult


@flow(name="corpus")
def make_corpus(
    sources: list[ArtefactPath], out: ArtefactPath, config: CorpusConfig, parent_run_id: str | None = None
) -> StageResult:
    """Read passages from files, reject what is not one, publish canonical Parquet shards."""
    return run_task(sources, out, config, parent_run_id)
