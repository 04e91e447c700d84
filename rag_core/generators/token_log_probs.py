"""log p of labels from logits, without ever storing a log-softmax.

The logits are the largest tensor of a training step. Their log-softmax is stored neither forwards nor for the gradient;
the price is that second derivatives are not defined. Log-probabilities of tokens are float64, as they are V times
fewer: in float32, a long answer's log-probability of −1000 would separate passages only to the fourth digit. The price
is that the device must have float64.

Legend: N rows, R rows, T answer tokens, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

# The label of ignored positions: they add nothing to the loss.
IGNORE_INDEX = -100

# Logits per chunk, in elements: the float32 temporaries of half-precision logits stay within 4 MB.
_CHUNK_ELEMENTS = 1 << 20


def token_log_probs(logits_RTV: Tensor, labels_RT: Tensor) -> Tensor:
    """log p(label) = logit − logsumexp(logits) at each position, differentiable once in the logits.

    Exact to the relative precision of the logits' type, even for large logits and for a label whose p is nearly 1.

    Args:
        logits_RTV: floating point, shape (..., V); half precision is accumulated in float32.
        labels_RT: int64, shape (...), each in [0, V).

    Returns:
        Shape (...), float64.
    """
    log_probs: Tensor = _TokenLogProbs.apply(logits_RTV, labels_RT)
    return log_probs


@contextmanager
def projected_only_at(generator: Any, *places: Tensor) -> Iterator[None]:
    """Inside, the generator's head projects these positions only, so its logits have the shape (M, V).

    `places` index hidden states of shape (N, T, D): one bool mask (N, T), or int64 rows and positions.
    """

    def select(head: Any, hidden: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return (hidden[0][places], *hidden[1:])

    hook = generator.get_output_embeddings().register_forward_pre_hook(select)
    try:
        yield
    finally:
        hook.remove()


class _TokenLogProbs(torch.autograd.Function):
    """log-softmax at the label, in chunks of positions; the gradient onehot − softmax goes into one buffer.

    Autograd's own version keeps a float32 copy of half-precision logits, and makes three more tensors of that size in
    the backward pass. With m the greatest logit, rest = Σ_{v ≠ label} exp(x_v − m) and
    total = rest + exp(x_label − m):

        log p = (x_label − m) − log(total)
        d log p / d x_v = rest / total at the label, −exp(x_v − m) / total elsewhere

    `rest` is summed without the label, because 1 − p has no correct digit left where p is nearly 1. m is not added to
    log(total), because that sum rounds the logarithm away where logits are large.
    """

    @staticmethod
    def forward(ctx: Any, logits_RTV: Tensor, labels_RT: Tensor) -> Tensor:
        V = logits_RTV.shape[-1]
        logits_NV, labels_N1 = logits_RTV.reshape(-1, V), labels_RT.reshape(-1, 1)
        rows = max(1, _CHUNK_ELEMENTS // V)
        top_N1 = logits_NV.amax(dim=1, keepdim=True)
        rest_N1 = torch.cat(
            [
                _exp_from(logits, top).scatter_(1, labels, 0.0).sum(dim=1, keepdim=True)
                for logits, top, labels in zip(
                    logits_NV.split(rows), top_N1.split(rows), labels_N1.split(rows), strict=True
                )
            ]
        ).double()
        gap_N1 = logits_NV.gather(1, labels_N1).double() - top_N1.double()
        ctx.save_for_backward(logits_NV, labels_N1, top_N1, rest_N1, rest_N1 + gap_N1.exp())
        ctx.shape = logits_RTV.shape
        # log(total), written so that it is exact where the label has the greatest logit: gap = 0, total = 1 + rest.
        return (gap_N1 - (rest_N1 + gap_N1.expm1()).log1p()).view(logits_RTV.shape[:-1])

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, None]:
        logits_NV, labels_N1, top_N1, rest_N1, total_N1 = ctx.saved_tensors
        weight_N1 = grad_outputs[0].reshape(-1, 1) / total_N1
        at_label_N1 = weight_N1 * rest_N1
        grad_NV = torch.empty_like(logits_NV)
        rows = max(1, _CHUNK_ELEMENTS // logits_NV.shape[1])
        for start in range(0, len(labels_N1), rows):
            part = slice(start, start + rows)
            chunk_NV = _exp_from(logits_NV[part], top_N1[part])
            chunk_NV.mul_(-weight_N1[part].to(chunk_NV.dtype))
            grad_NV[part] = chunk_NV.scatter_(1, labels_N1[part], at_label_N1[part].to(chunk_NV.dtype))
        return grad_NV.view(ctx.shape), None


def _exp_from(logits_NV: Tensor, top_N1: Tensor) -> Tensor:
    """exp(logits − top), at least float32, in a new buffer."""
    return (at_least_float32(logits_NV) - top_N1).exp_()


def at_least_float32(x: Tensor) -> Tensor:
    """float64 stays; any other type becomes float32."""
    return x if x.dtype == torch.float64 else x.float()
