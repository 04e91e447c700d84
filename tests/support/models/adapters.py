"""Generators with LoRA adapters whose weights are random, so that adapters that are left out show in every result."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import torch
from transformers.pytorch_utils import Conv1D

from rag_core.model.adapters.adapter_files import write_adapters
from rag_core.model.adapters.lora import LoraSettings, add_adapters, is_adapter
from rag_core.model.reader import load_generator

LORA = LoraSettings(rank=3, alpha=6, targets="all-linear")


def with_adapters(generator: Any, settings: LoraSettings = LORA, source: str = "/base", std: float = 0.3) -> Any:
    """Put adapters with random weights into `generator`, and return it."""
    add_adapters(generator, settings, source)
    draws = torch.Generator().manual_seed(7)
    for name, weight in generator.named_parameters():
        if is_adapter(name):
            weight.data.normal_(std=std, generator=draws)
    return generator


def merged(generator: Any, settings: LoraSettings = LORA) -> Any:
    """A copy of the generator in which plain layers compute what the formula says of layers with adapters."""
    plain = copy.deepcopy(generator)
    for name, layer in list(plain.named_modules()):
        if hasattr(layer, "lora_A"):
            down, up = layer.lora_A["default"].weight.detach(), layer.lora_B["default"].weight.detach()
            delta = settings.alpha / settings.rank * (up @ down)
            base = layer.base_layer
            base.weight.data += delta.T if isinstance(base, Conv1D) else delta
            parent, _, end = name.rpartition(".")
            setattr(plain.get_submodule(parent), end, base)
    assert not any("lora" in name for name in plain.state_dict())
    return plain


def make_adapters(folder: Path, base: Path, settings: LoraSettings = LORA, std: float = 0.3) -> Path:
    """A folder of adapters for the generator in `base`."""
    generator, tokenizer = load_generator(base)
    write_adapters(with_adapters(generator, settings, str(base), std), folder)
    tokenizer.save_pretrained(folder)
    return folder
