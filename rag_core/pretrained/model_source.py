"""Load models and tokenizers from a local folder, a Python package or a model hub, with errors that say what to do.

`package:NAME/FOLDER` names a folder inside an installed Python package, for machines that cannot reach a hub. Where a
folder can be named, a `.gguf` file can: `gguf/` makes a plain folder of it.
`org/model` and `org/model@REVISION` name a hub's model. `rag_core/pretrained/hub/` puts its files into a folder of the
hub's cache, and everything is loaded from that folder, so Transformers never contacts a hub.

Code that comes with a model runs only if the caller passes `trust_remote_code=True`. This permission is never stored in
an artifact: whoever loads the artifact later decides again. From pickled weights only tensors are read, trusted or not
(`rag_core/pretrained/pickled_weights.py`).
"""

from __future__ import annotations

import importlib.util
import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from transformers import AutoConfig, AutoTokenizer

from rag_core.errors import ConfigError
from rag_core.pretrained.hub.files import ADAPTER_CONFIG
from rag_core.pretrained.hub.name import HubName, name_of_snapshot, parse_hub_name
from rag_core.pretrained.hub.revision import commit_of
from rag_core.pretrained.hub.snapshot import snapshot_folder
from rag_core.pretrained.pickled_weights import check_pickled_weights
from rag_core.pretrained.quiet import quiet_transformers
from rag_core.storage.artifact import local_copy
from rag_core.storage.places import ObjectPath, as_place

# Otherwise Transformers takes weights from any pull request that looks like its conversion bot's, whoever wrote it, and
# asks a service to convert other models. It does so only for hub names, and it never gets one here.
os.environ["DISABLE_SAFETENSORS_CONVERSION"] = "1"

PACKAGE_PREFIX = "package:"
GGUF = ".gguf"
# No model has more layers than this.
MOST_LAYERS = 500


def resolve_model_source(name_or_folder: str | Path, *, trust_remote_code: bool = False) -> str:
    """The folder that Transformers should load from. A hub's model and an artifact in an object store are downloaded.

    Args:
        name_or_folder: a local folder or `.gguf` file, `package:NAME/FOLDER` or `package:NAME/FILE.gguf`, or a hub name
            with or without `@REVISION`.
        trust_remote_code: download the Python code of a hub's model, too.

    Raises:
        ConfigError: the package of a `package:` source is not installed, a local path is not a model, a hub's model
            cannot be downloaded, or a GGUF file cannot be read.
    """
    source = _locate(name_or_folder)
    if isinstance(source, HubName):
        return str(snapshot_folder(source, trust_remote_code=trust_remote_code))
    if source.is_file():
        from rag_core.pretrained.gguf.cache import plain_folder  # its imports take a second

        return str(plain_folder(source, str(name_or_folder)))
    return str(source)


def pin_source(name_or_folder: str | Path) -> str:
    """A name for the same model that means the same in every process, now and later.

    A hub name becomes `org/model@COMMIT` (one request per name and process). A local path becomes absolute.
    `package:` names and artifacts in an object store stay as they are.

    Raises:
        ConfigError: as `resolve_model_source`.
    """
    name = str(name_or_folder)
    source = name if isinstance(as_place(name), ObjectPath) else _locate(name)
    return str(source.at(commit_of(source))) if isinstance(source, HubName) else absolute_source(name)


def recorded_source(name_or_folder: str | Path) -> str:
    """How manifests and MLflow name a model: a hub's model with its commit, any other as the user gave it."""
    pinned = pin_source(name_or_folder)
    return pinned if parse_hub_name(pinned) and not _is_local(str(name_or_folder)) else str(name_or_folder)


def absolute_source(name_or_folder: str) -> str:
    """The same source with a local path made absolute, because workers have another current folder."""
    place = as_place(name_or_folder)
    return str(place.resolve()) if isinstance(place, ObjectPath) or place.exists() else name_or_folder


def _is_local(name: str) -> bool:
    place = as_place(name)
    return name.startswith(PACKAGE_PREFIX) or isinstance(place, ObjectPath) or place.exists()


def _locate(name_or_folder: str | Path) -> Path | HubName:
    """The folder or GGUF file of a local source, or the parts of a hub name."""
    name = str(name_or_folder)
    if name.startswith(PACKAGE_PREFIX):
        return _in_package(name.removeprefix(PACKAGE_PREFIX))
    if _is_gguf(Path(name)) and isinstance(as_place(name), ObjectPath):
        raise ConfigError(f"{name}: a GGUF file cannot be read from an object store. Copy it here and give its path.")
    path = local_copy(Path(name))
    if path.is_dir():
        if not _is_model_folder(path):
            inside = next(iter(sorted(path.glob(f"*{GGUF}"))), None)
            remedy = f"To use its GGUF file, give {inside}." if inside else "Give the folder that holds it."
            raise ConfigError(f"{path} has no config.json, so it is not a model folder. {remedy}")
        return path
    if path.is_file():
        if not _is_gguf(path):
            raise ConfigError(
                f"{path} is a file; a model folder (with config.json and weights) or a {GGUF} file is needed."
            )
        return path
    hub_name = None if _is_gguf(path) else parse_hub_name(name)
    if hub_name is None:
        raise ConfigError(
            f"There is no model {'file' if _is_gguf(path) else 'folder'} {path}. Correct the path, or give a hub name "
            "such as 'org/model' or 'org/model@REVISION'."
        )
    return hub_name


def load_from_source(load: Callable[..., Any], source: str, *, trust_remote_code: bool = False, **options: Any) -> Any:
    """Call a `from_pretrained` method; any failure becomes a ConfigError that says what to do."""
    try:
        with quiet_transformers():
            return load(source, trust_remote_code=trust_remote_code, **options)
    except Exception as error:  # Tokenizers raises plain Exception, Transformers errors of any type.
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        if "custom code" in reason:
            raise _own_code(source, "Transformers does not know its model_type") from error
        raise _unreadable(source, reason) from error


def load_config(source: str, subfolder: str = "", *, trust_remote_code: bool = False) -> Any:
    """Read and check a model's configuration before any other file of the model is read.

    Raises:
        ConfigError: it cannot be read; it asks for more than `MOST_LAYERS` layers; config.json or tokenizer_config.json
            names the model's own code (`auto_map`) and `trust_remote_code` is false (Transformers' class for that
            model_type might compute something else); or that code lies in another repository, trusted or not.
    """
    for name in ("config.json", "tokenizer_config.json"):
        _check_own_code(source, subfolder, name, trust_remote_code)
    config = load_from_source(
        AutoConfig.from_pretrained, source, subfolder=subfolder, trust_remote_code=trust_remote_code
    )
    _refuse_endless_layers(source, config.to_dict())
    return config


def weights_options(source: str, subfolder: str = "") -> dict[str, Any]:
    """Check the folder's weights and return the options that make `from_pretrained` read only tensors.

    Raises:
        ConfigError: the weights are pickles that hold more than tensors, or damaged.
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
    """Call a model's `from_pretrained` and check that the files have all parameters that matter.

    Args:
        load: the `from_pretrained` method.
        source: a model folder.
        may_lack: prefixes of parameters that the files may lack, because random numbers there do no harm.
        trust_remote_code: run code that comes with the model.
        options: passed to `load`.

    Raises:
        ConfigError: the files cannot be read, are pickles that hold more than tensors, or lack other parameters, which
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
            f"{name_of_snapshot(source)} lacks {len(missing)} parameters of a {type(model).__name__} ({missing[0]}, "
            "…). Its weights belong to another architecture than config.json says, or to one that needs code of its "
            "own. Choose another model."
        )
    return model


def load_tokenizer(source: str, subfolder: str = "", **options: Any) -> Any:
    """The tokenizer of a model; options as for `load_from_source`. ConfigError if it is missing or cannot be read."""
    tokenizer = load_from_source(AutoTokenizer.from_pretrained, source, subfolder=subfolder, **options)
    # Without tokenizer files Transformers makes a tokenizer that knows only special tokens (T5's also "▁").
    if len(tokenizer) <= len(set(tokenizer.all_special_tokens)) + 1:
        raise ConfigError(
            f"{name_of_snapshot(source)}{'/' + subfolder if subfolder else ''} has no tokenizer (tokenizer.json, "
            "vocab.txt, spiece.model or the like), so no text can be read. Copy the tokenizer's files there."
        )
    return tokenizer


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
        # Transformers would download it from that repository's main branch, whatever that holds at the time.
        raise ConfigError(
            f"{name_of_snapshot(source)} needs code of another repository, {other.partition('--')[0]} ({name} has "
            f"{other!r} in auto_map). Such code is never downloaded, trusted or not, because it can change any day. "
            "Read that code, copy the model's folder and put the code's .py files into the copy. In the auto_map of "
            f"the copy's {name}, remove everything up to and including --. Then give the path of the copy."
        )


def _texts(value: Any) -> Iterator[str]:
    """All strings in a JSON value."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, (dict, list)):
        for item in value.values() if isinstance(value, dict) else value:
            yield from _texts(item)


def _refuse_endless_layers(source: str, settings: dict[Any, Any]) -> None:
    """Refuse absurd numbers of layers: Transformers would make the layers before it looks at the weights."""
    for name, value in settings.items():
        if isinstance(value, dict):
            _refuse_endless_layers(source, value)
        elif str(name).endswith(("layer", "layers")) and isinstance(value, int) and value > MOST_LAYERS:
            raise ConfigError(
                f"{name_of_snapshot(source)}: config.json has a {name} of more than {MOST_LAYERS}, which no model "
                "has. The file is damaged: download the model again."
            )


def _own_code(source: str, why: str) -> ConfigError:
    return ConfigError(
        f"{name_of_snapshot(source)} needs code of its own ({why}), and code that comes with a model is not run "
        "unless you trust it. Choose a model that Transformers supports without such code, or read the code and then "
        "give --trust-remote-code (trust_remote_code: true)."
    )


def _in_package(name: str) -> Path:
    """A folder or GGUF file in an installed package, whose code is not imported."""
    package, _, inside = name.partition("/")
    spec = importlib.util.find_spec(package) if package.isidentifier() else None
    if spec is None or not spec.submodule_search_locations:
        raise ConfigError(
            f"The Python package {package!r} of model source 'package:{name}' is not installed. "
            f"Install it: pip install {package.replace('_', '-')}"
        )
    home = Path(spec.submodule_search_locations[0])
    path = home / inside
    if _is_gguf(path) and not path.is_dir():
        if not path.is_file():
            files = ", ".join(sorted(file.relative_to(home).as_posix() for file in home.rglob(f"*{GGUF}")))
            raise ConfigError(
                f"The package {package!r} has no file {inside!r}: {f'it has {files}' if files else f'no {GGUF} file'} "
                f"in {home}. Correct the name."
            )
        return path
    if not _is_model_folder(path):
        raise ConfigError(f"The package {package!r} has no model folder {inside!r} (no config.json in {path}).")
    return path


def _is_gguf(path: Path) -> bool:
    return path.suffix.lower() == GGUF


def _is_model_folder(path: Path) -> bool:
    # Old sentence-transformers folders keep config.json in a subfolder that modules.json names. Adapters have none.
    return any((path / name).is_file() for name in ("config.json", "modules.json", ADAPTER_CONFIG))
