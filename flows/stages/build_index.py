"""Stage 3: builds a FAISS index from vectors and passages."""

from __future__ import annotations

from prefect import flow

from rag_core.index.passage_index import IndexConfig
from rag_core.storage.places import ArtifactPath
from tasks.results import StageResult
from tasks.stages.build_index import build_index as build_index_task


@flow(name="build-index")
def build_index(
    embeddings: ArtifactPath,
    corpus: ArtifactPath,
    out: ArtifactPath,
    config: IndexConfig,
    parent_run_id: str | None = None,
) -> StageResult:
    """Build a FAISS index and measure its recall@10 against exact search."""
    return build_index_task(embeddings, corpus, out, config, parent_run_id)
