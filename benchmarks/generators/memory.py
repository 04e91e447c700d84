"""Peak memory and time of a training step: all weights, LoRA, layers computed again, and the base in bfloat16.

Every way has a process of its own. It does a few steps of RAG-Token with AdamW under bf16 autocast, as in training; what
counts is the whole process's peak memory in a step (resident, with Python, PyTorch and the weights). Losses of the first
step must be equal, to bfloat16's rounding of the base.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack

import torch
from transformers import BartForConditionalGeneration

from benchmarks.harness import Line, Run, Side, Size, Spread, main
from benchmarks.parts.models import answers, bart, contexts

RANK = 16
# Of each way: whether it trains adapters, computes layers again, and holds the base in bfloat16; and the largest share of
# the memory of training all weights that is expected.
WAYS: dict[str, tuple[bool, bool, bool, float]] = {
    "all weights": (False, False, False, 1.0),
    "all weights, layers computed again": (False, True, False, 0.9),
    "LoRA": (True, False, False, 0.8),
    "LoRA, layers computed again": (True, True, False, 0.5),
    "LoRA, base in bfloat16": (True, False, True, 0.7),
    "LoRA, layers computed again, base in bfloat16": (True, True, True, 0.4),
}


def generator_of(size: Size) -> BartForConditionalGeneration:
    """The BART-like model of the other benchmarks, at full size with layers twice as wide (228 M parameters)."""
    model: BartForConditionalGeneration = bart(size, d_model=1024 if size == "full" else None)
    return model


def prepare(size: Size, way: str) -> Callable[[], float]:
    """A training step; it returns the loss."""
    from rag_core.cpu.heap import keep_freed_blocks, return_freed_blocks
    from rag_core.cpu.training_kernels import training_kernels
    from rag_core.model.adapters.lora import LoraSettings, add_adapters
    from rag_core.pretrained.rounded_weights import round_weights
    from rag_core.reading.likelihood import rag_nll
    from rag_core.training.recomputation import recompute_layers

    lora, recomputes, rounded, _ = WAYS[way]
    generator = generator_of(size)
    inputs = contexts(size, generator)
    labels_BT = answers(generator.config.vocab_size, len(inputs[0]), 12)
    if rounded:
        round_weights(generator)
    if lora:
        add_adapters(generator, LoraSettings(rank=RANK), "benchmark")
    if recomputes:
        recompute_layers(generator)
    generator.train()
    return_freed_blocks()
    keep_freed_blocks()
    trained = [weight for weight in generator.parameters() if weight.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-5, fused=True)

    def step() -> float:
        with ExitStack() as until_backward:
            with torch.autocast("cpu", dtype=torch.bfloat16):
                until_backward.enter_context(training_kernels(generator))
                nll = rag_nll(generator, *inputs, labels_BT, variant="token").mean()
            nll.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return nll.item()

    return step


def measure(size: Size) -> list[Line]:
    """One line per way."""
    lines, whole = list[Line](), list[Run]()
    for way in WAYS:
        with Side(prepare, size, way) as side:
            runs = [side.run() for _ in range(2)]
        whole = whole or runs
        lines.append(_line(way, runs, whole))
    return lines


def _line(way: str, runs: Sequence[Run], whole: Sequence[Run]) -> Line:
    (lora, _, _, target), loss, expected = WAYS[way], runs[0].result, whole[0].result
    seconds = [run.seconds for run in runs[1:]]
    return Line(
        path=f"memory of a training step: {way}" + (f" (rank {RANK})" if lora else ""),
        peer="all weights",
        value=Spread.of([max(run.peak_bytes for run in runs) / max(run.peak_bytes for run in whole)]),
        unit="× the peak memory",
        target=target,
        higher_is_better=False,
        outputs=f"first loss {loss:.4f} and {expected:.4f}",
        outputs_equal=abs(loss / expected - 1) < 1e-2,
        details={"peak_mb": max(run.peak_bytes for run in runs) // 2**20, "seconds": [round(s, 3) for s in seconds]},
    )


if __name__ == "__main__":
    main(measure)
