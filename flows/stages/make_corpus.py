"""Stage 1: reads source files and publishes them as a corpus."""

from __future__ import annotations

from prefect import flow

from rag_core.corpus.corpus import CorpusConfig
from rag_core.storage.places import ArtifactPath
from tasks.results import StageResult
from tasks.stages.make_corpus import make_corpus as make_corpus_task


@flow(name="corpus")
def make_corpus(
    sources: list[ArtifactPath], out: ArtifactPath, config: CorpusConfig, parent_run_id: str | None = None
) -> StageResult:
    """Read passages from files, reject rows that hold none, and publish canonical Parquet shards."""
    return make_corpus_task(sources, out, config, parent_run_id)
