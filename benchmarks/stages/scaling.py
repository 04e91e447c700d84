"""`python -m benchmarks.stages.scaling`: the tables of docs/scaling.md, from measured constants and formulas.

Measured constants come from the results of `make bench`, if there are any. Nothing was timed on a GPU: its rates are
data-sheet peaks times an assumed utilisation. Operations are counted, not fitted to timings.

Letters: N passages, D embedding, S tokens of a text, L layers, B questions, K passages a question, T answer tokens,
V vocabulary, R workers.
"""

from __future__ import annotations

import argparse
import json
import re
from pathlib import Path
from typing import Any, NamedTuple

from rag_core.index.factory import TRAIN_ROWS_PER_LIST, choose_factory

SIZES = {"21 M (Wikipedia)": 21_000_000, "1 G": 1_000_000_000}
WORKERS = (1, 8, 64)
# Assumed: data-sheet peak of dense bfloat16 in operations per second, and the share of it that is reached.
UTILISATION = 0.35
GPUS = {"A100": 312e12, "H100": 989e12}
TEXT_BYTES = 600  # assumed: a passage of 100 words
TOKENS = 130  # assumed: the same passage, for the encoder
KMEANS_ROUNDS = 10  # FAISS's default for the lists of an IVF


class Encoder(NamedTuple):
    """A BERT-like encoder. Word embeddings are left out, since looking them up costs no arithmetic."""

    name: str
    layers: int
    width: int


class Generator(NamedTuple):
    """A BART-like generator. Linear layers have 12·D² parameters per encoder layer and 16·D² per decoder layer."""

    name: str
    layers: int
    width: int
    vocabulary: int

    @property
    def encoder_parameters(self) -> int:
        return 12 * self.layers * self.width**2

    @property
    def decoder_parameters(self) -> int:
        return 16 * self.layers * self.width**2

    @property
    def parameters(self) -> int:
        return self.encoder_parameters + self.decoder_parameters + self.vocabulary * self.width


ENCODERS = (Encoder("MiniLM, 384 dims", 6, 384), Encoder("BERT-base, 768 dims", 12, 768))
GENERATORS = (Generator("6+6 × 512 (benchmark)", 6, 512, 50_265), Generator("BART-large", 12, 1024, 50_265))


def encoder_operations(encoder: Encoder, tokens: int) -> float:
    """Operations to embed a text. Per token: 2 · 12·L·D² in the linear layers, 4·L·S·D in attention."""
    return tokens * (24 * encoder.layers * encoder.width**2 + 4 * encoder.layers * tokens * encoder.width)


def index_bytes(num_vectors: int, dim: int) -> dict[str, float]:
    """Bytes of each file of an index: codes with 8-byte ids and 4·D per list, 4·D per vector, and the texts."""
    factory = choose_factory(num_vectors, dim)
    lists = lists_of(factory)
    subvectors, four_bit = re.search(r"PQ(\d+)(x4fs)?$", factory), factory.endswith("x4fs")
    code = dim if subvectors is None else int(subvectors[1]) / (2 if four_bit else 1)
    code = 4 * dim if factory == "Flat" else code + 8
    rotation = 4 * dim**2 if factory.startswith("OPQ") else 0
    index = num_vectors * code + 4 * dim * lists + rotation
    return {"index.faiss": index, "vectors.npy": 4 * dim * num_vectors, "passages.arrow": TEXT_BYTES * num_vectors}


def lists_of(factory: str) -> int:
    """Number of inverted lists; 0 for an exact index."""
    match = re.search(r"IVF(\d+)", factory)
    return int(match[1]) if match else 0


def build_operations(num_vectors: int, dim: int) -> tuple[float, float]:
    """Operations of k-means over the training rows, and of assigning vectors to lists: 2·D per vector and centroid."""
    lists = lists_of(choose_factory(num_vectors, dim))
    train = KMEANS_ROUNDS * min(num_vectors, TRAIN_ROWS_PER_LIST * lists) * lists * 2 * dim
    return float(train), 2.0 * num_vectors * lists * dim


def step_operations(model: Generator, questions: int, passages: int, context: int, answer: int) -> float:
    """Operations of one forward and backward pass: 6 per parameter and token, plus attention and the vocabulary."""
    pairs = questions * passages
    encoder = context * (6 * model.encoder_parameters + 12 * model.layers * context * model.width)
    cross = 12 * model.layers * context * model.width * answer
    # Each layer's cross-attention projects the context's keys and values once: 2 of a decoder layer's 16 D².
    projected = 6 * context * 2 * model.layers * model.width**2
    decoder = answer * (6 * model.decoder_parameters * 14 / 16 + 6 * model.vocabulary * model.width)
    return float(pairs * (encoder + projected + decoder + cross))


def all_reduce_bytes(parameters: int, workers: int) -> float:
    """Bytes that a worker sends in a ring all-reduce of float32 gradients: 2·(R − 1)/R · 4 · parameters."""
    return 2 * (workers - 1) / workers * 4 * parameters


def main() -> None:
    """Print the tables as Markdown."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--results", type=Path, default=Path("runs/bench/results.json"))
    measured = read_measured(parser.parse_args().results)
    print(f"Measured constants from {measured['source']}: float32 {measured['float32'] / 1e9:.0f} GFLOP/s, "
          f"bfloat16 {measured['bfloat16'] / 1e9:.0f} GFLOP/s.\n")  # fmt: skip
    print_embedding(measured)
    print_index(measured)
    print_training()
    print_inference()


def read_measured(file: Path) -> dict[str, Any]:
    """Rates of the matrix product, from the results of `make bench`; without them, those of the reference machine."""
    if not file.exists():
        return {"source": "the reference machine (2 cores; no results file)", "float32": 150e9, "bfloat16": 360e9}
    machine = json.loads(file.read_text(encoding="utf-8"))["machine"]
    rates = {name: machine[f"gflops_{name}"] * 1e9 for name in ("float32", "bfloat16")}
    return {"source": str(file), **rates}


def print_embedding(measured: dict[str, Any]) -> None:
    row("Embedding", "operations a passage", "2 cores, h", *(f"{n} × {g}, h" for g in GPUS for n in WORKERS))
    for encoder in ENCODERS:
        operations = encoder_operations(encoder, TOKENS)
        for name, count in SIZES.items():
            total = operations * count / UTILISATION
            times = (total / peak / workers for peak in GPUS.values() for workers in WORKERS)
            cells = [total / measured["bfloat16"], *times]
            row(f"{encoder.name}, {name}", f"{operations / 1e9:.2f} G", *(hours(seconds) for seconds in cells))
    print()


def print_index(measured: dict[str, Any]) -> None:
    row("Index", "factory", "RAM (index.faiss), GB", "vectors.npy, GB", "passages.arrow, GB",
        "k-means, 2 cores, h", "assignment, 2 cores, h", "both, one A100, h")  # fmt: skip
    for encoder in ENCODERS:
        for name, count in SIZES.items():
            sizes = index_bytes(count, encoder.width)
            train, assign = build_operations(count, encoder.width)
            gpu = (train + assign) / (19.5e12 * UTILISATION)
            row(f"{encoder.name}, {name}", choose_factory(count, encoder.width),
                *(f"{size / 1e9:,.1f}" for size in sizes.values()), hours(train / measured["float32"]),
                hours(assign / measured["float32"]), hours(gpu))  # fmt: skip
    print()


def print_training() -> None:
    row("Training step, B=8, K=5, S=96, T=12 a worker", "parameters", "operations", "A100, ms", "H100, ms",
        *(f"all-reduce, {workers} workers, MB" for workers in WORKERS), "vectors read, kB")  # fmt: skip
    for model in GENERATORS:
        operations = step_operations(model, 8, 5, 96, 12)
        times = [f"{1000 * operations / peak / UTILISATION:.1f}" for peak in GPUS.values()]
        sent = [f"{all_reduce_bytes(model.parameters, workers) / 1e6:,.0f}" for workers in WORKERS]
        read = 8 * 5 * 4 * 768 / 1e3
        row(model.name, f"{model.parameters / 1e6:.0f} M", f"{operations / 1e12:.2f} T", *times, *sent, f"{read:.0f}")
    print()


def print_inference() -> None:
    row("Answers of 16 tokens, 4 beams, K=5, S=96", "operations a question",
        *(f"1 M questions, {n} × {g}, h" for g in GPUS for n in WORKERS))  # fmt: skip
    for model in GENERATORS:
        encoder = 96 * (2 * model.encoder_parameters + 4 * model.layers * 96 * model.width)
        token = 2 * model.decoder_parameters * 14 / 16 + 2 * model.vocabulary * model.width
        operations = 5 * (encoder + 4 * model.layers * 96 * model.width**2 + 4 * 16 * token)
        total = 1e6 * operations / UTILISATION
        times = (total / peak / workers for peak in GPUS.values() for workers in WORKERS)
        row(model.name, f"{operations / 1e9:.0f} G", *(hours(seconds) for seconds in times))


def row(*cells: str) -> None:
    """Print a row of a Markdown table; under a heading row also the rule."""
    print("| " + " | ".join(cells) + " |")
    if cells[0].startswith(("Embedding", "Index", "Training", "Answers")):
        print("|" + " --- |" * len(cells))


def hours(seconds: float) -> str:
    """Hours with two significant digits."""
    return f"{float(f'{seconds / 3600:.2g}'):,g}"


if __name__ == "__main__":
    main()
