"""Time per passage and the driver's memory as a corpus grows from 10,000 to 235,000 passages: embed on Ray, index.

The driver has a process of its own. It also builds the index, so that memory counts, including FAISS's. Ray's worker is
warm. The corpus and embeddings of the largest size are left where `geonames_embeddings` finds them.
"""

from __future__ import annotations

import shutil
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from benchmarks.harness import Line, Side, Size, Spread, main
from benchmarks.parts.places import ALL, MINILM, bench_cache, geonames_corpus
from rag_core.corpus.corpus import Corpus
from rag_core.embeddings.embeddings import KIND, EmbedConfig, Embeddings
from rag_core.embeddings.text_encoder import TextEncoder
from rag_core.index.passage_index import IndexConfig, build_index
from rag_core.storage.artifact import publish

SLOWER = 10.0
MEGABYTES = 300.0


def prepare_driver(folders: Sequence[Path], scratch: Path) -> Callable[[], dict[str, Any]]:
    """Each call embeds and indexes the next corpus; returns the seconds of both."""
    from tasks.on_ray.embedding import embed_on_ray

    config = EmbedConfig(encoder=MINILM)
    encoder = TextEncoder.from_pretrained(MINILM)
    fingerprint, settings, dim = encoder.fingerprint(), encoder.settings.model_dump(), encoder.dim

    def embed(corpus: Corpus, out: Path) -> None:
        made_from = {"corpus": corpus.manifest.fingerprint, "encoder": fingerprint}
        with publish(out, KIND, config=config.model_dump(), made_from=made_from) as draft:
            draft.counts["passages"] = embed_on_ray(corpus, draft.folder, config)
            draft.details = {"encoder": MINILM, "encoder_fingerprint": fingerprint, "encoder_settings": settings}
            draft.details |= {"dim": dim, "dtype": config.dtype}

    def next_corpus() -> dict[str, Any]:
        folder = next(remaining)
        corpus = Corpus.open(folder / "corpus", check_content=False)
        start = time.perf_counter()
        embed(corpus, folder / KIND)
        embedded = time.perf_counter()
        build_index(Embeddings.open(folder / KIND, check_content=False), corpus, scratch / "index", IndexConfig())
        return {"embed": embedded - start, "index": time.perf_counter() - embedded}

    remaining = iter(folders)
    next_corpus()
    return next_corpus


def measure(size: Size) -> list[Line]:
    """Two lines: how much more time a passage takes, and how much more memory the driver."""
    sizes = [200, 600] if size == "smoke" else [10_000, ALL]
    with tempfile.TemporaryDirectory() as name:
        scratch = Path(name)
        folders = [scratch / "warm-up", scratch / "small", scratch / "large"]
        if size == "full":
            folders[-1] = bench_cache() / f"geonames-{ALL}"
            shutil.rmtree(folders[-1], ignore_errors=True)
        for passages, folder in zip([100, *sizes], folders, strict=True):
            geonames_corpus(passages, folder / "corpus")
        with Side(prepare_driver, folders, scratch) as driver:
            small, large = driver.run(), driver.run()
    path = f"growth, {sizes[0]} to {sizes[1]} passages, embed and index"
    seconds = [sum(run.result.values()) / passages for run, passages in zip((small, large), sizes, strict=True)]
    details = {
        str(passages): run.result | {"peak_mb": run.peak_bytes // 2**20}
        for passages, run in zip(sizes, (small, large), strict=True)
    }
    slower = 100 * (seconds[1] / seconds[0] - 1)
    more = (large.peak_bytes - small.peak_bytes) / 2**20
    return [
        Line(
            path=f"{path}: time a passage",
            peer="",
            value=Spread.of([slower]),
            unit="% more",
            target=SLOWER,
            higher_is_better=False,
            details=details | {"microseconds_a_passage": [round(1e6 * value) for value in seconds]},
        ),
        Line(
            path=f"{path}: driver's peak memory",
            peer="",
            value=Spread.of([more]),
            unit="MB more",
            target=MEGABYTES,
            higher_is_better=False,
            details=details,
        ),
    ]


if __name__ == "__main__":
    main(measure)
