"""Decoding against Hugging Face's `generate`: both variants, four beams, 16 tokens, whole batches of questions.

Weights are random, so all questions run to their last token. The head has separate weights, wide enough to give the
most probable tokens probabilities like a trained model's; passages then give different candidates (counted).

Legend: B questions, K passages per question, S context tokens, T answer tokens.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor

from benchmarks.harness import DTYPES, Line, Precision, Side, Size, in_turn, limit_share, main
from benchmarks.parts.models import bart, contexts, operations
from rag_core.cpu.heap import keep_freed_blocks
from rag_core.decoding import Hypothesis, decode_rag_sequence, decode_rag_token
from rag_core.reading.likelihood import Variant
from tests.support.models.hf_rag import hf_generate, hf_rag

BEAMS, TOKENS = 4, 16
# Logits get a standard deviation of about 7.
HEAD_STD: dict[Size, float] = {"full": 0.3, "smoke": 1.2}
DECODERS: dict[Variant, Callable[..., list[list[Hypothesis]]]] = {
    "sequence": decode_rag_sequence,
    "token": decode_rag_token,
}
# Hugging Face's RAG-Sequence attends to padding, so that variant is compared on contexts of one length.
TARGETS: dict[Variant, dict[Precision, float]] = {
    "token": {"float32": 4.0, "bfloat16": 7.0},
    "sequence": {"float32": 10.0, "bfloat16": 16.0},
}


def _inputs(size: Size, variant: Variant) -> tuple[Any, tuple[Tensor, Tensor, Tensor]]:
    generator = bart(size)
    _give_head(size, generator)
    generator.config.tie_word_embeddings = False
    ids_BKS, mask_BKS, doc_scores_BK = contexts(size, generator)
    if variant == "sequence":
        # With the special tokens of the released BART, set below, their scoring is correct.
        mask_BKS = torch.ones_like(mask_BKS)
        ids_BKS = torch.randint(
            4, generator.config.vocab_size, ids_BKS.shape, generator=torch.Generator().manual_seed(4)
        )
    for config in (generator.config, generator.generation_config):
        config.bos_token_id, config.pad_token_id = 0, 1
    generator.generation_config.suppress_tokens = [1]
    generator.generation_config.begin_suppress_tokens = [0, 2]
    return generator, (ids_BKS, mask_BKS, doc_scores_BK)


def _give_head(size: Size, generator: Any) -> None:
    V, D = generator.config.vocab_size, generator.config.d_model
    weight_VD = torch.normal(0.0, HEAD_STD[size], (V, D), generator=torch.Generator().manual_seed(5))
    generator.get_output_embeddings().weight = torch.nn.Parameter(weight_VD)


def prepare_ours(size: Size, variant: Variant, precision: Precision) -> Callable[[], list[tuple[list[int], float]]]:
    """The best answer of every question and its log-probability."""
    keep_freed_blocks()  # as a worker of `rag infer` does
    generator, inputs = _inputs(size, variant)

    def work() -> list[tuple[list[int], float]]:
        with torch.autocast("cpu", DTYPES[precision], enabled=precision != "float32"):
            hypotheses = DECODERS[variant](generator, *inputs, num_beams=BEAMS, max_new_tokens=TOKENS)
        return [(ranked[0].token_ids, ranked[0].log_prob) for ranked in hypotheses]

    return work


def prepare_peer(size: Size, variant: Variant) -> Callable[[], list[list[int]]]:
    """Their best sequence of every question, without start, end and padding."""
    generator, inputs = _inputs(size, variant)
    model = hf_rag(generator, variant)
    _give_head(size, generator)  # their class initialises it anew
    # Their RAG-Token ignores max_new_tokens and reads max_length, which includes the start token.
    limit = {"max_new_tokens": TOKENS} if variant == "sequence" else {"max_length": 1 + TOKENS}

    def work() -> list[list[int]]:
        rows = hf_generate(model, inputs, num_beams=BEAMS, num_return_sequences=1, length_penalty=0.0, **limit)
        return [[token for token in row[: [*row, 2].index(2)] if token != 1] for row in rows]

    return work


def _useful(size: Size, variant: Variant) -> float:
    """Operations of one batch: contexts once, every hypothesis at every step; without the scoring of candidates."""
    generator, (_, mask_BKS, doc_scores_BK) = _inputs(size, variant)
    rows = doc_scores_BK.numel() * (1 + BEAMS * (TOKENS - 1))
    return operations(generator, int(mask_BKS.sum()), rows, rows)


def measure(size: Size) -> list[Line]:
    """One line per variant and precision."""
    lines = []
    for variant, targets in TARGETS.items():
        useful = _useful(size, variant)
        # Their RAG-Sequence takes more than a minute a batch.
        rounds, warmup = (3, 1) if variant == "token" and size == "full" else (1, 0)
        with ExitStack() as stack:
            ours = {
                precision: stack.enter_context(Side(prepare_ours, size, variant, precision)) for precision in targets
            }
            peer = stack.enter_context(Side(prepare_peer, size, variant))
            for side in ours.values() if not warmup else ():
                side.run()
            pairs = in_turn(ours, peer, rounds, warmup)
        lines += [_line(variant, precision, targets[precision], pairs[precision], useful) for precision in targets]
    return lines


def _line(variant: Variant, precision: Precision, target: float, pairs: Any, useful: float) -> Line:
    ours, theirs = pairs.ours[-1].result, pairs.peer[-1].result
    equal = sum(answer == their_answer for (answer, _), their_answer in zip(ours, theirs, strict=True))
    return Line(
        path=f"decode_rag_{variant}, {BEAMS} beams, {TOKENS} tokens, {precision}",
        peer="generate, float32",
        value=pairs.speedup,
        target=target,
        limit_share=limit_share(useful, pairs.seconds, precision),
        memory=pairs.peak_ratio,
        outputs=f"{equal} of {len(ours)} best answers equal; {len({tuple(answer) for answer, _ in ours})} distinct",
        outputs_equal=equal == len(ours) or precision != "float32",
        details=pairs.details(),
    )


if __name__ == "__main__":
    main(measure)
