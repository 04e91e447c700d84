"""Stage 2: a corpus to vectors, on Ray's long-lived workers.

Each worker loads the encoder once and turns whole corpus shards into embedding shards, row for row. Sorting by length
and token-budget batches happen inside a shard (`rag_core.text_encoder`).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
from prefect import task

from rag_core.artefacts.artefact import Manifest, open_artefact, publish
from rag_core.artefacts.artefact_inputs import input_paths
from rag_core.corpus import Corpus
from rag_core.embeddings import KIND, EmbedConfig, embed_shard, shard_name
from rag_core.errors import ArtefactError
from rag_core.model_source import absolute_source
from rag_core.text_encoder import TextEncoder
from tasks.ray_runtime import ensure_ray, progress, share_of_cluster
from tasks.ray_workers import map_on_workers
from tasks.results import StageResult
from tasks.retries import STAGE_RETRIES
from tasks.stage import Input, refuse_unseen_parts, run_stage
from tasks.tracking import StageRun

# Passages between two messages to the progress meter, which another process on the same cores receives.
REPORT_EVERY = 500


class ShardEmbedder:
    """In a worker: loads the encoder once, then embeds one corpus shard a call."""

    def __init__(self, config: EmbedConfig, out_folder: str, gpu: bool, meter: Any) -> None:
        self._config = config
        self._out_folder = Path(out_folder)
        self._meter = meter
        encoder = TextEncoder.from_pretrained(config.encoder, trust_remote_code=config.trust_remote_code)
        self._encoder = encoder.to("cuda" if gpu else "cpu")

    def __call__(self, shard: tuple[int, str]) -> int:
        number, path = shard
        out_file = self._out_folder / shard_name(number)
        if out_file.is_file():  # the worker that finished it was lost before it could say so
            return _rows_of(out_file)
        unreported = 0

        def report(done: int, at_least: int = REPORT_EVERY) -> None:
            nonlocal unreported
            unreported += done
            if unreported >= at_least:
                self._meter.advance.remote(unreported)
                unreported = 0

        rows = embed_shard(self._encoder, Path(path), out_file, self._config, report)
        report(0, at_least=1)
        return rows


@task(name="embed-corpus", **STAGE_RETRIES)
def embed_corpus(corpus: Path, out: Path, config: EmbedConfig, parent_run_id: str | None = None) -> StageResult:
    """Embed every passage with the frozen document encoder and publish Parquet shards."""
    opened = Corpus.open(corpus)
    encoder = TextEncoder.from_pretrained(config.encoder, trust_remote_code=config.trust_remote_code)
    fingerprint = encoder.fingerprint()
    # What decides the vectors: not how many workers made them, nor what the encoder is called, nor whether it is trusted.
    settings = {"dtype": config.dtype, "precision": config.precision, "batch_tokens": config.batch_tokens}

    def work(run: StageRun) -> Manifest:
        run.log_params({"encoder": config.encoder, "encoder_settings": encoder.settings.model_dump()})
        made_from = {"corpus": opened.manifest.fingerprint, "encoder": fingerprint}
        with publish(out, KIND, config=settings, made_from=made_from, resume=True) as draft:
            rows = embed_on_ray(opened, draft.folder, config)
            if rows != len(opened):
                raise ArtefactError(f"{rows} of {len(opened)} passages of {corpus} were embedded. Run the stage again.")
            refuse_unseen_parts(draft.folder, [shard_name(number) for number in range(len(opened.shards))], out)
            draft.counts["passages"] = rows
            draft.details = {
                "encoder": config.encoder,
                "encoder_fingerprint": fingerprint,
                "encoder_settings": encoder.settings.model_dump(),
                "dim": encoder.dim,
                "dtype": config.dtype,
                "inputs": input_paths(corpus=corpus),
            }
        return open_artefact(out, KIND, check_content=False)

    return run_stage(
        "embed-corpus",
        KIND,
        out,
        config=settings,
        inputs={"corpus": Input(corpus, opened.manifest.fingerprint)},
        made_from={"corpus": opened.manifest.fingerprint, "encoder": fingerprint},
        parent_run_id=parent_run_id,
        work=work,
    )


def embed_on_ray(corpus: Corpus, folder: Path, config: EmbedConfig) -> int:
    """Every shard of the corpus into a shard of embeddings in `folder`; returns the number of rows.

    Shards that a former run finished stay as they are.
    """
    ensure_ray()
    share = share_of_cluster(config.num_workers)
    finished = {number: file for number in range(len(corpus.shards)) if (file := folder / shard_name(number)).is_file()}
    shards = [(number, str(path.resolve())) for number, path in enumerate(corpus.shards) if number not in finished]
    rows = sum(map(_rows_of, finished.values()))
    found = config.model_copy(update={"encoder": absolute_source(config.encoder)})
    with progress("embed-corpus", len(corpus), done=rows) as meter:
        return rows + sum(map_on_workers(share, ShardEmbedder, (found, str(folder), share.gpus > 0, meter), shards))


def _rows_of(shard: Path) -> int:
    rows: int = pq.read_metadata(shard).num_rows
    return rows
