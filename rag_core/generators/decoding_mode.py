"""Switch a generator to decoding and back: evaluation mode, no autograd, packed weights."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from rag_core.cpu.packed_linears import folded_logits_bias, packed_linears


@contextmanager
def decoding_mode(generator: Any) -> Iterator[None]:
    """Evaluation mode without autograd; every module gets its former mode back afterwards."""
    was_training = [(module, module.training) for module in generator.modules()]
    generator.eval()
    try:
        with torch.inference_mode(), folded_logits_bias(generator), packed_linears(generator):
            yield
    finally:
        for module, training in was_training:
            module.training = training
