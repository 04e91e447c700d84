"""Where weights come from: a local folder, a Python package, or a model hub; and errors a reader can act on.

`package:NAME/FOLDER` names a folder inside an installed Python package, which is how weights travel where no hub can
be reached. `org/model` and `org/model@REVISION` name a hub's model: its files are put into a folder of the hub's cache
(`rag_core/pretrained/hub/`), and everything is loaded from that folder, so that Transformers asks no hub for anything.

Code that comes with a model is not run unless whoever loads it says `trust_remote_code=True`. That word is never stored
with what is made of the model: who reads that later decides anew. Of pickled weights tensors alone are read
(`rag_core/pretrained/pickled_weights.py`), trusted or not.
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from transformers import AutoConfig, AutoTokenizer
from transformers.utils import logging as transformers_logging

from rag_core.errors import ConfigError
from rag_core.pretrained.hub.name import HubName, name_of_snapshot, parse_hub_name
from rag_core.pretrained.hub.revision import commit_of
from rag_core.pretrained.hub.snapshot import snapshot_folder
from rag_core.pretrained.pickled_weights import check_pickled_weights
from rag_core.storage.artifact import local_copy
from rag_core.storage.places import ObjectPath, as_place

# Without it Transformers takes weights from a pull request that looks like its conversion bot's, whoever wrote it, and
# asks a service to convert others. It does so for hub names alone, which it never gets here.
os.environ["DISABLE_SAFETENSORS_CONVERSION"] = "1"

PACKAGE_PREFIX = "package:"
# More than any model has.
MOST_LAYERS = 500


def resolve_model_source(name_or_folder: str | Path, *, trust_remote_code: bool = False) -> str:
    """The folder that Transformers should load from; a hub's model and an artifact in an object store are fetched.

    Args:
        name_or_folder: a local folder, `package:NAME/FOLDER`, or a hub name with or without `@REVISION`.
        trust_remote_code: fetch the Python code of a hub's model, too.

    Raises:
        ConfigError: a `package:` source that is not installed, a local path that is no model folder, or a hub's model
            that cannot be had.
    """
    found = _local_folder(name_or_folder)
    return str(snapshot_folder(found, trust_remote_code=trust_remote_code) if isinstance(found, HubName) else found)


def pin_source(name_or_folder: str | Path) -> str:
    """The same model by a name that means the same in every process, later too.

    A hub name becomes `org/model@COMMIT` (one request a name and process), a local folder's path absolute; `package:` names
    and artifacts in an object store stay.

    Raises:
        ConfigError: as `resolve_model_source`.
    """
    name = str(name_or_folder)
    found = name if isinstance(as_place(name), ObjectPath) else _local_folder(name)
    return str(found.at(commit_of(found))) if isinstance(found, HubName) else absolute_source(name)


def recorded_source(name_or_folder: str | Path) -> str:
    """How manifests and MLflow name a model: a hub's with its commit, others as they were given."""
    pinned = pin_source(name_or_folder)
    return pinned if parse_hub_name(pinned) and not _is_local(str(name_or_folder)) else str(name_or_folder)


def absolute_source(name_or_folder: str) -> str:
    """The same source, with a local folder's path made absolute, for workers whose current folder is another one."""
    place = as_place(name_or_folder)
    return str(place.resolve()) if isinstance(place, ObjectPath) or place.is_dir() else name_or_folder


def _is_local(name: str) -> bool:
    place = as_place(name)
    return name.startswith(PACKAGE_PREFIX) or isinstance(place, ObjectPath) or place.exists()


def _local_folder(name_or_folder: str | Path) -> Path | HubName:
    """The folder of a local source, or the parts of a hub name."""
    name = str(name_or_folder)
    if name.startswith(PACKAGE_PREFIX):
        return _package_folder(name.removeprefix(PACKAGE_PREFIX))
    path = local_copy(Path(name))
    if path.is_dir():
        if not _is_model_folder(path):
            raise ConfigError(f"{path} has no config.json, so it is not a model folder. Give the folder that holds it.")
        return path
    if path.is_file():
        raise ConfigError(f"{path} is a file; a model folder (with config.json and weights) is needed.")
    hub_name = parse_hub_name(name)
    if hub_name is None:
        raise ConfigError(
            f"There is no model folder {path}. Correct the path, or give a hub name such as 'org/model' or "
            "'org/model@REVISION'."
        )
    return hub_name


def load_from_source(load: Callable[..., Any], source: str, *, trust_remote_code: bool = False, **options: Any) -> Any:
    """Call a `from_pretrained`; whatever it cannot read becomes a ConfigError that says what to do."""
    try:
        with quiet_transformers():
            return load(source, trust_remote_code=trust_remote_code, **options)
    except Exception as error:  # Tokenizers raises nothing narrower, Transformers whatever its own code stumbles over.
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        if "custom code" in reason:
            raise _own_code(source, "its model_type is none that Transformers knows") from error
        raise _unreadable(source, reason) from error


def load_config(source: str, subfolder: str = "", *, trust_remote_code: bool = False) -> Any:
    """The configuration of a model, before anything else of it is read.

    Raises:
        ConfigError: it cannot be read; or config.json or tokenizer_config.json names code of its own (`auto_map`), in
            whose place Transformers' class of that model_type might compute something else, unless `trust_remote_code`;
            or, trusted or not, that code lies in another repository; or it asks for more than `MOST_LAYERS` layers.
    """
    for name in ("config.json", "tokenizer_config.json"):
        _check_own_code(source, subfolder, name, trust_remote_code)
    config = load_from_source(
        AutoConfig.from_pretrained, source, subfolder=subfolder, trust_remote_code=trust_remote_code
    )
    _refuse_endless_layers(source, config.to_dict())
    return config


def weights_options(source: str, subfolder: str = "") -> dict[str, Any]:
    """What `from_pretrained` is told of weights, once those of the folder have been checked: only tensors are read.

    Raises:
        ConfigError: the folder's weights are pickles of more than tensors, or damaged.
    """
    check_pickled_weights(Path(source) / subfolder)
    return {"weights_only": True, "use_safetensors": None}


def load_weights(
    load: Callable[..., Any],
    source: str,
    *,
    may_lack: str | tuple[str, ...],
    trust_remote_code: bool = False,
    **options: Any,
) -> Any:
    """Call a model's `from_pretrained`.

    Args:
        load: the method.
        source: a folder.
        may_lack: beginnings of the parameters that the files may lack: random numbers there do no harm.
        trust_remote_code: run code of the model's own.
        options: passed on.

    Raises:
        ConfigError: the files cannot be read, are pickles of more than tensors, or lack other parameters, which
            Transformers would fill with random numbers.
    """
    model, report = load_from_source(
        load,
        source,
        trust_remote_code=trust_remote_code,
        output_loading_info=True,
        **weights_options(source, options.get("subfolder", "")),
        **options,
    )
    missing = sorted(name for name in report["missing_keys"] if not name.startswith(may_lack))
    if missing:
        raise ConfigError(
            f"{name_of_snapshot(source)} lacks {len(missing)} parameters of a {type(model).__name__} ({missing[0]}, …). Its weights are those "
            "of another architecture than config.json says, or of one that needs code of its own. Choose another model."
        )
    return model


def load_tokenizer(source: str, subfolder: str = "", **options: Any) -> Any:
    """The tokenizer of a model; options as of `load_from_source`. Raises ConfigError if it cannot be read or is not there."""
    tokenizer = load_from_source(AutoTokenizer.from_pretrained, source, subfolder=subfolder, **options)
    # Without its files Transformers makes one that knows special tokens only (T5's also "▁"): every word is unknown.
    if len(tokenizer) <= len(set(tokenizer.all_special_tokens)) + 1:
        raise ConfigError(
            f"{name_of_snapshot(source)}{'/' + subfolder if subfolder else ''} has no tokenizer (tokenizer.json, vocab.txt, spiece.model "
            "or the like), so no text can be read. Copy the tokenizer's files there."
        )
    return tokenizer


@contextlib.contextmanager
def quiet_transformers() -> Iterator[None]:
    """Load or save without progress bars and tables of unused weights: models are put together from parts on purpose."""
    verbosity, bars = transformers_logging.get_verbosity(), transformers_logging.is_progress_bar_enabled()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(verbosity)
        if bars:
            transformers_logging.enable_progress_bar()


def model_file(source: str, name: str) -> Path | None:
    """A file of a model folder, or None if it has no such file."""
    path = Path(source) / name
    return path if path.is_file() else None


def read_json(source: str, name: str) -> Any:
    """A JSON file of a model folder, or None if it has no such file; raises ConfigError if it is damaged."""
    path = model_file(source, name)
    try:
        return None if path is None else json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{path} is not readable as JSON ({error}). Copy the model again.") from error
    except OSError as error:
        raise _unreadable(source, str(error)) from error


def _unreadable(source: str, reason: str) -> ConfigError:
    name = name_of_snapshot(source)
    where = "The folder" if name == source else "The hub model"
    return ConfigError(
        f"{where} {name} cannot be loaded: {reason} It needs config.json, weights (model.safetensors or "
        "pytorch_model.bin) and a tokenizer."
    )


def _check_own_code(source: str, subfolder: str, name: str, trust_remote_code: bool) -> None:
    content = read_json(source, f"{subfolder}/{name}".lstrip("/"))
    own_code = content.get("auto_map") if isinstance(content, dict) else None
    if own_code and not trust_remote_code:
        raise _own_code(source, f"{name} names it in auto_map")
    if other := next((text for text in _texts(own_code) if "--" in text), None):
        # Transformers would fetch it by itself: from that repository's main branch, whatever it holds just then.
        raise ConfigError(
            f"{name_of_snapshot(source)} needs code of another repository, {other.partition('--')[0]} ({name} has {other!r} in "
            "auto_map), which is not fetched, trusted or not: it may change any day. Read that code and download its .py "
            f"files into a copy of the model's folder, remove what stands up to and with -- in the auto_map of {name} "
            "there, and give that folder's path."
        )


def _texts(value: Any) -> Iterator[str]:
    """All strings in what JSON may hold."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, (dict, list)):
        for one in value.values() if isinstance(value, dict) else value:
            yield from _texts(one)


def _refuse_endless_layers(source: str, settings: dict[Any, Any]) -> None:
    """Transformers would make them one by one before it looks at the weights."""
    for name, value in settings.items():
        if isinstance(value, dict):
            _refuse_endless_layers(source, value)
        elif str(name).endswith(("layer", "layers")) and isinstance(value, int) and value > MOST_LAYERS:
            raise ConfigError(
                f"{name_of_snapshot(source)}: config.json has a {name} of more than {MOST_LAYERS}, which no model has. The file is damaged: "
                "fetch the model again."
            )


def _own_code(source: str, why: str) -> ConfigError:
    return ConfigError(
        f"{name_of_snapshot(source)} needs code of its own ({why}), and code that comes with a model is not run unless you trust it. Choose a "
        "model that Transformers knows by itself, or read that code and give --trust-remote-code (trust_remote_code: true)."
    )


def _package_folder(name: str) -> Path:
    package, _, inside = name.partition("/")
    spec = importlib.util.find_spec(package) if package.isidentifier() else None
    if spec is None or not spec.submodule_search_locations:
        raise ConfigError(
            f"The Python package {package!r} of model source 'package:{name}' is not installed. "
            f"Install it: pip install {package.replace('_', '-')}"
        )
    folder = Path(spec.submodule_search_locations[0]) / inside
    if not _is_model_folder(folder):
        raise ConfigError(f"The package {package!r} has no model folder {inside!r} (no config.json in {folder}).")
    return folder


def _is_model_folder(path: Path) -> bool:
    # Old sentence-transformers folders keep config.json in a subfolder that modules.json names.
    return (path / "config.json").is_file() or (path / "modules.json").is_file()
