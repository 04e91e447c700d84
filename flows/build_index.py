"""Stage 3: vectors and passages to a FAISS index."""

from __future__ import annotations

from prefect import flow

from rag_core.artefacts.places import ArtefactPath
from rag_core.index import IndexConfig
from tasks.build_index import build_index as run_task
from tasks.results import StageResult


@flow(name="build-index")
def build_index(
    embeddings: ArtefactPath,
    corpus: ArtefactPath,
    out: ArtefactPath,
    config: IndexConfig,
    parent_run_id: str | None = None,
) -> StageResult:
    """Build a FAISS index and measure how well it finds."""
    return run_task(embeddings, corpus, out, config, parent_run_id)
