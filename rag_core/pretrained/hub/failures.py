"""Turn every failure of a hub into a one-paragraph ConfigError: what was found, and what to do."""

from __future__ import annotations

import difflib
import errno
import re
import shutil
from pathlib import Path

from huggingface_hub import constants, get_token
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    IncompleteSnapshotError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RevisionNotFoundError,
)

from rag_core.errors import ConfigError
from rag_core.network.addresses import check_address
from rag_core.pretrained.hub.name import HubName, hub_address, shown_address

# The base class of all errors of the hub's HTTP client, including timeouts and refused connections. It is derived from
# a class of huggingface_hub because that library has changed its HTTP client between releases.
HTTP_ERROR = HfHubHTTPError.__mro__[1]
MAIN = "main"


def why_unreachable(error: BaseException) -> str | None:
    """The reason if a request failed for now (network, hub out of order); None if repeating it would not help."""
    if isinstance(error, HfHubHTTPError):
        status = error.response.status_code
        return f"HTTP status {status}" if status == 429 or status >= 500 else None
    if isinstance(error, TimeoutError) or (isinstance(error, HTTP_ERROR) and "Timeout" in type(error).__name__):
        return "no answer in time"
    if isinstance(error, (HTTP_ERROR, ConnectionError)) and not isinstance(error, OfflineModeIsEnabled):
        return _first_line(error)
    return None


def check_hub_address() -> None:
    """Raise ConfigError if HF_ENDPOINT cannot be the address of a hub."""
    check_address("HF_ENDPOINT", hub_address(), ("http", "https"), constants.ENDPOINT)


def unreachable(name: HubName, reason: str) -> ConfigError:
    """The error if the hub does not answer and the cache lacks files of the model."""
    server = shown_address()
    if "429" in reason:
        return ConfigError(
            f"The hub {server} answers that too many requests were made ({reason}), and {_not_in_cache(name)}. Wait "
            "some minutes and run the command again; with a token (HF_TOKEN) the hub allows more."
        )
    if reason.startswith("HTTP status"):
        return ConfigError(
            f"The hub {server} is out of order ({reason}), and {_not_in_cache(name)}. Run the command again later."
        )
    return ConfigError(
        f"The hub {server} cannot be reached ({reason}), and {_not_in_cache(name)}. Check the network, proxy settings "
        "(HTTPS_PROXY) and HF_ENDPOINT; or copy the model's folder here and give its path."
        f"{_nearest(name)}{_no_folder(name)}"
    )


def offline(name: HubName) -> ConfigError:
    """The error if HF_HUB_OFFLINE is set and the cache lacks files of the model."""
    return ConfigError(
        f"HF_HUB_OFFLINE is set, so no hub is asked, and {_not_in_cache(name)}. Unset it once to download the model, "
        f"or give a model's folder.{_nearest(name)}{_no_folder(name)}"
    )


def root_of(error: BaseException) -> BaseException:
    """Why a download failed, if the hub's library only says that files are missing in the cache."""
    if isinstance(error, LocalEntryNotFoundError) and not isinstance(error, IncompleteSnapshotError):
        return error.__cause__ or error
    return error


def explained(error: BaseException, name: HubName) -> ConfigError:
    """The error for any failure of a request or a download."""
    error = root_of(error)
    if reason := why_unreachable(error):
        return unreachable(name, reason)
    if isinstance(error, OfflineModeIsEnabled):
        return offline(name)
    if isinstance(error, HfHubHTTPError):
        return _refused(error, name)
    if isinstance(error, OSError) and error.errno:
        return _disk(error, name)
    if isinstance(error, (ValueError, TypeError, KeyError)):
        return _no_hub("its answer is not that of a hub")
    return ConfigError(
        f"The hub model {name} cannot be downloaded from {shown_address()}: {_first_line(error)}. Run the command "
        "again."
    )


def no_weights(name: HubName, files: list[str]) -> ConfigError:
    """The error if the repository has no weights for PyTorch."""
    others = [file for file in files if file.endswith((".h5", ".msgpack", ".onnx", ".gguf", ".ot", ".ckpt", ".pt"))]
    remedy = "Choose another model, or convert this one with Transformers and give the folder."
    if any(file.endswith(".gguf") for file in others):
        remedy = "Download one of its .gguf files (`hf download`) and give that file's path, or choose another model."
    return ConfigError(
        f"The hub model {name} has no weights in a supported format (model.safetensors or pytorch_model.bin, in one "
        f"file or in shards){'; it has ' + ', '.join(others[:4]) if others else ''}. {remedy}"
    )


def no_room(name: HubName, needed: int, free: int) -> ConfigError:
    """The error if the disk of the cache has less free space than the download needs."""
    return ConfigError(
        f"The disk of the hub's cache {constants.HF_HUB_CACHE} is full: the model {name} needs {_size(needed)} there, "
        f"{_size(free)} are free. Make room (`hf cache prune`, `hf cache rm`), or set HF_HOME to a folder on a larger "
        "disk."
    )


def _refused(error: HfHubHTTPError, name: HubName) -> ConfigError:
    server, status = shown_address(), error.response.status_code
    page = f"{server}/{name.repo}"
    if isinstance(error, GatedRepoError):
        token = "the token belongs to an account without access" if get_token() else "no token is set"
        return ConfigError(
            f"The hub model {name.repo} is gated, and {token}. Ask for access on its page, {page}, then use a token of "
            "that account: set HF_TOKEN, or run `hf auth login`."
        )
    if isinstance(error, RevisionNotFoundError):
        return ConfigError(
            f"The hub model {name.repo} has no revision {name.revision!r} (branch, tag or commit). Choose one of "
            f"those on {page}/commits/main, or leave @{name.revision} out for the main branch."
        )
    code = error.response.headers.get("X-Error-Code")
    if status == 401 and get_token():
        return ConfigError(
            f"The hub {server} does not accept the token (HTTP status 401, asked for {name.repo}): it is wrong, "
            f"expired or revoked. Make a new one on {server}/settings/tokens and set HF_TOKEN or run `hf auth login`; "
            "for a public model unset HF_TOKEN or run `hf auth logout`."
        )
    if status == 401:
        return ConfigError(
            f"The hub {server} has no model {name.repo}, or it is private; without a token the hub does not say which. "
            f"Correct the name, or set HF_TOKEN (or run `hf auth login`) with a token that may read it."
            f"{_nearest(name)}{_no_folder(name)}"
        )
    if status == 403:
        return ConfigError(
            f"The hub {server} does not let this token read {name.repo} (HTTP status 403). Use a token that may read "
            f"it: a fine-grained token must list the model or its organisation ({server}/settings/tokens)."
        )
    if code == "RepoNotFound":
        return ConfigError(
            f"The hub {server} has no model {name.repo} that this token may read. Correct the name, or use a token of "
            f"an account with access.{_nearest(name)}{_no_folder(name)}"
        )
    if code == "EntryNotFound":
        return ConfigError(
            f"The hub {server} lists a file of {name} that it does not have ({_first_line(error)}). Run the command "
            "again."
        )
    return _no_hub(f"HTTP status {status} for {name.repo}, without the error code of a hub")


def _no_hub(reason: str) -> ConfigError:
    return ConfigError(
        f"{shown_address()} does not answer as a model hub ({reason}). Correct HF_ENDPOINT, or unset it for "
        "https://huggingface.co; if the network has a proxy or a login page, sign in there first."
    )


def _disk(error: OSError, name: HubName) -> ConfigError:
    folder = constants.HF_HUB_CACHE
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        free = f"; {_size(shutil.disk_usage(folder).free)} are free" if Path(folder).is_dir() else ""
        return ConfigError(
            f"The disk of the hub's cache {folder} got full while {name} was downloaded{free}. Make room (`hf cache "
            "prune`, `hf cache rm`), or set HF_HOME to a folder on a larger disk."
        )
    return ConfigError(
        f"The hub's cache {folder} cannot be written ({error.strerror}: {error.filename}), so {name} cannot be "
        "downloaded. Give yourself access, or set HF_HOME to a folder of your own."
    )


def _not_in_cache(name: HubName) -> str:
    return f"the cache {constants.HF_HUB_CACHE} does not hold the whole model {name}"


def _nearest(name: HubName) -> str:
    """A sentence with the models in the cache that have a similar name; "" if there are none."""
    folders = Path(constants.HF_HUB_CACHE).glob("models--*/snapshots")
    known = {folder.parent.name.removeprefix("models--").replace("--", "/") for folder in folders} - {name.repo}
    by_name = {repo.lower(): repo for repo in known} | {repo.lower().rpartition("/")[2]: repo for repo in known}
    wanted = name.repo.lower()
    matches = difflib.get_close_matches(wanted, by_name, 3, 0.75)
    matches += difflib.get_close_matches(wanted.rpartition("/")[2], by_name, 3, 0.8)
    repos = list(dict.fromkeys(by_name[match] for match in matches))[:3]
    return f" The cache has {', '.join(repos)}." if repos else ""


def _no_folder(name: HubName) -> str:
    return "" if name.revision else f" (There is no folder {name.repo} in {Path.cwd()} either.)"


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().replace(hub_address(), shown_address()).splitlines()
    return re.sub(r"\s*\(Request ID: [^)]*\)", "", lines[0]).rstrip(".") if lines else type(error).__name__


def _size(number: int) -> str:
    return f"{number / 1e9:.1f} GB" if number >= 1e8 else f"{number / 1e6:.1f} MB"
