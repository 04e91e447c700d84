"""LoRA: a frozen generator learns a small product of two matrices beside some of its linear layers.

Hu et al. 2021 (arXiv 2106.09685): W x becomes W x + (alpha / rank) · B A x, with A of shape (rank, inputs) and B of shape
(outputs, rank). `peft` puts these layers into the generator in place, so it keeps its class, and likelihood and decoders
work unchanged. B starts at zero and A from the draws of the caller's generator. Adapters are float32.

This module knows nothing of files; `adapter_files.py` reads and writes them. peft has no types and takes time to import,
so it is imported where it is used.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field, field_validator
from torch import nn
from transformers.pytorch_utils import Conv1D

from rag_core.embeddings.text_encoder import fingerprint_of_weights
from rag_core.errors import ConfigError

# The name under which peft keeps our adapters in each layer.
NAME = "default"
_BASE, _FINGERPRINT = "_rag_base_model", "_rag_base_fingerprint"
# Where peft knows nothing of an architecture, it gets what peft chooses for nearly all others.
_USUAL = ("q_proj", "v_proj")
_ALL_LINEAR = "all-linear"


class LoraSettings(BaseModel):
    """LoRA of the generator. Its own weights stay frozen."""

    model_config = ConfigDict(extra="forbid")

    rank: int = Field(16, ge=1, description="rank of the adapters")
    alpha: float = Field(32.0, gt=0, description="adapters count alpha / rank times")
    dropout: float = Field(0.0, ge=0, lt=1, description="dropout of what the adapters read")
    targets: list[str] | Literal["all-linear"] | None = Field(
        None,
        description="names of the layers that get adapters, such as [q_proj, v_proj], or all-linear; empty: what peft "
        "chooses for the architecture",
    )

    @field_validator("targets")
    @classmethod
    def _some(cls, targets: Any) -> Any:
        if isinstance(targets, list) and (not targets or not all(targets)):
            raise ValueError("give at least one name of a layer, or leave it out")
        return targets


@dataclass(frozen=True)
class BaseModelName:
    """The model that adapters belong to: its source, its fingerprint as float32 weights, and how its weights are held."""

    source: str
    fingerprint: str
    dtype: str = "float32"


def base_of(generator: Any) -> BaseModelName | None:
    """The base of a generator with adapters; None if it has none."""
    base: BaseModelName | None = getattr(generator, _BASE, None)
    return base


def base_fingerprint(generator: nn.Module) -> str:
    """`fingerprint_of_weights` of a generator without adapters, as float32 weights."""
    return getattr(generator, _FINGERPRINT, None) or fingerprint_of_weights(generator, dtype=torch.float32)


def remember_fingerprint(generator: nn.Module) -> None:
    """Keep the fingerprint of a generator whose weights are about to be rounded."""
    setattr(generator, _FINGERPRINT, base_fingerprint(generator))


def check_lora(generator: nn.Module, settings: LoraSettings | None, rate: float, dtype: str | None = None) -> None:
    """Check before training that settings and generator fit each other.

    Args:
        generator: the generator that training starts from.
        settings: those of `train.lora`; None trains all weights.
        rate: the generator's learning rate.
        dtype: the setting `model.generator_dtype`.

    Raises:
        ConfigError: adapters at learning rate 0; a generator with adapters and other settings, or none; frozen weights
            in bfloat16 that would be trained; or targets that match nothing.
    """
    if settings and not rate:
        raise ConfigError(
            "train.lora is set, but train.rates.generator is 0, so the adapters would never learn. Set it above 0 "
            "(1e-4 is usual for LoRA), or remove train.lora."
        )
    present = adapter_config(generator)
    if present is not None:
        if rate:
            _check_continuing(generator, present, settings)
    elif settings:
        adapted_layers(generator, settings.targets)
    elif dtype == "bfloat16":
        raise ConfigError(
            "model.generator_dtype is bfloat16, but train.lora is not set. Weights that are trained stay float32, since "
            "small updates vanish in bfloat16. Set train.lora, or remove generator_dtype."
        )


def add_adapters(generator: Any, settings: LoraSettings, source: str) -> None:
    """Put fresh adapters into a generator, or go on with those that it has. Only adapters are trainable afterwards.

    Args:
        generator: a generator that `check_lora` accepts; changed in place.
        settings: rank, alpha, dropout and targets.
        source: the name under which the generator can be loaded again.
    """
    from peft import LoraConfig

    present = adapter_config(generator)
    if present is None:
        layers = adapted_layers(generator, settings.targets)
        modules = dict(generator.named_modules())
        name = BaseModelName(source, base_fingerprint(generator), _type_of(generator))
        config = LoraConfig(
            r=settings.rank,
            lora_alpha=int(settings.alpha) if settings.alpha.is_integer() else settings.alpha,  # type: ignore[arg-type]
            lora_dropout=settings.dropout,
            target_modules=_short_names(generator, layers),
            fan_in_fan_out=all(isinstance(modules[layer], Conv1D) for layer in layers),
            task_type="SEQ_2_SEQ_LM" if generator.config.is_encoder_decoder else "CAUSAL_LM",
        )
        weights = {key: value for layer in layers for key, value in _fresh(layer, modules[layer], settings.rank)}
        inject(generator, config, weights, name)
    adapter_config(generator).lora_dropout = settings.dropout
    for module in generator.modules():
        dropouts = getattr(module, "lora_dropout", None)
        if isinstance(dropouts, nn.ModuleDict):
            dropouts[NAME] = nn.Dropout(settings.dropout) if settings.dropout else nn.Identity()
    for key, parameter in generator.named_parameters():
        parameter.requires_grad_(is_adapter(key))


def inject(generator: Any, config: Any, weights: Mapping[str, torch.Tensor], base: BaseModelName) -> None:
    """Put the adapters of a peft configuration into a generator in place, with these weights.

    Args:
        generator: the base, without adapters.
        config: peft's `LoraConfig`.
        weights: the adapters' weights by the names that `named_parameters` of the result has, float32.
        base: where the generator comes from.

    Raises:
        ConfigError: the weights are not those of the configuration's adapters.
    """
    from peft import inject_adapter_in_model

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # notes of peft on layers that it treats rightly
        # On "meta" the adapters take no memory and draw no random numbers.
        inject_adapter_in_model(config, generator, adapter_name=NAME, low_cpu_mem_usage=True)
    expected = {name: weight.shape for name, weight in generator.named_parameters() if is_adapter(name)}
    actual = {name: weight.shape for name, weight in weights.items()}
    if expected != actual:
        differing = sorted(name for name in expected.keys() | actual.keys() if expected.get(name) != actual.get(name))
        raise ConfigError(
            f"The adapters do not fit their base {base.source}: {len(differing)} of their weights are missing, left "
            f"over or of another shape ({differing[0]}, …). The base may be another model than the one that they were "
            "trained on. Choose other adapters, or correct the base's name."
        )
    device = next(weight.device for weight in generator.parameters() if weight.device.type != "meta")
    generator.load_state_dict({name: weight.to(device) for name, weight in weights.items()}, strict=False, assign=True)
    setattr(generator, _BASE, base)


def is_adapter(name: str) -> bool:
    """Whether a parameter with this name belongs to an adapter."""
    return ".lora_A." in name or ".lora_B." in name


def adapter_config(generator: Any) -> Any:
    """peft's configuration of the adapters in a generator; None if there are none."""
    return generator.peft_config[NAME] if base_of(generator) else None


def adapted_layers(generator: Any, targets: list[str] | str | None) -> list[str]:
    """Names of the layers of a generator without adapters that get adapters.

    A target is the last part of a layer's name, or several parts ("self_attn.q_proj").

    Raises:
        ConfigError: a target matches no layer, or something other than a linear layer; or peft knows no targets for the
            architecture.
    """
    linear = linear_layers(generator)
    if targets == _ALL_LINEAR:
        return linear
    chosen, named = _default_targets(generator, linear) if targets is None else targets, dict(generator.named_modules())
    layers: list[str] = []
    for target in chosen:
        matched = [name for name in named if name == target or name.endswith(f".{target}")]
        wrong = [name for name in matched if name not in linear]
        if not matched or wrong:
            finding = (
                f"matches {wrong[0]}, a {type(named[wrong[0]]).__name__}, but adapters go beside linear layers other "
                "than the head, and not to embeddings,"
                if wrong
                else "matches no layer"
            )
            raise ConfigError(
                f"train.lora.targets: {target!r} {finding} of the generator ({type(generator).__name__}). "
                f"{_examples(linear)}"
            )
        layers += matched
    return list(dict.fromkeys(layers))


def linear_layers(generator: Any) -> list[str]:
    """Names of the layers that can have adapters: linear, and not tied to the embeddings or the head itself."""
    head = generator.get_output_embeddings()
    embeddings = {id(module.weight) for module in generator.modules() if isinstance(module, nn.Embedding)}
    return [
        name
        for name, module in generator.named_modules()
        if isinstance(module, nn.Linear | Conv1D) and module is not head and id(module.weight) not in embeddings
    ]


def _default_targets(generator: Any, linear: list[str]) -> list[str]:
    from peft.utils import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING as KNOWN

    # An EncoderDecoderModel has a configuration for each side.
    sides: list[Any] = [getattr(generator.config, side, None) for side in ("encoder", "decoder")]
    configs = [side for side in sides if hasattr(side, "model_type")] or [generator.config]
    chosen = {target for config in configs for target in KNOWN.get(config.model_type, ())}
    if not chosen and all(any(name.endswith(f".{target}") for name in linear) for target in _USUAL):
        chosen = set(_USUAL)
    if not chosen:
        raise ConfigError(
            f"peft knows no usual LoRA targets for a {type(generator).__name__} "
            f"({', '.join(config.model_type for config in configs)}). Set train.lora.targets. {_examples(linear)}"
        )
    return sorted(chosen)


def _examples(linear: list[str]) -> str:
    ends = list(dict.fromkeys(name.rpartition(".")[2] for name in linear))
    more = ", …" if len(ends) > 12 else ""
    return f"It has linear layers called {', '.join(ends[:12])}{more} (the first one in full: {linear[0]})."


def _short_names(generator: Any, layers: list[str]) -> list[str]:
    """The last parts of the layers' names where those name exactly these layers, else the whole names."""
    ends = {name.rpartition(".")[2] for name in layers}
    matched = {name for name, _ in generator.named_modules() if name.rpartition(".")[2] in ends}
    return sorted(ends if matched == set(layers) else layers)


def _fresh(layer: str, module: Any, rank: int) -> list[tuple[str, torch.Tensor]]:
    """An adapter's first weights, as peft and the paper's own code start them: A like a linear layer's, B zero."""
    inputs, outputs = module.weight.shape[:: 1 if isinstance(module, Conv1D) else -1]
    a_RI = nn.init.kaiming_uniform_(torch.empty(rank, inputs), a=math.sqrt(5))
    return [(f"{layer}.lora_A.{NAME}.weight", a_RI), (f"{layer}.lora_B.{NAME}.weight", torch.zeros(outputs, rank))]


def _type_of(generator: nn.Module) -> str:
    rounded = any(parameter.dtype == torch.bfloat16 for parameter in generator.parameters())
    return "bfloat16" if rounded else "float32"


def _check_continuing(generator: Any, present: Any, settings: LoraSettings | None) -> None:
    """Raise ConfigError unless `settings` are those of the adapters that the generator has. Dropout may differ."""
    has = f"rank {present.r}, alpha {present.lora_alpha:g}, targets {sorted(present.target_modules)}"
    if settings is None:
        raise ConfigError(
            f"The generator has LoRA adapters ({has}), but train.lora is not set. To train these adapters further, set "
            "train.lora to the same rank, alpha and targets. To train all weights, merge the adapters first "
            "(`rag export`) and give the merged generator."
        )
    suffix = ".base_layer"
    present_layers = {name.removesuffix(suffix) for name, _ in generator.named_modules() if name.endswith(suffix)}
    wanted = present_layers if settings.targets is None else _adapted_again(generator, settings.targets)
    if (present.r, present.lora_alpha, present_layers) != (settings.rank, settings.alpha, wanted):
        raise ConfigError(
            f"The generator has LoRA adapters already ({has}), and train.lora asks for others (rank {settings.rank}, "
            f"alpha {settings.alpha:g}, targets {settings.targets}). Set train.lora to the same values to train these "
            "adapters further, or merge them first (`rag export`) and give the merged generator for new ones."
        )


def _adapted_again(generator: Any, targets: list[str] | str) -> set[str]:
    """The layers that `targets` name in a generator that has adapters."""
    head = generator.get_output_embeddings()
    names = {
        name.removesuffix(".base_layer")
        for name, module in generator.named_modules()
        if isinstance(module, nn.Linear | Conv1D) and module is not head and ".lora_" not in name
    }
    if targets == _ALL_LINEAR:
        return names
    return {name for name in names if any(name == target or name.endswith(f".{target}") for target in targets)}
