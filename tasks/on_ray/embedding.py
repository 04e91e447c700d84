"""Embeds a corpus on Ray's long-lived workers, one corpus shard at a time.

Each worker loads the encoder once and turns whole corpus shards into embedding shards, row for row. Inside a
shard `rag_core.embeddings.text_encoder` sorts by length and batches by a token budget. This module imports
neither Prefect nor MLflow, which would cost each worker seconds at its start.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

from rag_core.corpus.corpus import Corpus
from rag_core.embeddings.embeddings import EmbedConfig, embed_shard, load_document_encoder, shard_name
from rag_core.pretrained.model_source import pin_source
from tasks.on_ray.runtime import ensure_ray, progress, share_of_cluster
from tasks.on_ray.workers import map_on_workers

# Passages between two messages to the progress meter, whose process shares the worker's cores.
REPORT_EVERY = 500


class ShardEmbedder:
    """In a worker: loads the encoder once, then embeds one corpus shard per call."""

    def __init__(self, config: EmbedConfig, out_folder: str, gpu: bool, meter: Any) -> None:
        self._config = config
        self._out_folder = Path(out_folder)
        self._meter = meter
        self._encoder = load_document_encoder(config).to("cuda" if gpu else "cpu")

    def __call__(self, shard: tuple[int, str]) -> int:
        number, path = shard
        out_file = self._out_folder / shard_name(number)
        if out_file.is_file():  # a worker finished it, but was lost before it could report that
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


def embed_on_ray(corpus: Corpus, folder: Path, config: EmbedConfig) -> int:
    """Embed every shard of the corpus into a file in `folder`; keep the files of finished shards.

    Returns:
        number of rows in all shards.
    """
    ensure_ray()
    share = share_of_cluster(config.num_workers)
    finished = {number: file for number in range(len(corpus.shards)) if (file := folder / shard_name(number)).is_file()}
    shards = [(number, str(path.resolve())) for number, path in enumerate(corpus.shards) if number not in finished]
    rows = sum(map(_rows_of, finished.values()))
    pinned = config.model_copy(update={"encoder": pin_source(config.encoder)})
    with progress("embed-corpus", len(corpus), done=rows) as meter:
        return rows + sum(map_on_workers(share, ShardEmbedder, (pinned, str(folder), share.gpus > 0, meter), shards))


def _rows_of(shard: Path) -> int:
    rows: int = pq.read_metadata(shard).num_rows
    return rows
