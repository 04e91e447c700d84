"""Keep a frozen model's matrices in bfloat16, and multiply in the type of the activations.

Only matrices that are never trained are rounded: those of linear layers, and the embeddings of tokens. Everything else
(norms, biases, positions) stays float32, and so do the states between layers, which a model held entirely in bfloat16
would round as well. So two things hold for weights that were published in bfloat16, as today's language models are:
under bf16 autocast, results equal those of float32 weights to the last bit, because autocast would round the weights in
the same way; without autocast, each product converts its weights, and results equal those of float32 weights, too.

Legend: N rows, I inputs, O outputs of a layer.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from torch.nn import functional
from transformers import PreTrainedModel

from rag_core.pretrained.hub.files import indexed_shards, weight_files

_GIVES_FLOAT32 = "_gives_float32"


class RoundedLinear(nn.Linear):
    """A frozen linear layer with bf16 weights. Its product has the type of its input, or that of autocast."""

    def forward(self, input: Tensor) -> Tensor:
        if torch.is_autocast_enabled(input.device.type):
            return functional.linear(input, self.weight, self.bias)
        output: Tensor = _Product.apply(input, self.weight, self.bias)
        return output


class _Product(torch.autograd.Function):
    """x Wᵀ + b in the type of x. The weights get no gradient; the backward pass converts them again.

    Autograd alone would keep every converted matrix until the backward pass, which is what rounding is to save.
    """

    @staticmethod
    def forward(ctx: Any, input: Tensor, weight_OI: Tensor, bias_O: Tensor | None) -> Tensor:
        ctx.save_for_backward(weight_OI)
        bias_O = None if bias_O is None else bias_O.to(input.dtype)
        return functional.linear(input, weight_OI.to(input.dtype), bias_O)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, None, None]:
        (weight_OI,) = ctx.saved_tensors
        return grad_outputs[0] @ weight_OI.to(grad_outputs[0].dtype), None, None


def round_weights(model: nn.Module) -> None:
    """Round the matrices of a model in place, and freeze the model. All other floating-point tensors become float32."""
    model.requires_grad_(False)
    for module in model.modules():
        if type(module) is nn.Linear:
            module.__class__ = RoundedLinear
        elif isinstance(module, PreTrainedModel):
            _keep_states_in_float32(module.get_input_embeddings())
    matrices = {
        id(module.weight)
        for module in model.modules()
        if isinstance(module, RoundedLinear) or hasattr(module, _GIVES_FLOAT32)
    }
    for parameter in model.parameters():
        parameter.data = parameter.data.to(torch.bfloat16 if id(parameter) in matrices else torch.float32)
    for module in model.modules():
        for name, buffer in module.named_buffers(recurse=False):
            if buffer.is_floating_point():
                setattr(module, name, buffer.float())


def _keep_states_in_float32(embeddings: nn.Module) -> None:
    """Convert what embeddings of tokens give, because the states between layers start there."""
    if isinstance(embeddings, nn.Embedding) and not hasattr(embeddings, _GIVES_FLOAT32):
        embeddings.register_forward_hook(lambda module, inputs, output: output.float())
        setattr(embeddings, _GIVES_FLOAT32, True)


def stored_type(folder: str) -> torch.dtype:
    """bfloat16 if all weights of a model folder are stored in it, so that loading them so loses nothing; else float32."""
    names = weight_files(path.name for path in Path(folder).glob("*"))
    files = indexed_shards(Path(folder) / names[0]) if names and names[0].endswith(".index.json") else names[:1]
    types = set()
    for name in files:
        try:
            with safe_open(Path(folder) / name, framework="pt") as file:
                types |= {file.get_slice(key).get_dtype() for key in file.keys()}  # noqa: SIM118  (a file, not a dict)
        except (OSError, SafetensorError):  # a pickle, or damaged: the loader says so
            return torch.float32
    return torch.bfloat16 if types == {"BF16"} else torch.float32
