"""Stage 2: a corpus to vectors, with Ray Data and a pool of long-lived actors.

Each actor loads the encoder once and turns whole corpus shards into embedding shards, row for row; Ray Data deals out
the shards. Sorting by length and token-budget batches happen inside a shard (`rag_core.text_encoder`).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from prefect import task

from rag_core.artefact import Manifest, open_artefact, publish
from rag_core.corpus import Corpus
from rag_core.embeddings import KIND, EmbedConfig, embed_shard, shard_name
from rag_core.errors import ArtefactError
from rag_core.model_source import absolute_source
from rag_core.text_encoder import TextEncoder
from tasks.ray_runtime import ensure_ray, limit_threads, progress, share_of_cluster
from tasks.results import StageResult
from tasks.stage import Input, run_stage
from tasks.tracking import StageRun


class ShardEmbedder:
    """A Ray Data actor: loads the encoder once, then embeds one corpus shard a call."""

    def __init__(self, config: EmbedConfig, out_folder: str, cpus: int, gpu: bool, meter: Any) -> None:
        limit_threads(cpus)
        self._config = config
        self._out_folder = Path(out_folder)
        self._meter = meter
        self._encoder = TextEncoder.from_pretrained(config.encoder).to("cuda" if gpu else "cpu")

    def __call__(self, batch: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        rows = [
            embed_shard(
                self._encoder,
                Path(str(path)),
                self._out_folder / shard_name(int(number)),
                self._config,
                on_progress=lambda done: self._meter.advance.remote(done),
            )
            for number, path in zip(batch["number"], batch["path"], strict=True)
        ]
        return {"number": batch["number"], "rows": np.asarray(rows)}


@task(name="embed-corpus")
def embed_corpus(corpus: Path, out: Path, config: EmbedConfig, parent_run_id: str | None = None) -> StageResult:
    """Embed every passage with the frozen document encoder and publish Parquet shards."""
    opened = Corpus.open(corpus)
    encoder = TextEncoder.from_pretrained(config.encoder)
    fingerprint = encoder.fingerprint()
    # What decides the vectors: not how many workers made them, nor what the encoder is called.
    settings = {"dtype": config.dtype, "precision": config.precision, "batch_tokens": config.batch_tokens}

    def work(run: StageRun) -> Manifest:
        run.log_params({"encoder": config.encoder, "encoder_settings": encoder.settings.model_dump()})
        with publish(
            out, KIND, config=settings, made_from={"corpus": opened.manifest.fingerprint, "encoder": fingerprint}
        ) as draft:
            rows = _embed_on_ray(opened, draft.folder, config)
            if rows != len(opened):
                raise ArtefactError(f"{rows} of {len(opened)} passages of {corpus} were embedded. Run the stage again.")
            draft.counts["passages"] = rows
            draft.details = {
                "encoder": config.encoder,
                "encoder_fingerprint": fingerprint,
                "encoder_settings": encoder.settings.model_dump(),
                "dim": encoder.dim,
                "dtype": config.dtype,
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


def _embed_on_ray(corpus: Corpus, folder: Path, config: EmbedConfig) -> int:
    import ray

    ensure_ray()
    share = share_of_cluster(config.num_workers)
    shards = [{"number": number, "path": str(path.resolve())} for number, path in enumerate(corpus.shards)]
    found = config.model_copy(update={"encoder": absolute_source(config.encoder)})
    with progress("embed-corpus", len(corpus)) as meter:
        done = ray.data.from_items(shards, override_num_blocks=len(shards)).map_batches(
            ShardEmbedder,
            fn_constructor_args=(found, str(folder), share.cpus, share.gpus > 0, meter),
            batch_size=1,
            compute=ray.data.ActorPoolStrategy(size=min(share.num_workers, len(shards))),
            num_cpus=share.cpus,
            num_gpus=share.gpus,
        )
        return sum(int(row["rows"]) for row in done.iter_rows())
