"""Stage 2: a corpus to vectors."""

from __future__ import annotations

from prefect import flow

from rag_core.artefacts.places import ArtefactPath
from rag_core.embeddings import EmbedConfig
from tasks.embed_corpus import embed_corpus as run_task
from tasks.results import StageResult


@flow(name="embed-corpus")
def embed_corpus(
    corpus: ArtefactPath, out: ArtefactPath, config: EmbedConfig, parent_run_id: str | None = None
) -> StageResult:
    """Embed every passage with the frozen document encoder."""
    return run_task(corpus, out, config, parent_run_id)
