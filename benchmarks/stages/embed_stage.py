"""The embed-corpus stage on Ray against the same loop in one process with all cores.

Both read 50,000 passages from Parquet, embed them with the same settings and write Parquet. The start of Ray's workers
is measured separately: a worker embeds a small corpus first, then the large one. Prefect and MLflow are left out;
`fixed_cost.py` measures them.
"""

from __future__ import annotations

import shutil
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.harness import Line, Side, Size, alternate, main
from benchmarks.parts.places import MINILM, embed_in_process, geonames_corpus
from rag_core.corpus.corpus import Corpus
from rag_core.embeddings.embeddings import EmbedConfig

TARGET = 0.92


def prepare_stage(folder: Path) -> Callable[[], dict[str, Any]]:
    """Ours, with Ray and its worker running and warm."""
    from tasks.on_ray.embedding import embed_on_ray

    def embed(corpus: Path) -> dict[str, Any]:
        out = Path(tempfile.mkdtemp(dir=folder))
        rows = embed_on_ray(Corpus.open(corpus, check_content=False), out, EmbedConfig(encoder=MINILM))
        return {"rows": rows, "checksum": _checksum(sorted(out.glob("*.parquet")))}

    start = time.perf_counter()
    embed(folder / "small")
    start_up = time.perf_counter() - start
    return lambda: embed(folder / "corpus") | {"start_up": start_up}


def prepare_bare(folder: Path) -> Callable[[], dict[str, Any]]:
    def embed(corpus: Path) -> dict[str, Any]:
        out = folder / "bare"
        shutil.rmtree(out, ignore_errors=True)
        embeddings = embed_in_process(Corpus.open(corpus, check_content=False), out)
        return {"rows": len(embeddings), "checksum": _checksum(embeddings.shards)}

    embed(folder / "small")
    return lambda: embed(folder / "corpus")


def measure(size: Size) -> list[Line]:
    """One line."""
    passages = 300 if size == "smoke" else 50_000
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        geonames_corpus(passages, folder / "corpus", shard_rows=passages // 2)
        geonames_corpus(100, folder / "small")
        with Side(prepare_stage, folder) as ours, Side(prepare_bare, folder) as peer:
            pairs = alternate(ours, peer, pairs=1, warmup=0)
    stage, bare = pairs.ours[0].result, pairs.peer[0].result
    equal = bool(stage["rows"] == bare["rows"] == passages and np.isclose(stage["checksum"], bare["checksum"]))
    return [
        Line(
            path=f"embed-corpus on Ray, {passages} passages of geonames, auto precision",
            peer="the same loop in one process",
            value=pairs.speedup,
            target=TARGET,
            outputs="the same vectors" if equal else f"{stage} and {bare}",
            outputs_equal=equal,
            details=pairs.details()
            | {
                "passages_per_second": round(passages / pairs.seconds, 1),
                "start_up_seconds": round(stage["start_up"], 1),
            },
        )
    ]


def _checksum(shards: list[Path]) -> float:
    import pyarrow.parquet as pq

    vectors = [pq.read_table(shard)["embedding"].combine_chunks().flatten().to_numpy() for shard in shards]
    return float(sum(np.abs(values).sum(dtype=np.float64) for values in vectors))


if __name__ == "__main__":
    main(measure)
