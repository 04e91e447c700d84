"""Search in this process against search by Ray actors, and how soon a killed actor is replaced.

    .venv/bin/python -m benchmarks.components.sharded_search [--rows 20000] [--dim 384] [--shards 2] [--questions 8]

Random vectors of unit length, K = 5, an exact index. Both searches alternate, so that other load on the machine slows
both. Prints one JSON object: medians in milliseconds per batch, and seconds until a killed actor answered again.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import statistics
import tempfile
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import ray

from rag_core.corpus.corpus import Corpus
from rag_core.embeddings.embeddings import Embeddings
from rag_core.index.passage_index import IndexConfig, PassageIndex, build_index
from rag_core.storage.artifact import publish
from tasks.on_ray.retriever_shards import RetrievalConfig, ShardedRetriever, retrieval

K = 5
BATCHES = 100
KILLS = 5


def main() -> None:
    """Build, measure, print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    for name, default in (("rows", 20_000), ("dim", 384), ("shards", 2), ("questions", 8)):
        parser.add_argument(f"--{name}", type=int, default=default)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        index = build(Path(folder), options.rows, options.dim, options.shards)
        queries_BD = np.random.default_rng(1).normal(size=(options.questions, options.dim)).astype(np.float32)
        config = RetrievalConfig(mode="sharded")
        with retrieval(str(index.path), index.manifest, config) as open_retriever:
            sharded = open_retriever()
            assert isinstance(sharded, ShardedRetriever)
            times: dict[str, list[float]] = {"local": [], "sharded": []}
            for _ in range(BATCHES):
                for name, retriever in (("local", index), ("sharded", sharded)):
                    start = time.perf_counter()
                    retriever.search(queries_BD, K)
                    times[name].append(time.perf_counter() - start)
            downtimes = [kill_and_search(sharded, queries_BD) for _ in range(KILLS)]
    figures = {f"{name}_ms": round(1000 * statistics.median(seconds), 2) for name, seconds in times.items()}
    print(json.dumps({**vars(options), **figures, "replaced_after_s": [round(downtime, 2) for downtime in downtimes]}))


def build(folder: Path, rows: int, dim: int, shards: int) -> PassageIndex:
    """An index of random vectors."""
    vectors_ND = np.random.default_rng(0).normal(size=(rows, dim)).astype(np.float32)
    vectors_ND /= np.linalg.norm(vectors_ND, axis=1, keepdims=True)
    ids = pa.array([str(row) for row in range(rows)])
    with publish(folder / "corpus", "corpus") as draft:
        pq.write_table(pa.table({"id": ids, "title": ids, "text": ids}), draft.folder / "passages-00000.parquet")
        draft.counts["passages"] = rows
    corpus = Corpus.open(folder / "corpus")
    with publish(folder / "embeddings", "embeddings", made_from={"corpus": corpus.manifest.fingerprint}) as draft:
        column = pa.FixedSizeListArray.from_arrays(pa.array(vectors_ND.reshape(-1)), dim)
        pq.write_table(pa.table({"id": ids, "embedding": column}), draft.folder / "embeddings-00000.parquet")
        draft.counts["passages"] = rows
        draft.details = {"dim": dim, "dtype": "float32", "encoder": "random", "encoder_fingerprint": "random"}
    config = IndexConfig(factory="Flat", shards=shards)
    build_index(Embeddings.open(folder / "embeddings"), corpus, folder / "index", config)
    return PassageIndex.open(folder / "index")


def kill_and_search(retriever: ShardedRetriever, queries_BD: np.ndarray) -> float:
    """Seconds from the kill of an actor without replicas to the next complete answer."""
    os.kill(ray.get(retriever._replicas[0][0].process.remote()), signal.SIGKILL)
    start = time.monotonic()
    retriever.search(queries_BD, K)
    return time.monotonic() - start


if __name__ == "__main__":
    main()
