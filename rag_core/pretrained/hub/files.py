"""Choose the files of a hub repository to download: only those that a model is loaded from.

A repository holds the same weights several times: for PyTorch as safetensors and as a pickle, for TensorFlow, Flax,
ONNX, OpenVINO, and often in folders of old checkpoints. One set is enough: safetensors, or pickles if there are none.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from pathlib import Path

# PEFT's names of the files of a folder that holds adapters, and not the weights of their base.
ADAPTER, ADAPTER_CONFIG = "adapter_model.safetensors", "adapter_config.json"
# In the order in which Transformers looks for them: one file, or an index and the name pattern of its shards. Last,
# adapters: a folder that has whole weights as well is loaded from those.
WEIGHTS = (
    ("model.safetensors", None),
    ("model.safetensors.index.json", re.compile(r"model-\d+-of-\d+\.safetensors")),
    ("pytorch_model.bin", None),
    ("pytorch_model.bin.index.json", re.compile(r"pytorch_model-\d+-of-\d+\.bin")),
    (ADAPTER, None),
)
# Configurations, tokenizers and chat templates.
_SMALL = (".json", ".txt", ".model", ".spm", ".codes", ".tiktoken", ".vocab", ".jinja")
# Where RagTokenizer keeps its two tokenizers.
_RAG_TOKENIZERS = ("question_encoder_tokenizer", "generator_tokenizer")
MODULES, OWN_SETTINGS = "modules.json", "text_encoder.json"


def needed_files(listing: Iterable[str], modules: dict[str, str], *, trust_remote_code: bool = False) -> list[str]:
    """The files of a repository to download.

    Args:
        listing: paths of all its files.
        modules: `module_folders` of its modules.json; empty if it has none.
        trust_remote_code: also the model's Python code.
    """
    paths = sorted(listing)
    inside: dict[str, set[str]] = {}
    for path in paths:
        folder, _, name = path.rpartition("/")
        inside.setdefault(folder, set()).add(name)
    weights_folder = modules.get("Transformer", "")
    weights = {f"{weights_folder}/{name}".lstrip("/") for name in weight_files(inside.get(weights_folder, set()))}
    folders = {"", *modules.values(), *_RAG_TOKENIZERS}
    return [
        path
        for path in paths
        if path in weights or _is_small(path, folders) or (trust_remote_code and path.endswith(".py"))
    ]


def weight_files(names: Iterable[str]) -> list[str]:
    """The weights that Transformers loads, among the file names of one folder: one file, or an index and its shards."""
    present = set(names)
    for name, shards in WEIGHTS:
        if name in present:
            return [name, *sorted(file for file in present if shards and shards.fullmatch(file))]
    return []


def indexed_shards(index: Path) -> list[str]:
    """The files that an index of weights names; [] if it cannot be read, which loading it will report."""
    try:
        names = json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()
        return sorted({str(name) for name in names})
    except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError):
        return []


def module_folders(modules_json: Path) -> dict[str, str]:
    """Class name and folder of each module that a sentence-transformers modules.json lists; {} if there is none.

    Errors in the file are reported later, by `rag_core/embeddings/encoder_settings.py`.
    """
    try:
        listed = json.loads(modules_json.read_text(encoding="utf-8"))
        return {str(module["type"]).rpartition(".")[2]: str(module["path"]).strip("/") for module in listed}
    except (OSError, ValueError, TypeError, KeyError, RecursionError):
        return {}


def _is_small(path: str, folders: set[str]) -> bool:
    folder, _, name = path.rpartition("/")
    return folder in folders and name.endswith(_SMALL) and not name.endswith(".index.json")
