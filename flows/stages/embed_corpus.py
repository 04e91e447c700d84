"""Stage 2: embeds a corpus."""

from __future__ import annotations

from prefect import flow

from rag_core.embeddings.embeddings import EmbedConfig
from rag_core.storage.places import ArtifactPath
from tasks.results import StageResult
from tasks.stages.embed_corpus import embed_corpus as embed_corpus_task


@flow(name="embed-corpus")
def embed_corpus(
    corpus: ArtifactPath, out: ArtifactPath, config: EmbedConfig, parent_run_id: str | None = None
) -> StageResult:
    """Embed every passage with the frozen document encoder."""
    return embed_corpus_task(corpus, out, config, parent_run_id)
