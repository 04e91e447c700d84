"""Where weights come from: a local folder, a Python package, or a model hub; and errors a reader can act on.

`package:NAME/FOLDER` names a folder inside an installed Python package, which is how weights travel where no hub can
be reached. Neither code that comes with a model nor pickled weights are touched unless whoever loads it says
`trust_remote_code=True`; pickles are read with `weights_only=True` even then. That word is never stored with what is made
of the model: who reads that later decides anew.
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
import pickle  # nosec B403
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from transformers import AutoConfig, AutoTokenizer
from transformers.utils import cached_file
from transformers.utils import logging as transformers_logging

from rag_core.artefacts.artefact import local_copy
from rag_core.artefacts.places import ObjectPath, as_place
from rag_core.errors import ConfigError

PACKAGE_PREFIX = "package:"
# More than any model has.
MOST_LAYERS = 500


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


def pin_source(name_or_folder: str | Path) -> str:
    """The same model by a name that means the same in every process."""
    return absolute_source(str(name_or_folder))


def load_from_source(load: Callable[..., Any], source: str, *, trust_remote_code: bool = False, **options: Any) -> Any:
    """Call a `from_pretrained`; whatever it cannot read becomes a ConfigError that says what to do."""
    try:
        with quiet_transformers():
            return load(source, trust_remote_code=trust_remote_code, **options)
    except pickle.UnpicklingError as error:
        raise ConfigError(
            f"{source} cannot be loaded: its pickled weights are damaged, or hold more than tensors. A pickle can run any "
            "code, so no more than tensors is read from it (weights_only=True). Use weights in safetensors."
        ) from error
    except Exception as error:  # Tokenizers raises nothing narrower, Transformers whatever its own code stumbles over.
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        if "custom code" in reason:
            raise _own_code(source, "its model_type is none that Transformers knows") from error
        raise _unreadable(source, reason) from error


def load_config(source: str, subfolder: str = "", *, trust_remote_code: bool = False) -> Any:
    """The configuration of a model, before anything else of it is read.

    Raises:
        ConfigError: it cannot be read; or config.json or tokenizer_config.json names code of its own (`auto_map`), in
            whose place Transformers' class of that model_type might compute something else; or (a folder) all weights
            are pickles. None of the last two with `trust_remote_code`. Or it asks for more than `MOST_LAYERS` layers.
    """
    if not trust_remote_code:
        for name in ("config.json", "tokenizer_config.json"):
            _refuse_own_code(source, subfolder, name)
        _refuse_pickles(source, subfolder)
    config = load_from_source(
        AutoConfig.from_pretrained, source, subfolder=subfolder, trust_remote_code=trust_remote_code
    )
    _refuse_endless_layers(source, config.to_dict())
    return config


def weights_options(trust_remote_code: bool) -> dict[str, Any]:
    """What a model's `from_pretrained` is told of weights: only tensors, and from pickles only if the model is trusted."""
    return {"weights_only": True, "use_safetensors": None if trust_remote_code else True}


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
        source: a folder or hub name.
        may_lack: beginnings of the parameters that the files may lack: random numbers there do no harm.
        trust_remote_code: run code of the model's own, and read pickles.
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
        **weights_options(trust_remote_code),
        **options,
    )
    missing = sorted(name for name in report["missing_keys"] if not name.startswith(may_lack))
    if missing:
        raise ConfigError(
            f"{source} lacks {len(missing)} parameters of a {type(model).__name__} ({missing[0]}, …). Its weights are those "
            "of another architecture than config.json says, or of one that needs code of its own. Choose another model."
        )
    return model


def load_tokenizer(source: str, subfolder: str = "", **options: Any) -> Any:
    """The tokenizer of a model; options as of `load_from_source`. Raises ConfigError if it cannot be read or is not there."""
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


def read_json(source: str, name: str) -> Any:
    """A JSON file of a model, or None if it has no such file; raises ConfigError if it is damaged."""
    quiet = {"_raise_exceptions_for_missing_entries": False, "_raise_exceptions_for_gated_repo": False}
    try:
        path = cached_file(source, name, **quiet)
    except (OSError, ValueError) as error:
        raise _unreadable(source, str(error).splitlines()[0]) from error
    try:
        return None if path is None else json.loads(Path(path).read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{path} is not readable as JSON ({error}). Copy the model again.") from error


def _unreadable(source: str, reason: str) -> ConfigError:
    where = "The folder" if Path(source).is_dir() else "The hub model"
    return ConfigError(
        f"{where} {source} cannot be loaded: {reason} It needs config.json, weights in safetensors and a tokenizer; "
        "a hub name needs a network and, for private models, HF_TOKEN."
    )


def _refuse_own_code(source: str, subfolder: str, name: str) -> None:
    content = read_json(source, f"{subfolder}/{name}".lstrip("/"))
    if isinstance(content, dict) and content.get("auto_map"):
        raise _own_code(source, f"{name} names it in auto_map")


def _refuse_endless_layers(source: str, settings: dict[Any, Any]) -> None:
    """Transformers would make them one by one before it looks at the weights."""
    for name, value in settings.items():
        if isinstance(value, dict):
            _refuse_endless_layers(source, value)
        elif str(name).endswith(("layer", "layers")) and isinstance(value, int) and value > MOST_LAYERS:
            raise ConfigError(
                f"{source}: config.json has a {name} of more than {MOST_LAYERS}, which no model has. The file is damaged: "
                "fetch the model again."
            )


def _own_code(source: str, why: str) -> ConfigError:
    return ConfigError(
        f"{source} needs code of its own ({why}), and code that comes with a model is not run unless you trust it. Choose a "
        "model that Transformers knows by itself, or read that code and give --trust-remote-code (trust_remote_code: true)."
    )


def _refuse_pickles(source: str, subfolder: str) -> None:
    """For folders, whose files are at hand; of a hub model Transformers asks for safetensors alone."""
    folder = Path(source) / subfolder
    weights = sorted(folder.glob("pytorch_model*.bin"))
    if weights and not any(folder.glob("*.safetensors")):
        raise ConfigError(
            f"{weights[0]}: the weights of this model are pickles, which can run code, and there is no "
            "model.safetensors. Convert them where you trust them (Transformers: from_pretrained, then save_pretrained), or "
            "give --trust-remote-code (trust_remote_code: true); no more than tensors is read from them even then."
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
