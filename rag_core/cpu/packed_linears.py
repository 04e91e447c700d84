"""Run linear layers on a CPU with oneDNN: with packed weights for inference, with plain weights for training.

PyTorch multiplies float32 with MKL, which packs the weights (lays them out for its kernels) at every call and
chooses kernels by the maker of the processor. oneDNN, which comes with PyTorch and is used by its compiler in the
same way, packs them once and chooses kernels by instruction set. Measured on two Zen 4 cores, 160 rows × 512 →
50,265: 82 GFLOP/s with MKL, 198 with packed weights; in bfloat16, 329 and 394. The price is a copy of the weights
inside the block. In training, weights change at every step and are packed at every call. float32 still gains (3,840
rows × 512 → 2,048: forward 172 and 211 GFLOP/s, gradient of the inputs 189 and 213); bfloat16 does not, because
PyTorch itself uses oneDNN for it.

Legend: N rows, I inputs, O outputs of a layer.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from rag_core.pretrained.rounded_weights import RoundedLinear

_PACKED = "_packed_for_inference"


@contextmanager
def packed_linears(module: nn.Module) -> Iterator[None]:
    """Inside the block, every linear layer of `module` on the CPU multiplies with packed weights.

    Under CPU autocast to bfloat16 the packed weights are bfloat16, as with autocast alone; otherwise they are float32,
    also those of layers that keep bf16 weights (`RoundedLinear`). Inside, gradients do not flow, and changes of the
    weights have no effect. Blocks may be nested: the outermost packs. Does nothing without oneDNN.
    """
    if getattr(module, _PACKED, False) or not torch.backends.mkldnn.is_available():
        yield
        return
    dtype = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else torch.float32
    setattr(module, _PACKED, True)
    try:
        with _forward_replaced(module, lambda layer: _packed_forward(layer, dtype)):
            yield
    finally:
        delattr(module, _PACKED)


@contextmanager
def folded_logits_bias(generator: nn.Module) -> Iterator[None]:
    """Inside the block, the output layer of a BART-like generator adds `final_logits_bias`.

    This saves a pass over the logits. The bias is usually zero, but adding it makes a second tensor as large as the
    logits, in float32 even if they are bfloat16. Other generators are left unchanged. Blocks may be nested.
    """
    head: Any = getattr(generator, "get_output_embeddings", lambda: None)()
    if "final_logits_bias" not in generator._buffers or type(head) is not nn.Linear or head.bias is not None:
        yield
        return
    bias_1V = generator._buffers.pop("final_logits_bias")
    assert bias_1V is not None
    generator.__dict__["final_logits_bias"] = _NoBias()
    head.bias = nn.Parameter(bias_1V.flatten(), requires_grad=False)
    try:
        yield
    finally:
        head.bias = None
        del generator.__dict__["final_logits_bias"]
        generator._buffers["final_logits_bias"] = bias_1V


class _NoBias:
    """Replaces the bias tensor in `logits + bias.to(device)` and leaves the logits unchanged."""

    def to(self, *_: Any) -> _NoBias:
        return self

    def __radd__(self, logits: Tensor) -> Tensor:
        return logits


@contextmanager
def trainable_linears(module: nn.Module) -> Iterator[None]:
    """Inside the block, every linear layer of `module` on the CPU uses oneDNN, for its outputs and gradients.

    bf16 weights are converted at every call. Does nothing under autocast or without oneDNN. Blocks may be nested.
    """
    if torch.is_autocast_enabled("cpu") or not torch.backends.mkldnn.is_available():
        yield
        return
    with _forward_replaced(module, _trainable_forward):
        yield


@contextmanager
def _forward_replaced(
    module: nn.Module, forward_of: Callable[[nn.Linear], Callable[[Tensor], Tensor]]
) -> Iterator[None]:
    # Other subclasses are left out: they may have their own forward pass. So are layers that an outer block replaced.
    layers = [
        layer
        for layer in module.modules()
        if isinstance(layer, nn.Linear)
        and type(layer) in (nn.Linear, RoundedLinear)
        and _packable(layer)
        and "forward" not in vars(layer)
    ]
    for layer in layers:
        layer.forward = forward_of(layer)  # type: ignore[method-assign, assignment]
    try:
        yield
    finally:
        for layer in layers:
            del layer.forward  # restores the class's own


def _trainable_forward(layer: nn.Linear) -> Callable[[Tensor], Tensor]:
    def forward(input: Tensor) -> Tensor:
        if input.dtype != torch.float32:  # T5 gives some layers states in the type of their weights
            return type(layer).forward(layer, input)
        # Reshape out here: a view returned by a custom autograd function cannot be changed in place, and LED does that.
        outputs_NO: Tensor = _Linear.apply(input.reshape(-1, input.shape[-1]), layer.weight, layer.bias)
        return outputs_NO.view(*input.shape[:-1], -1)

    return forward


class _Linear(torch.autograd.Function):
    """x Wᵀ + b, differentiable once."""

    @staticmethod
    def forward(ctx: Any, input_NI: Tensor, weight_OI: Tensor, bias_O: Tensor | None) -> Tensor:
        ctx.save_for_backward(input_NI, weight_OI)
        return _multiply(input_NI, weight_OI.to(input_NI.dtype), bias_O)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        input_NI, weight_OI = ctx.saved_tensors
        grad_NO = grad_outputs[0]
        of_input, of_weight, of_bias = ctx.needs_input_grad
        return (
            _multiply(grad_NO, weight_OI.to(grad_NO.dtype).t(), None) if of_input else None,
            # MKL is faster for this product, which sums over the rows.
            grad_NO.t() @ input_NI if of_weight else None,
            grad_NO.sum(0) if of_bias else None,
        )


def _multiply(input_NI: Tensor, weight_OI: Tensor, bias_O: Tensor | None) -> Tensor:
    product_NO: Tensor = torch.ops.mkldnn._linear_pointwise(input_NI, weight_OI, bias_O, "none", [], "")
    return product_NO


def _packable(layer: nn.Linear) -> bool:
    weight_OI = layer.weight
    usual = torch.float32 if type(layer) is nn.Linear else torch.bfloat16
    return weight_OI.device.type == "cpu" and weight_OI.dtype == usual and 0 not in weight_OI.shape


def _packed_forward(layer: nn.Linear, dtype: torch.dtype) -> Callable[[Tensor], Tensor]:
    with torch.no_grad():
        weight_OI = torch.ops.mkldnn._reorder_linear_weight(layer.weight.detach().to(dtype))
        bias_O = None if layer.bias is None else layer.bias.detach().to(dtype)

    def forward(input: Tensor) -> Tensor:
        input_NI = input.to(dtype).reshape(-1, input.shape[-1])
        return _multiply(input_NI, weight_OI, bias_O).view(*input.shape[:-1], -1)

    return forward
