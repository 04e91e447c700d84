"""A generator's weights without adapters: each adapter is added to the matrix beside which it stands.

W + (alpha / rank) · B A in float32 gives the same function as the adapters, to rounding. The generator itself keeps its
adapters, so training and answering are not disturbed.
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import torch

from rag_core.model.adapters.lora import NAME, base_of

_BASE_LAYER = ".base_layer"


def plain_weights(generator: Any) -> dict[str, torch.Tensor]:
    """The state dict of a generator; for one with adapters, of its class without them, merged, in float32."""
    state: dict[str, torch.Tensor] = generator.state_dict()
    if base_of(generator) is None:
        return state
    modules = dict(generator.named_modules())
    plain: dict[str, torch.Tensor] = {}
    for name, tensor in state.items():
        if ".lora_" in name:
            continue
        layer, is_adapted, part = name.rpartition(f"{_BASE_LAYER}.")
        tensor = tensor.float() if tensor.is_floating_point() else tensor
        if is_adapted and part == "weight":
            tensor = tensor + modules[layer].get_delta_weight(NAME).detach()
        plain[name.replace(f"{_BASE_LAYER}.", ".")] = tensor
    return plain


def write_merged(generator: Any, folder: Path, dtype: torch.dtype) -> None:
    """Write a generator as a plain Transformers folder, with its adapters merged and its weights in `dtype`."""
    with torch.device("meta"):
        # On "meta" it takes no memory and draws no random numbers: we need only its saving code.
        plain = type(generator)(copy.deepcopy(generator.config))
    plain.to(dtype).generation_config = generator.generation_config
    converted: dict[tuple[int, torch.Size], torch.Tensor] = {}
    weights = {}
    for name, tensor in plain_weights(generator).items():
        # Tied weights share their memory, and are written once.
        key = (tensor.data_ptr(), tensor.shape)
        converted.setdefault(key, tensor.to(dtype) if tensor.is_floating_point() else tensor)
        weights[name] = converted[key]
    plain.save_pretrained(folder, state_dict=weights)
