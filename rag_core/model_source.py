"""Where weights come from: a local folder, a Python package, or a model hub; and errors a reader can act on.

`package:NAME/FOLDER` names a folder inside an installed Python package, which is how weights travel where no hub can
be reached. Code that comes with a model is never run, and pickled weights are read with `weights_only=True` only.
"""

from __future__ import annotations

import contextlib
import importlib.util
import pickle  # nosec B403
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from transformers import AutoTokenizer
from transformers.utils import logging as transformers_logging

from rag_core.artefact import local_copy
from rag_core.errors import ConfigError
from rag_core.places import ObjectPath, as_place

PACKAGE_PREFIX = "package:"


def resolve_model_source(name_or_folder: str | Path) -> str:
    """The folder or hub name that Transformers should load; a generator artefact in an object store is fetched.

    Raises:
        ConfigError: a `package:` source that is not installed, or a local path that is no model folder.
    """
    name = str(name_or_folder)
    if name.startswith(PACKAGE_PREFIX):
        return str(_package_folder(name.removeprefix(PACKAGE_PREFIX)))
    path = local_copy(Path(name))
    if path.is_dir():
        if not _is_model_folder(path):
            raise ConfigError(f"{path} has no config.json, so it is not a model folder. Give the folder that holds it.")
        return str(path)
    if path.is_file():
        raise ConfigError(f"{path} is a file; a model folder (with config.json and weights) is needed.")
    if path.is_absolute() or name.startswith(".") or name.count("/") > 1:
        raise ConfigError(f"There is no model folder {path}. Correct the path, or give a hub name such as 'org/model'.")
    return name


def absolute_source(name_or_folder: str) -> str:
    """The same source, with a local folder's path made absolute, for workers whose current folder is another one."""
    place = as_place(name_or_folder)
    return str(place.resolve()) if isinstance(place, ObjectPath) or place.is_dir() else name_or_folder


def load_from_source(load: Callable[..., Any], source: str, **options: Any) -> Any:
    """Call a `from_pretrained`; whatever it cannot read becomes a ConfigError that says what to do."""
    try:
        with quiet_transformers():
            return load(source, trust_remote_code=False, **options)
    except pickle.UnpicklingError as error:
        raise ConfigError(
            f"{source} cannot be loaded: its pickled weights are damaged, or hold more than tensors. A pickle can run any "
            "code, so no more than tensors is read from it (weights_only=True). Use weights in safetensors."
        ) from error
    except (OSError, ValueError, KeyError, RuntimeError, TypeError, SafetensorError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        where = "The folder" if Path(source).is_dir() else "The hub model"
        if "custom code" in reason:
            raise ConfigError(
                f"{where} {source} needs code of its own, and code that comes with a model is never run. Choose a model "
                "that Transformers knows by itself."
            ) from error
        raise ConfigError(
            f"{where} {source} cannot be loaded: {reason} It needs config.json, weights in safetensors and a tokenizer; "
            "a hub name needs a network and, for private models, HF_TOKEN."
        ) from error


def load_weights(load: Callable[..., Any], source: str, *, may_lack: str | tuple[str, ...], **options: Any) -> Any:
    """Call a model's `from_pretrained`.

    Args:
        load: the method.
        source: a folder or hub name.
        may_lack: beginnings of the parameters that the files may lack: random numbers there do no harm.
        options: passed on.

    Raises:
        ConfigError: the files cannot be read, are pickles of more than tensors, or lack other parameters, which
            Transformers would fill with random numbers.
    """
    model, report = load_from_source(load, source, weights_only=True, output_loading_info=True, **options)
    missing = sorted(name for name in report["missing_keys"] if not name.startswith(may_lack))
    if missing:
        raise ConfigError(
            f"{source} lacks {len(missing)} parameters of a {type(model).__name__} ({missing[0]}, …). Its weights are those "
            "of another architecture than config.json says, or of one that needs code of its own. Choose another model."
        )
    return model


def load_tokenizer(source: str, subfolder: str = "", **options: Any) -> Any:
    """The tokenizer of a model; raises ConfigError if it cannot be read or is not there."""
    tokenizer = load_from_source(AutoTokenizer.from_pretrained, source, subfolder=subfolder, **options)
    # Without its files Transformers makes one that knows special tokens only (T5's also "▁"): every word is unknown.
    if len(tokenizer) <= len(set(tokenizer.all_special_tokens)) + 1:
        raise ConfigError(
            f"{Path(source) / subfolder if subfolder else source} has no tokenizer (tokenizer.json, vocab.txt, spiece.model "
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
