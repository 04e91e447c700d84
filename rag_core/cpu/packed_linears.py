"""Linear layers on a CPU by oneDNN: for inference with weights that are laid out once, for training as they are.

PyTorch multiplies float32 with MKL, which lays the weights out anew at every call and chooses kernels by the maker of
the processor. oneDNN, which PyTorch brings along and its compiler uses in the same way, keeps the layout and chooses by
instruction set. Measured on two Zen 4 cores, 160 rows × 512 → 50,265: 82 GFLOP/s with MKL, 198 with packed weights;
bfloat16 329 and 394. The price is a copy of the weights while the block runs. In training the weights change at every
step and are laid out at every call; float32 gains all the same (3,840 rows × 512 → 2,048: forward 172 and 211, gradient
of the inputs 189 and 213), bfloat16 does not, since PyTorch itself takes oneDNN there.

Legend: N rows, I inputs, O outputs of a layer.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

_PACKED = "_packed_for_inference"


@contextmanager
def packed_linears(module: nn.Module) -> Iterator[None]:
    """Inside, every `nn.Linear` of `module` that is float32 and on the CPU multiplies with packed weights.

    Under CPU autocast to bfloat16 the packed weights are bfloat16, as autocast's own would be. Gradients do not flow
    and changes of the weights are not seen inside. Blocks may be nested: the outermost packs. Where oneDNN is missing
    nothing happens.
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
    """Inside, a BART-like generator's `final_logits_bias` is added by its head, without a pass over the logits.

    It is mostly zero, but adding it makes a second tensor of that size, in float32 even where logits are bfloat16.
    Others are left as they are. Blocks may be nested.
    """
    head: Any = getattr(generator, "get_output_embeddings", lambda: None)()
    if "final_logits_bias" not in generator._buffers or type(head) is not nn.Linear or head.bias is not None:
        yield
        return
    bias_1V = generator._buffers.pop("final_logits_bias")
    assert bias_1V is not None
    generator.__dict__["final_logits_bias"] = _AddsNothing()
    head.bias = nn.Parameter(bias_1V.flatten(), requires_grad=False)
    try:
        yield
    finally:
        head.bias = None
        del generator.__dict__["final_logits_bias"]
        generator._buffers["final_logits_bias"] = bias_1V


class _AddsNothing:
    """Stands for a tensor in `logits + bias.to(device)`."""

    def to(self, *_: Any) -> _AddsNothing:
        return self

    def __radd__(self, logits: Tensor) -> Tensor:
        return logits


@contextmanager
def trainable_linears(module: nn.Module) -> Iterator[None]:
    """Inside, every float32 `nn.Linear` of `module` on the CPU multiplies with oneDNN, and so will its gradients.

    Does nothing under autocast, and where oneDNN is missing.
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
    # Not in subclasses: they may have a forward pass of their own.
    layers = [one for one in module.modules() if type(one) is nn.Linear and _packable(one)]
    for layer in layers:
        layer.forward = forward_of(layer)  # type: ignore[method-assign, assignment]
    try:
        yield
    finally:
        for layer in layers:
            del layer.forward  # the class's own is seen again


def _trainable_forward(layer: nn.Linear) -> Callable[[Tensor], Tensor]:
    def forward(input: Tensor) -> Tensor:
        # Shaped out here: what a function of our own returns as a view could not be changed in place (LED does).
        outputs_NO: Tensor = _Linear.apply(input.reshape(-1, input.shape[-1]), layer.weight, layer.bias)
        return outputs_NO.view(*input.shape[:-1], -1)

    return forward


class _Linear(torch.autograd.Function):
    """x Wᵀ + b, differentiable once."""

    @staticmethod
    def forward(ctx: Any, input_NI: Tensor, weight_OI: Tensor, bias_O: Tensor | None) -> Tensor:
        ctx.save_for_backward(input_NI, weight_OI)
        return _multiply(input_NI, weight_OI, bias_O)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        input_NI, weight_OI = ctx.saved_tensors
        grad_NO = grad_outputs[0]
        of_input, of_weight, of_bias = ctx.needs_input_grad
        return (
            _multiply(grad_NO, weight_OI.t(), None) if of_input else None,
            # MKL's product is the faster one here, where the rows are summed out.
            grad_NO.t() @ input_NI if of_weight else None,
            grad_NO.sum(0) if of_bias else None,
        )


def _multiply(input_NI: Tensor, weight_OI: Tensor, bias_O: Tensor | None) -> Tensor:
    product_NO: Tensor = torch.ops.mkldnn._linear_pointwise(input_NI, weight_OI, bias_O, "none", [], "")
    return product_NO


def _packable(layer: nn.Linear) -> bool:
    return layer.weight.device.type == "cpu" and layer.weight.dtype == torch.float32 and 0 not in layer.weight.shape


def _packed_forward(layer: nn.Linear, dtype: torch.dtype) -> Callable[[Tensor], Tensor]:
    with torch.no_grad():
        weight_OI = torch.ops.mkldnn._reorder_linear_weight(layer.weight.detach().to(dtype))
        bias_O = None if layer.bias is None else layer.bias.detach().to(dtype)

    def forward(input: Tensor) -> Tensor:
        input_NI = input.to(dtype).reshape(-1, input.shape[-1])
        return _multiply(input_NI, weight_OI, bias_O).view(*input.shape[:-1], -1)

    return forward
