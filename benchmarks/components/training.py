"""A training step (forward, backward, AdamW) against Hugging Face's RAG classes.

Both train only the generator, from given contexts and document scores, with equal weights and without dropout.

Legend: B questions, K passages per question, S context tokens, T answer tokens.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor

from benchmarks.harness import DTYPES, Line, Pairs, Precision, Side, Size, in_turn, limit_share, main
from benchmarks.parts.models import IGNORE, PAD, START, answers, bart, contexts, operations
from rag_core.cpu.heap import keep_freed_blocks
from rag_core.reading.likelihood import Variant, rag_nll
from tests.support.models.hf_rag import hf_rag

RATE = 1e-5
TARGETS: dict[Precision, float] = {"float32": 1.6, "bfloat16": 3.2}


def _step(generator: Any, loss: Callable[[], Tensor]) -> Callable[[], float]:
    """Forward, backward, optimiser; returns the loss."""
    optimizer = torch.optim.AdamW(generator.parameters(), lr=RATE, fused=True)

    def work() -> float:
        value = loss()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return value

    return work


def prepare_ours(size: Size, variant: Variant, precision: Precision) -> Callable[[], float]:
    keep_freed_blocks()  # as a training worker does
    generator = bart(size).train()
    inputs = contexts(size, generator)
    labels_BT = answers(generator.config.vocab_size, len(inputs[2]), 12)

    def loss() -> float:
        with torch.autocast("cpu", DTYPES[precision], enabled=precision != "float32"):
            nll = rag_nll(generator, *inputs, labels_BT, variant=variant).mean()
        nll.backward()
        return nll.item()

    return _step(generator, loss)


def prepare_peer(size: Size, variant: Variant) -> Callable[[], float]:
    generator = bart(size)
    inputs = contexts(size, generator)
    labels_BT = answers(generator.config.vocab_size, len(inputs[2]), 12)
    starts_B1 = torch.full((len(labels_BT), 1), START)
    labels_BT = torch.cat([starts_B1, labels_BT.where(labels_BT != IGNORE, PAD)], dim=1)
    model = hf_rag(generator, variant).train()

    def loss() -> float:
        nll = model(
            context_input_ids=inputs[0].flatten(0, 1),
            context_attention_mask=inputs[1].flatten(0, 1),
            doc_scores=inputs[2],
            labels=labels_BT,
            n_docs=inputs[2].shape[1],
        ).loss.mean()
        nll.backward()
        return nll.item()

    return _step(generator, loss)


def measure(size: Size) -> list[Line]:
    """One line per variant and precision."""
    lines = []
    variants: tuple[Variant, ...] = ("sequence", "token")
    generator = bart("smoke") if size == "smoke" else bart(size)
    _, mask_BKS, doc_scores_BK = contexts(size, generator)
    labels_BT = answers(generator.config.vocab_size, len(doc_scores_BK), 12)
    K, tokens = doc_scores_BK.shape[1], int((labels_BT != IGNORE).sum())
    useful = 3 * operations(generator, int(mask_BKS.sum()), K * tokens, K * tokens)
    del generator
    for variant in variants:
        with ExitStack() as stack:
            ours = {
                precision: stack.enter_context(Side(prepare_ours, size, variant, precision)) for precision in TARGETS
            }
            peer = stack.enter_context(Side(prepare_peer, size, variant))
            pairs = in_turn(ours, peer, 3 if size == "full" else 1)
        lines += [_line(variant, precision, pairs[precision], useful) for precision in TARGETS]
    return lines


def _line(variant: Variant, precision: Precision, pairs: Pairs, useful: float) -> Line:
    ours, theirs = pairs.ours[-1].result, pairs.peer[-1].result
    return Line(
        path=f"training step, RAG-{variant.capitalize()}, {precision}",
        peer=f"Rag{variant.capitalize()}ForGeneration, float32",
        value=pairs.speedup,
        target=TARGETS[precision],
        limit_share=limit_share(useful, pairs.seconds, precision),
        memory=pairs.peak_ratio,
        memory_target=0.5,
        outputs=f"loss after {1 + len(pairs.ours)} steps {ours:.4f} and {theirs:.4f}",
        outputs_equal=abs(ours / theirs - 1) < (1e-4 if precision == "float32" else 2e-2),
        details=pairs.details() | {"rise_ratio": pairs.rise_ratio},
    )


if __name__ == "__main__":
    main(measure)
