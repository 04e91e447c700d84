"""Search over MiniLM embeddings of geonames: `PassageIndex` against exact FAISS and against autofaiss.

The queries are embedded questions about the places ("Where is X?"). Both approximate indices are tuned on other
questions of that kind, to `TUNED_RECALL`, so that the measured recall@10 stays above 0.95. autofaiss may use as many
bytes as our search touches (index.faiss and vectors.npy). It needs older packages than ours, so it builds in a separate
environment, which `make bench` creates; its index is searched here, by the same FAISS as ours.
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

from benchmarks.harness import Line, Pairs, Side, Size, main
from benchmarks.parts.places import ALL, MINILM, bench_cache, geonames_embeddings
from rag_core.corpus.corpus import Corpus
from rag_core.embeddings.embeddings import Embeddings
from rag_core.embeddings.text_encoder import TextEncoder
from rag_core.index.factory import tune_recall
from rag_core.index.passage_index import IndexConfig, PassageIndex, build_index

K, RECALL, TUNED_RECALL = 10, 0.95, 0.955
SINGLES = 100
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
    """Lines for batches against exact search and against autofaiss; details: single questions, build times, bytes."""
    bench_cache().mkdir(parents=True, exist_ok=True)
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
    with (
        Side(search_ours, out, pairs) as ours_side,
        Side(search_exact, out, pairs) as flat,
        Side(search_peer, out, pairs) as peer,
    ):
        runs = [(ours_side.run(), flat.run(), peer.run()) for _ in range(1 + 2 * pairs)]
    ours_runs, flat_runs, peer_runs = zip(*runs[1 : pairs + 1], strict=True)
    exact, autofaiss = (Pairs(ours=list(ours_runs), peer=list(others)) for others in (flat_runs, peer_runs))
    single = [[run.seconds / SINGLES for run in side] for side in zip(*runs[pairs + 1 :], strict=True)]
    milliseconds = {name: 1000 * min(times) for name, times in zip(("ours", "exact", "peer"), single, strict=True)}
    truth = flat_runs[0].result
    recall, peer_recall = (_recall(side[0].result, truth) for side in (ours_runs, peer_runs))
    facts |= {"queries_per_second": count / exact.seconds, "recall_at_10": recall, "milliseconds_single": milliseconds}
    facts |= {"peer_bytes": peer_bytes, "peer_build_seconds": peer_built, "peer_recall_at_10": peer_recall}
    return [
        Line(
            path="index search, batch, float32",
            peer="FAISS IndexFlatIP, batch",
            value=exact.speedup,
            target=8,
            outputs=f"recall@10 {recall:.4f} of questions",
            outputs_equal=recall >= RECALL,
            details=exact.details() | facts,
        ),
        Line(
            path="index search at the same recall and memory bound, float32",
            peer=f"autofaiss ({peer_key})",
            value=autofaiss.speedup,
            target=1,
            memory=bound / peer_bytes,
            outputs=f"recall@10 {recall:.4f}, peer {peer_recall:.4f}; built in {built:.0f} s, peer {peer_built:.0f} s",
            outputs_equal=recall >= RECALL,
            details=autofaiss.details(),
        ),
    ]


def search_ours(index: Path, pairs: int) -> Callable[[], np.ndarray | None]:
    """`PassageIndex.search` as a whole; returns rows_QK."""
    opened = PassageIndex.open(index, check_content=False)
    return _work(index, pairs, lambda queries_QD: opened.search(queries_QD, K).rows_BK)


def search_exact(index: Path, pairs: int) -> Callable[[], np.ndarray | None]:
    """Exact FAISS search over all vectors in memory."""
    vectors_ND = np.load(index / "vectors.npy")
    flat = faiss.IndexFlatIP(vectors_ND.shape[1])
    flat.add(vectors_ND)
    return _work(index, pairs, lambda queries_QD: flat.search(queries_QD, K)[1])


def search_peer(index: Path, pairs: int) -> Callable[[], np.ndarray | None]:
    """The index of autofaiss, at the cheapest setting with `TUNED_RECALL` on the questions that ours was tuned on."""
    vectors_ND = np.load(index / "vectors.npy", mmap_mode="r")
    peer = faiss.read_index(str(index / "autofaiss.index"))
    tune_recall([peer], [vectors_ND], TUNED_RECALL, 0, 1, np.load(index.parent / "tuning.npy"))
    return _work(index, pairs, lambda queries_QD: peer.search(queries_QD, K)[1])


def _work(index: Path, pairs: int, search: Callable[[np.ndarray], np.ndarray]) -> Callable[[], np.ndarray | None]:
    """The first calls (a warm-up and the pairs) search the whole batch, later ones some questions one at a time."""
    queries_QD = np.load(index.parent / "queries.npy")
    calls = iter(range(1 + 2 * pairs))

    def work() -> np.ndarray | None:
        if next(calls) <= pairs:
            return search(queries_QD)
        for query_D in queries_QD[:SINGLES]:
            search(query_D[None])
        return None

    return work


def _questions(corpus: Corpus, count: int) -> tuple[np.ndarray, np.ndarray]:
    """Vectors of `count` questions for tuning, and of `count` other questions for measuring."""
    places = [passage.text.split(" is a place in ")[0] for passage in corpus.iter_passages()]
    chosen = np.random.default_rng(0).choice(len(places), 2 * count, replace=False)
    texts = [QUESTIONS[number % len(QUESTIONS)].format(places[row]) for number, row in enumerate(chosen)]
    vectors_QD = TextEncoder.from_pretrained(MINILM).encode(texts, precision="float32")
    return vectors_QD[:count], vectors_QD[count:]


def _build_autofaiss(index: Path, bound: int) -> str:
    """Let autofaiss choose, build and tune an index of at most `bound` bytes; returns its factory string."""
    if not AUTOFAISS.exists():
        raise FileNotFoundError(f"{AUTOFAISS} is missing: `make {AUTOFAISS.parent.parent}` installs autofaiss there.")
    arguments = [str(index / "vectors.npy"), str(index / "autofaiss.index"), f"{bound}B", str(os.cpu_count())]
    result = subprocess.run([AUTOFAISS, "-c", BUILD, *arguments], stdout=subprocess.PIPE, text=True, check=True)
    return result.stdout.strip().splitlines()[-1].split(" ")[0]


def _recall(rows_QK: np.ndarray, truth_QK: np.ndarray) -> float:
    return float(np.mean([len({*rows} & {*true}) / K for rows, true in zip(rows_QK, truth_QK, strict=True)]))


if __name__ == "__main__":
    main(measure)
