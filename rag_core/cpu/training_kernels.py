"""The CPU kernels of a generator's training pass, held until the gradient is computed where layers run twice."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

from rag_core.cpu.bfloat16 import matmul_attention
from rag_core.cpu.packed_linears import trainable_linears


@contextmanager
def training_kernels(model: nn.Module) -> Iterator[None]:
    """Inside the block, a model on the CPU uses the kernels that `rag_nll` chooses.

    `rag_nll` chooses them for its forward pass alone. With gradient checkpointing the backward pass runs the layers
    again, and must do so with the same kernels: enter this block under the forward pass's autocast, and leave it after
    the backward pass.
    """
    device = next(model.parameters()).device
    with trainable_linears(model):
        if device.type == "cpu" and torch.is_autocast_enabled("cpu"):
            with matmul_attention(model):
                yield
        else:
            yield
