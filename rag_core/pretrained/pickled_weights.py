"""Check pickled weights (`pytorch_model.bin`) before Transformers opens them; accept only state dicts of tensors.

A pickle is a program for Python's unpickler and can run any code. `torch.load(weights_only=True)` runs none: it makes
tensors and plain containers and stops at everything else. Many models of the hub, including those of the RAG paper,
have no other weights. Of what it can read, we accept only state dicts: flat tables of names and tensors.
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
    "Choose a model with model.safetensors. Or, if you trust the file, load it with the program that wrote it and save "
    "its state dict (torch.save(model.state_dict(), …)) or safetensors (Transformers: save_pretrained)."
)


def check_pickled_weights(folder: Path) -> None:
    """Check the weights that Transformers would load from a model folder, and warn if they are pickles.

    Raises:
        ConfigError: a pickle is damaged, not a state dict of tensors, or of an unsupported kind; or an index names a
            file outside the folder.

    Warns:
        ModelNotice: weights are read from pickles.
    """
    weights = weight_files(path.name for path in folder.glob("*"))
    if not weights:
        return
    files = indexed_shards(folder / weights[0]) if weights[0].endswith(".index.json") else weights[:1]
    pickles = [file for file in files if not file.endswith(SAFE)]
    for file in files:
        if Path(file).name != file:
            raise ConfigError(f"{folder / weights[0]} names weights outside its folder ({file}). Choose another model.")
    for file in pickles:
        _check(folder / file)
    if pickles:
        more = f" and {len(pickles) - 1} more" if len(pickles) > 1 else ""
        warnings.warn(
            f"{name_of_snapshot(folder)} has pickled weights ({pickles[0]}{more}); only tensors are read from them, "
            "and no "
            "code is run.",
            ModelNotice,
            stacklevel=2,
        )


def _check(file: Path) -> None:
    if not file.is_file():
        return  # the loader reports a missing shard
    try:
        is_zip = zipfile.is_zipfile(file)
        if is_zip and _is_torchscript(file):
            raise ConfigError(f"{file} is a TorchScript archive, which is a program, not weights. {_REMEDY}")
        if not is_zip and tarfile.is_tarfile(file):
            raise ConfigError(
                f"{file} is in PyTorch's oldest format (tar), which cannot be read without running code. {_REMEDY}"
            )
        content: Any = torch.load(file, map_location="cpu", weights_only=True, mmap=is_zip)
    except ConfigError:
        raise
    except pickle.UnpicklingError as error:
        raise ConfigError(
            f"{file} is damaged, or holds more than tensors ({_reason(error)}). A pickle can run any code, so only "
            f"tensors are read from it (weights_only=True). {_REMEDY}"
        ) from error
    except Exception as error:  # a damaged file can end in an error of any type
        raise ConfigError(f"{file} is damaged: {_reason(error)}. Download the model again.") from error
    if not isinstance(content, dict) or not content:
        raise ConfigError(f"{file} holds a {type(content).__name__}, where a state dict was expected. {_REMEDY}")
    for name, value in content.items():
        if not isinstance(name, str) or not isinstance(value, torch.Tensor):
            raise ConfigError(
                f"{file} is not a state dict of tensors: its entry {name!r} is a {type(value).__name__}. {_REMEDY}"
            )


def _is_torchscript(file: Path) -> bool:
    with zipfile.ZipFile(file) as archive:
        return any(name.endswith("/constants.pkl") for name in archive.namelist())


def _reason(error: Exception) -> str:
    """What PyTorch found wrong: the first sentence of its message, without its advice to trust the file."""
    lines = str(error).partition("Check the documentation")[0].strip().splitlines()
    text = lines[-1].rpartition("WeightsUnpickler error: ")[2].strip() if lines else ""
    return re.split(r" was not an allowed|\. ", text)[0].rstrip(".")[:200] or type(error).__name__
