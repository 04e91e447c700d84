"""Folders that hold adapters and name their base: those of our models, and PEFT's.

A folder has PEFT's two files, `adapter_model.safetensors` and `adapter_config.json`, so PEFT and Transformers load it as
well. Ours also has `base_model.json`: where the base is (a folder, a hub's commit, a package), its fingerprint, and
whether its weights were held in bfloat16. The base is loaded from there, or, if the folder has moved with its
neighbours, from beside it. A base with another fingerprint is refused: adapters are differences to exactly one model.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import BaseModel, ConfigDict, ValidationError
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from rag_core.errors import ConfigError
from rag_core.model.adapters.lora import (
    NAME,
    BaseModelName,
    adapter_config,
    base_fingerprint,
    base_of,
    inject,
    is_adapter,
)
from rag_core.pretrained.hub.files import ADAPTER, ADAPTER_CONFIG, weight_files
from rag_core.pretrained.hub.name import name_of_snapshot, parse_hub_name
from rag_core.pretrained.model_source import pin_source, read_json

BASE_FILE = "base_model.json"
# PEFT's files name weights as its own wrapper of the model does.
_PREFIX = "base_model.model."
GeneratorType = Literal["float32", "bfloat16"]
# Loads a base from its source, its weights held in this type.
LoadBase = Callable[[str, GeneratorType], Any]
# Settings of PEFT that change neither what is computed nor which files are needed, or that plain LoRA has as well.
_PLAIN = {
    *("peft_type", "task_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision"),
    *("inference_mode", "r", "lora_alpha", "lora_dropout", "target_modules", "exclude_modules", "fan_in_fan_out"),
    *("use_rslora", "layers_to_transform", "layers_pattern", "rank_pattern", "alpha_pattern", "runtime_config"),
    *("loftq_config", "eva_config", "corda_config", "lora_ga_config", "megatron_config", "megatron_core"),
}

_NUMBERS: dict[str, Any] = {"r": int, "lora_alpha": int | float}


class _BaseFile(BaseModel):
    """The contents of `base_model.json`."""

    model_config = ConfigDict(extra="forbid")

    source: str
    fingerprint: str
    dtype: GeneratorType = "float32"


def is_adapter_folder(folder: str | Path) -> bool:
    """Whether a model folder holds adapters alone, without the weights of their base."""
    names = [path.name for path in Path(folder).glob("*")]
    return ADAPTER_CONFIG in names and weight_files(names)[:1] in ([], [ADAPTER])


def write_adapters(generator: Any, folder: Path) -> None:
    """Write a generator's adapters into a folder that `load_adapted` reads. The same adapters give the same bytes."""
    base, config = base_of(generator), adapter_config(generator).to_dict()
    assert base is not None
    folder.mkdir(parents=True, exist_ok=True)
    weights = {
        _PREFIX + name.replace(f".{NAME}.", "."): weight.detach().float().cpu().contiguous()
        for name, weight in generator.named_parameters()
        if is_adapter(name)
    }
    save_file(weights, folder / ADAPTER, metadata={"format": "pt"})
    hub = parse_hub_name(base.source) if "@" in base.source else None
    config |= {
        "base_model_name_or_path": hub.repo if hub else base.source,
        "revision": hub.commit if hub else None,
        "inference_mode": True,
    }
    _write_json(folder / ADAPTER_CONFIG, config)
    _write_json(folder / BASE_FILE, _BaseFile(**vars(base)).model_dump())


def load_adapted(folder: Path, load_base: LoadBase, dtype: GeneratorType | None = None) -> tuple[Any, str]:
    """Load the base of an adapter folder, and put the adapters into it.

    Args:
        folder: adapters and their configuration.
        load_base: loads a model from its source, with weights in a type.
        dtype: how to hold the base's weights; default: as in training.

    Returns:
        the generator, and the source of its tokenizer: the folder, or the base if the folder has none.

    Raises:
        ConfigError: the adapters are not plain LoRA, damaged, or do not fit the base; or the base is missing or another
            model than the one they were trained on.
    """
    config, base = _read_config(folder), _read_base(folder)
    source, fingerprint = (base.source, base.fingerprint) if base else (_named_base(folder, config), None)
    dtype = dtype or (base.dtype if base else "float32")
    generator, found_at = _load_from_one_of(list(_places(folder, source)), load_base, dtype, folder)
    actual = base_fingerprint(generator)
    if fingerprint not in (None, actual):
        raise ConfigError(
            f"{_named(folder)} holds LoRA adapters of another model than {found_at}: its weights have the fingerprint "
            f"{actual[:12]}…, but the adapters were trained on {str(fingerprint)[:12]}…. Put the model that they were "
            f"trained on there again, or beside the trained model's folder."
        )
    inject(generator, config, _read_weights(folder), BaseModelName(pin_source(found_at), actual, dtype))
    has_tokenizer = any((folder / name).is_file() for name in ("tokenizer_config.json", "tokenizer.json"))
    return generator, str(folder) if has_tokenizer else found_at


def _places(folder: Path, source: str) -> Iterator[str]:
    """Where the base may be: its recorded source; and, for a folder, the same name beside the trained model."""
    yield source
    path = Path(source)
    if path.is_absolute():
        for parts in (1, 2):  # runs/a/generator, or a part of another model: runs/a/rag-token/generator
            beside = folder.parent.parent.joinpath(*path.parts[-parts:])
            if beside.is_dir() and beside.resolve() != folder.resolve():
                yield str(beside)


def _load_from_one_of(places: list[str], load_base: LoadBase, dtype: GeneratorType, folder: Path) -> tuple[Any, str]:
    errors: list[ConfigError] = []
    for place in places:
        try:
            return load_base(place, dtype), place
        except ConfigError as error:
            errors.append(error)
    raise ConfigError(
        f"{_named(folder)} holds LoRA adapters only, and their base {places[0]} cannot be loaded. {errors[0]} Make the "
        "base available there again, or put it beside the trained model's folder. Where the base is, `rag export` makes "
        "a model that needs none."
    ) from errors[0]


def _read_base(folder: Path) -> _BaseFile | None:
    content = read_json(str(folder), BASE_FILE)
    try:
        return None if content is None else _BaseFile.model_validate(content)
    except ValidationError as error:
        raise ConfigError(
            f"{folder / BASE_FILE} is damaged: {' '.join(str(error).split())[:200]}. Copy the model again."
        ) from error


def _named_base(folder: Path, config: Any) -> str:
    """The base that PEFT's configuration names: a hub's model with its revision, or a folder."""
    name, revision = config.base_model_name_or_path, config.revision
    if not name:
        raise ConfigError(
            f"{_named(folder)} holds LoRA adapters, but its {ADAPTER_CONFIG} does not name their base. Set "
            "base_model_name_or_path there to the model that they were trained on."
        )
    return f"{name}@{revision}" if revision and not Path(name).is_dir() else str(name)


def _read_config(folder: Path) -> Any:
    """PEFT's configuration of plain LoRA; ConfigError for all other adapters, by their name."""
    from peft import LoraConfig

    content = read_json(str(folder), ADAPTER_CONFIG)
    kind = content.get("peft_type") if isinstance(content, dict) else None
    if kind != "LORA":
        raise ConfigError(
            f"{_named(folder)} holds adapters of the type {kind}, but only LoRA can be used. Merge them into their "
            "model with the program that made them, and give the merged model."
        )
    usual = {**LoraConfig().to_dict(), "init_lora_weights": None}
    special = [
        name
        for name, value in content.items()
        if name not in _PLAIN and value not in (None, False, [], {}, usual.get(name))
    ]
    if content.get("init_lora_weights") in (True, "gaussian", "eva", "orthogonal"):  # these leave the base as it is
        special = [name for name in special if name != "init_lora_weights"]
    if special:
        raise ConfigError(
            f"{_named(folder)} holds LoRA adapters of a special kind: {ADAPTER_CONFIG} sets "
            f"{', '.join(f'{name}={content[name]!r:.40}' for name in special)}. Only plain LoRA can be used. Merge them "
            "into their model with the program that made them, and give the merged model."
        )
    wrong = [name for name, types in _NUMBERS.items() if not isinstance(content.get(name), types)]
    known = {name: value for name, value in content.items() if name in _PLAIN and name in usual}
    try:
        if wrong:
            raise ValueError(f"{wrong[0]} is {content.get(wrong[0])!r}, a number was expected")
        return LoraConfig(**known)
    except (TypeError, ValueError) as error:
        raise ConfigError(f"{folder / ADAPTER_CONFIG} is damaged: {error}. Copy the adapters again.") from error


def _read_weights(folder: Path) -> dict[str, torch.Tensor]:
    file = folder / ADAPTER
    if not file.is_file():
        raise ConfigError(
            f"{_named(folder)} has no {ADAPTER}, so its adapters cannot be read. Save them as safetensors (PEFT: "
            "save_pretrained), or choose other adapters."
        )
    try:
        weights = load_file(file)
    except (OSError, SafetensorError) as error:
        raise ConfigError(f"{file} is damaged ({error}). Copy the adapters again.") from error
    named = {name.removeprefix(_PREFIX): weight.float() for name, weight in weights.items()}
    return {
        ".".join([*parts[:-1], NAME, parts[-1]]): weight
        for parts, weight in ((name.split("."), weight) for name, weight in named.items())
    }


def _named(folder: Path) -> str:
    return name_of_snapshot(str(folder))


def _write_json(path: Path, content: dict[str, Any]) -> None:
    # Sets have another order in each process.
    text = json.dumps(content, indent=2, sort_keys=True, default=lambda value: sorted(value))
    path.write_text(text + "\n", encoding="utf-8")
