"""Decoder-only generators: a training step and RAG-Token decoding against plain Transformers code on equal weights.

The peers (`benchmarks/parts/causal_models.py`) do what is usual: all logits and their log-softmax in training; in
decoding one row and one cache per hypothesis, copied at every step. The end token is suppressed, so that every answer
has 16 tokens.

Legend: B questions, K passages per question, S context tokens, T answer tokens.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import torch

from benchmarks.harness import DTYPES, Line, Pairs, Precision, Side, Size, in_turn, limit_share, main
from benchmarks.parts.causal_models import END, causal_contexts, llama, operations, plain_mixture_beams, plain_nll
from benchmarks.parts.models import IGNORE, answers
from rag_core.cpu.heap import keep_freed_blocks
from rag_core.decoding import decode_rag_token
from rag_core.reading.likelihood import Variant, rag_nll

RATE, BEAMS, TOKENS = 1e-5, 4, 16
TRAINING: dict[Precision, float] = {"float32": 1.5, "bfloat16": 2.5}
DECODING: dict[Precision, float] = {"float32": 4.0, "bfloat16": 7.0}
MEMORY = 0.6
Training = Callable[[], float]
Decoding = Callable[[], list[list[int]]]


def _training(size: Size, variant: Variant, precision: Precision, nll: Callable[..., Any]) -> Training:
    model = llama(size).train()
    contexts = causal_contexts(size, model.config.vocab_size)
    labels_BT = answers(model.config.vocab_size, len(contexts[2]), 12)
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE, fused=True)

    def work() -> float:
        with torch.autocast("cpu", DTYPES[precision], enabled=precision != "float32"):
            loss = nll(model, contexts, labels_BT, variant).mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return float(loss.item())

    return work


def prepare_our_training(size: Size, variant: Variant, precision: Precision) -> Training:
    keep_freed_blocks()  # as a training worker does

    def nll(model: Any, contexts: Any, labels_BT: Any, variant: Variant) -> Any:
        return rag_nll(model, *contexts, labels_BT, variant=variant)

    return _training(size, variant, precision, nll)


def prepare_plain_training(size: Size, variant: Variant) -> Training:
    return _training(size, variant, "float32", plain_nll)


def prepare_our_decoding(size: Size, precision: Precision) -> Decoding:
    keep_freed_blocks()  # as a worker of `rag infer` does
    model = llama(size, peaked=True)
    model.generation_config.suppress_tokens = [END]
    contexts = causal_contexts(size, model.config.vocab_size)

    def work() -> list[list[int]]:
        with torch.autocast("cpu", DTYPES[precision], enabled=precision != "float32"):
            hypotheses = decode_rag_token(model, *contexts, num_beams=BEAMS, max_new_tokens=TOKENS)
        return [best.token_ids for (best,) in hypotheses]

    return work


def prepare_plain_decoding(size: Size) -> Decoding:
    model = llama(size, peaked=True)
    contexts = causal_contexts(size, model.config.vocab_size)
    return lambda: plain_mixture_beams(model, contexts, BEAMS, TOKENS)


def measure(size: Size) -> list[Line]:
    """One line per task and precision."""
    return [*_measure_training(size, "sequence"), *_measure_training(size, "token"), *_measure_decoding(size)]


def _measure_training(size: Size, variant: Variant) -> list[Line]:
    with ExitStack() as stack:
        ours = {p: stack.enter_context(Side(prepare_our_training, size, variant, p)) for p in TRAINING}
        peer = stack.enter_context(Side(prepare_plain_training, size, variant))
        pairs = in_turn(ours, peer, 3 if size == "full" else 1)
    model = llama(size)
    _, mask_BKS, scores_BK = causal_contexts(size, model.config.vocab_size)
    tokens = int((answers(model.config.vocab_size, len(scores_BK), 12) != IGNORE).sum()) * scores_BK.shape[1]
    useful = 3 * operations(model, int(mask_BKS.sum()) + tokens, tokens)
    return [_training_line(variant, precision, pairs[precision], useful) for precision in TRAINING]


def _training_line(variant: Variant, precision: Precision, pairs: Pairs, useful: float) -> Line:
    ours, theirs = pairs.ours[-1].result, pairs.peer[-1].result
    return Line(
        path=f"training step, decoder-only, RAG-{variant.capitalize()}, {precision}",
        peer="all logits and their log-softmax, float32",
        value=pairs.speedup,
        target=TRAINING[precision],
        limit_share=limit_share(useful, pairs.seconds, precision),
        memory=pairs.peak_ratio,
        memory_target=MEMORY,
        outputs=f"loss after {1 + len(pairs.ours)} steps {ours:.4f} and {theirs:.4f}",
        outputs_equal=abs(ours / theirs - 1) < (1e-4 if precision == "float32" else 2e-2),
        details=pairs.details() | {"rise_ratio": pairs.rise_ratio},
    )


def _measure_decoding(size: Size) -> list[Line]:
    with ExitStack() as stack:
        ours = {p: stack.enter_context(Side(prepare_our_decoding, size, p)) for p in DECODING}
        peer = stack.enter_context(Side(prepare_plain_decoding, size))
        pairs = in_turn(ours, peer, 3 if size == "full" else 1)
    model = llama(size)
    _, mask_BKS, scores_BK = causal_contexts(size, model.config.vocab_size)
    steps = scores_BK.numel() * BEAMS * (TOKENS - 1)
    useful = operations(model, int(mask_BKS.sum()) + steps, scores_BK.numel() + steps)
    return [_decoding_line(precision, pairs[precision], useful) for precision in DECODING]


def _decoding_line(precision: Precision, pairs: Pairs, useful: float) -> Line:
    ours, theirs = pairs.ours[-1].result, pairs.peer[-1].result
    equal = sum(answer == their_answer for answer, their_answer in zip(ours, theirs, strict=True))
    return Line(
        path=f"decode_rag_token, decoder-only, {BEAMS} beams, {TOKENS} tokens, {precision}",
        peer="one row and cache per hypothesis, float32",
        value=pairs.speedup,
        target=DECODING[precision],
        limit_share=limit_share(useful, pairs.seconds, precision),
        memory=pairs.peak_ratio,
        outputs=f"{equal} of {len(ours)} best answers equal; {len({tuple(answer) for answer in ours})} distinct",
        outputs_equal=equal == len(ours) or precision != "float32",
        details=pairs.details(),
    )


if __name__ == "__main__":
    main(measure)
