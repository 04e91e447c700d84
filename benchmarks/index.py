"""Search over MiniLM embeddings of geonames: `PassageIndex` against exact FAISS and against autofaiss.

The queries are questions about the places ("Where is X?"), embedded; both approximate indices are tuned on other
questions of that kind, to `TUNED_RECALL` so that the measured recall@10 stays above 0.95. autofaiss may use as many
bytes as our search touches (index.faiss and vectors.npy). It asks for older packages than ours and builds in an
environment of its own (`make bench` makes it); its index is searched here, by the same FAISS as ours.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import faiss
import numpy as np

from benchmarks.geonames import ALL, MINILM, bench_cache, geonames_embeddings
from benchmarks.harness import Line, Side, Size, alternate, main
from rag_core.corpus import Corpus
from rag_core.embeddings import Embeddings
from rag_core.index import IndexConfig, PassageIndex, build_index
from rag_core.index_factory import tune_recall
from rag_core.text_encoder import TextEncoder

K, RECALL, TUNED_RECALL = 10, 0.95, 0.955
SMALL_FACTORY = "OPQ96,IVF64,PQ96x4fs"
AUTOFAISS = Path(os.environ.get("RAG_BENCH_AUTOFAISS") or Path(sys.prefix) / "autofaiss/bin/python")
QUESTIONS = ("Which country is {} in?", "How many inhabitants has {}?", "Where is {}?", "What is the population of {}?")
BUILD = """
import sys, autofaiss, numpy
_, vectors, out, limit, cores = sys.argv
_, facts = autofaiss.build_index(
    embeddings=numpy.load(vectors), index_path=out, index_infos_path=out + ".json", max_index_memory_usage=limit,
    current_memory_available="8G", metric_type="ip", nb_cores=int(cores), verbose=30)
print(facts["index_key"], facts["index_param"])
"""


def measure(size: Size) -> list[Line]:
    """Batches against exact search and autofaiss; single questions, build times and bytes as details."""
    with tempfile.TemporaryDirectory(dir=bench_cache()) as scratch:
        return _compare(Path(scratch), *((ALL, 2000, 7, "auto") if size == "full" else (3000, 100, 2, SMALL_FACTORY)))


def _compare(scratch: Path, passages: int, count: int, pairs: int, factory: str) -> list[Line]:
    folder = geonames_embeddings(passages)
    corpus = Corpus.open(folder / "corpus", check_content=False)
    embeddings = Embeddings.open(folder / "embeddings", check_content=False)
    tuning_QD, queries_QD = _questions(corpus, count)
    np.save(scratch / "tuning.npy", tuning_QD)
    np.save(scratch / "queries.npy", queries_QD)
    out = scratch / "index"
    config = IndexConfig(target_recall=TUNED_RECALL, factory=factory)
    start = time.perf_counter()
    ours = build_index(embeddings, corpus, out, config, tuning_QD).details
    built = time.perf_counter() - start
    sizes = {name: (out / name).stat().st_size for name in ("index.faiss", "vectors.npy", "passages.arrow")}
    bound = sizes["index.faiss"] + sizes["vectors.npy"]
    start = time.perf_counter()
    peer_key = _build_autofaiss(out, bound)
    peer_built = time.perf_counter() - start
    peer_bytes = (out / "autofaiss.index").stat().st_size

    facts = {"passages": len(corpus), "factory": ours["factory"], "search_value": ours["search_value"], "bytes": sizes}
    facts |= {"build_seconds": built, "questions": count, "recall_tuned": ours["recall_at_10"], "bound_bytes": bound}
    facts |= {"recall_curve": ours["recall_curve"]}
    lines = []
    with Side(search_ours, out, count) as mine, Side(search_exact, out, count) as exact:
        found = alternate(mine, exact, pairs)
        recall = _recall(found.ours[0].result, found.peer[0].result)
        with Side(search_ours, out, 1) as mine_single, Side(search_exact, out, 1) as exact_single:
            single = alternate(mine_single, exact_single, 3 * pairs, warmup=10)
        lines.append(
            Line(
                path="index search, batch, float32",
                peer="FAISS IndexFlatIP, batch",
                value=found.speedup,
                target=8,
                outputs=f"recall@10 {recall:.4f} of questions",
                outputs_equal=recall >= RECALL,
                details=found.details()
                | facts
                | {"queries_per_second": count / found.seconds, "recall_at_10": recall}
                | {"milliseconds_single": 1000 * single.seconds, "single_speedup": single.speedup.model_dump()},
            )
        )
        truth = found.peer[0].result
    with Side(search_ours, out, count) as mine, Side(search_autofaiss, out, count) as peer:
        found = alternate(mine, peer, pairs)
        peer_recall = _recall(found.peer[0].result, truth)
        with Side(search_ours, out, 1) as mine_single, Side(search_autofaiss, out, 1) as peer_single:
            single = alternate(mine_single, peer_single, 3 * pairs, warmup=10)
    lines.append(
        Line(
            path="index search at the same recall and memory bound, float32",
            peer=f"autofaiss ({peer_key})",
            value=found.speedup,
            target=1,
            memory=bound / peer_bytes,
            outputs=f"recall@10 {recall:.4f}, peer {peer_recall:.4f}; built in {built:.0f} s, peer {peer_built:.0f} s",
            outputs_equal=recall >= RECALL,
            details=found.details()
            | {"peer_bytes": peer_bytes, "peer_build_seconds": peer_built, "peer_recall_at_10": peer_recall}
            | {"build_seconds": built, "single_speedup": single.speedup.model_dump()},
        )
    )
    return lines


def search_ours(index: Path, count: int) -> Callable[[], np.ndarray]:
    """All of `PassageIndex.search`: rows (Q, K)."""
    opened, queries_QD = PassageIndex.open(index, check_content=False), _queries(index, count)
    return lambda: opened.search(queries_QD, K).rows_BK


def search_exact(index: Path, count: int) -> Callable[[], np.ndarray]:
    """FAISS over all vectors in memory."""
    queries_QD, vectors_ND = _queries(index, count), np.load(index / "vectors.npy")
    flat = faiss.IndexFlatIP(vectors_ND.shape[1])
    flat.add(vectors_ND)
    return lambda: flat.search(queries_QD, K)[1]


def search_autofaiss(index: Path, count: int) -> Callable[[], np.ndarray]:
    """What autofaiss built, at the cheapest setting that has the recall on the questions that ours was tuned on."""
    queries_QD, vectors_ND = _queries(index, count), np.load(index / "vectors.npy", mmap_mode="r")
    peer = faiss.read_index(str(index / "autofaiss.index"))
    tune_recall(peer, vectors_ND, TUNED_RECALL, 0, 1, np.load(index.parent / "tuning.npy"))
    return lambda: peer.search(queries_QD, K)[1]


def _queries(index: Path, count: int) -> np.ndarray:
    return np.ascontiguousarray(np.load(index.parent / "queries.npy")[:count])


def _questions(corpus: Corpus, count: int) -> tuple[np.ndarray, np.ndarray]:
    """Vectors of `count` questions to tune on, and of `count` others to measure on."""
    places = [passage.text.split(" is a place in ")[0] for passage in corpus.iter_passages()]
    chosen = np.random.default_rng(0).choice(len(places), 2 * count, replace=False)
    texts = [QUESTIONS[number % len(QUESTIONS)].format(places[row]) for number, row in enumerate(chosen)]
    vectors_QD = TextEncoder.from_pretrained(MINILM).encode(texts, precision="float32")
    return vectors_QD[:count], vectors_QD[count:]


def _build_autofaiss(index: Path, bound: int) -> str:
    """Let autofaiss choose, build and tune within so many bytes; returns its choice."""
    if not AUTOFAISS.exists():
        raise FileNotFoundError(f"{AUTOFAISS} is missing: `make {AUTOFAISS.parent.parent}` installs autofaiss there.")
    arguments = [str(index / "vectors.npy"), str(index / "autofaiss.index"), f"{bound}B", str(os.cpu_count())]
    done = subprocess.run([AUTOFAISS, "-c", BUILD, *arguments], stdout=subprocess.PIPE, text=True, check=True)
    return done.stdout.strip().splitlines()[-1].split(" ")[0]


def _recall(rows_QK: np.ndarray, truth_QK: np.ndarray) -> float:
    return float(np.mean([len({*found} & {*true}) / K for found, true in zip(rows_QK, truth_QK, strict=True)]))


if __name__ == "__main__":
    main(measure)
