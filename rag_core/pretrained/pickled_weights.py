"""Weights in pickles (`pytorch_model.bin`): read only if they are a state dict, a flat table of names and tensors.

A pickle is a program for Python's unpickler and can run any code. `torch.load(weights_only=True)` runs none: it knows how
to make tensors and plain containers and stops at everything else. Many models of the hub, those of the RAG paper among
them, have no other weights. Of what could be read so, only state dicts are accepted here, before Transformers sees the file.
"""

from __future__ import annotations

import pickle  # nosec B403
import re
import tarfile
import warnings
import zipfile
from pathlib import Path
from typing import Any

import torch

from rag_core.errors import ConfigError, ModelNotice
from rag_core.pretrained.hub.files import indexed_shards, weight_files
from rag_core.pretrained.hub.name import name_of_snapshot

SAFE = ".safetensors"
_REMEDY = (
    "Choose a model with model.safetensors; or, where you trust the file, load it with the program that wrote it and save "
    "its state dict (torch.save(model.state_dict(), …)) or safetensors (Transformers: save_pretrained)."
)


def check_pickled_weights(folder: Path) -> None:
    """Check the weights that Transformers would load from a model folder, where they are pickles; say that they are.

    Raises:
        ConfigError: a file is no state dict of tensors, damaged, of a kind that is not read, or an index names a file
            outside the folder.

    Warns:
        ModelNotice: weights are read from pickles.
    """
    found = weight_files(path.name for path in folder.glob("*"))
    if not found:
        return
    files = indexed_shards(folder / found[0]) if found[0].endswith(".index.json") else found[:1]
    pickles = [file for file in files if not file.endswith(SAFE)]
    for file in files:
        if Path(file).name != file:
            raise ConfigError(f"{folder / found[0]} names weights outside its folder ({file}). Choose another model.")
    for file in pickles:
        _check(folder / file)
    if pickles:
        more = f" and {len(pickles) - 1} more" if len(pickles) > 1 else ""
        warnings.warn(
            f"{name_of_snapshot(folder)} has pickled weights ({pickles[0]}{more}); tensors alone are read from them, and no "
            "code is run.",
            ModelNotice,
            stacklevel=2,
        )


def _check(file: Path) -> None:
    if not file.is_file():
        return  # a missing shard is told by who loads it
    try:
        is_zip = zipfile.is_zipfile(file)
        if is_zip and _is_torchscript(file):
            raise ConfigError(f"{file} is a TorchScript archive, which is a program, not weights. {_REMEDY}")
        if not is_zip and tarfile.is_tarfile(file):
            raise ConfigError(
                f"{file} is of PyTorch's oldest format (tar), which cannot be read without code. {_REMEDY}"
            )
        content: Any = torch.load(file, map_location="cpu", weights_only=True, mmap=is_zip)
    except ConfigError:
        raise
    except pickle.UnpicklingError as error:
        raise ConfigError(
            f"{file} is damaged, or holds more than tensors ({_reason(error)}). A pickle can run any code, so no more than "
            f"tensors is read from it (weights_only=True). {_REMEDY}"
        ) from error
    except Exception as error:  # a damaged file ends in whatever the reader stumbles over
        raise ConfigError(f"{file} is damaged: {_reason(error)}. Fetch the model again.") from error
    if not isinstance(content, dict) or not content:
        raise ConfigError(f"{file} holds a {type(content).__name__}, where a state dict was expected. {_REMEDY}")
    for name, value in content.items():
        if not isinstance(name, str) or not isinstance(value, torch.Tensor):
            raise ConfigError(
                f"{file} is no state dict of tensors: its entry {name!r} is a {type(value).__name__}. {_REMEDY}"
            )


def _is_torchscript(file: Path) -> bool:
    with zipfile.ZipFile(file) as archive:
        return any(name.endswith("/constants.pkl") for name in archive.namelist())


def _reason(error: Exception) -> str:
    """PyTorch's first sentence that says what was found, without its advice to trust the file."""
    lines = str(error).partition("Check the documentation")[0].strip().splitlines()
    text = lines[-1].rpartition("WeightsUnpickler error: ")[2].strip() if lines else ""
    return re.split(r" was not an allowed|\. ", text)[0].rstrip(".")[:200] or type(error).__name__
