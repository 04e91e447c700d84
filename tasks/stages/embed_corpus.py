"""Stage 2: embeds a corpus; the workers are in `tasks/on_ray/embedding.py`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from prefect import task

from rag_core.corpus.corpus import Corpus
from rag_core.embeddings.embeddings import KIND, EmbedConfig, load_document_encoder, shard_name
from rag_core.errors import ArtifactError
from rag_core.pretrained.model_source import pin_source, recorded_source
from rag_core.storage.artifact import Manifest, open_artifact, publish
from rag_core.storage.inputs import input_paths
from tasks.on_ray.embedding import embed_on_ray
from tasks.results import StageResult
from tasks.retries import STAGE_RETRIES
from tasks.stage import Input, refuse_unseen_parts, run_stage
from tasks.tracking.runs import StageRun


@task(name="embed-corpus", **STAGE_RETRIES)
def embed_corpus(corpus: Path, out: Path, config: EmbedConfig, parent_run_id: str | None = None) -> StageResult:
    """Embed every passage with the frozen document encoder and publish Parquet shards."""
    opened = Corpus.open(corpus)
    recorded = recorded_source(config.encoder)
    # Pin the commit before loading, so that the workers load the same one even if the hub's branch moves.
    config = config.model_copy(update={"encoder": pin_source(config.encoder)})
    encoder = load_document_encoder(config)
    fingerprint = encoder.fingerprint()
    # Only what decides the vectors. The encoder counts by its fingerprint (`made_from`), not by its name.
    settings: dict[str, Any] = {
        "dtype": config.dtype,
        "precision": config.precision,
        "batch_tokens": config.batch_tokens,
    }
    settings |= {"prompt": config.prompt} if config.prompt is not None else {}

    def work(run: StageRun) -> Manifest:
        run.log_params({"encoder_settings": encoder.settings.model_dump()})
        made_from = {"corpus": opened.manifest.fingerprint, "encoder": fingerprint}
        with publish(out, KIND, config=settings, made_from=made_from, resume=True) as draft:
            rows = embed_on_ray(opened, draft.folder, config)
            if rows != len(opened):
                raise ArtifactError(f"{rows} of {len(opened)} passages of {corpus} were embedded. Run the stage again.")
            refuse_unseen_parts(draft.folder, [shard_name(number) for number in range(len(opened.shards))], out)
            draft.counts["passages"] = rows
            draft.details = {
                "encoder": recorded,
                "encoder_fingerprint": fingerprint,
                "encoder_settings": encoder.settings.model_dump(),
                "dim": encoder.dim,
                "dtype": config.dtype,
                "inputs": input_paths(corpus=corpus),
            }
        return open_artifact(out, KIND, check_content=False)

    return run_stage(
        "embed-corpus",
        KIND,
        out,
        config=settings,
        inputs={"corpus": Input(corpus, opened.manifest.fingerprint)},
        made_from={"corpus": opened.manifest.fingerprint, "encoder": fingerprint},
        models={"encoder": recorded},
        parent_run_id=parent_run_id,
        work=work,
    )
