"""Put the files of a hub model at one commit into a local folder, in the cache that all tools of the hub share.

With a full cache there is no request besides the one for the commit. Otherwise a second request gets the tree of the
commit, which the cache keeps, and the files that `files.py` chooses from it are downloaded. No file is requested that
might not exist.
"""

from __future__ import annotations

import glob
import shutil
import sys
import warnings
from pathlib import Path
from typing import Any

from huggingface_hub import constants, get_cached_repo_tree, snapshot_download
from huggingface_hub.errors import CachedRepoTreeNotFoundError
from huggingface_hub.utils import tqdm

from rag_core.errors import ModelNotice
from rag_core.pretrained.hub.failures import explained, no_room, no_weights, offline, unreachable
from rag_core.pretrained.hub.files import (
    ADAPTER,
    ADAPTER_CONFIG,
    MODULES,
    OWN_SETTINGS,
    WEIGHTS,
    indexed_shards,
    module_folders,
    needed_files,
    weight_files,
)
from rag_core.pretrained.hub.name import HubName, hub_address
from rag_core.pretrained.hub.patience import limited_patience
from rag_core.pretrained.hub.revision import (
    HubUnreachableError,
    commit_of,
    failure,
    listing_of,
    silent_reason,
    write_references,
)


def snapshot_folder(name: HubName, *, trust_remote_code: bool = False) -> Path:
    """Return the folder with the files that a model is loaded from; download those that are missing.

    Args:
        name: with a revision, or without for the main branch.
        trust_remote_code: also download the model's Python code.

    Raises:
        ConfigError: as `commit_of`; or the model has no weights for PyTorch, the disk is full, or files are missing and
            cannot be downloaded.
    """
    pinned = name.at(commit_of(name))
    folder = name.snapshot(str(pinned.commit))
    if not _is_complete(folder, _cached_listing(pinned), trust_remote_code):
        try:
            _download(pinned, folder, trust_remote_code)
        except HubUnreachableError as error:
            _accept_files_of_other_tools(pinned, folder, str(error))
    write_references(name, str(pinned.commit))
    return folder


def _cached_listing(pinned: HubName) -> list[str] | None:
    """The files of the commit, as an earlier download recorded them; None if none did."""
    try:
        return [entry.path for entry in get_cached_repo_tree(pinned.repo, revision=pinned.commit)]
    except CachedRepoTreeNotFoundError:
        return None


def _is_complete(folder: Path, listing: list[str] | None, trust_remote_code: bool) -> bool:
    if listing is None or (_has_modules(listing) and not (folder / MODULES).is_file()):
        return False
    needed = needed_files(listing, _modules(folder, listing), trust_remote_code=trust_remote_code)
    return all((folder / file).is_file() for file in needed)


def _has_modules(listing: list[str]) -> bool:
    return MODULES in listing and OWN_SETTINGS not in listing


def _modules(folder: Path, listing: list[str]) -> dict[str, str]:
    return module_folders(folder / MODULES) if _has_modules(listing) else {}


def _accept_files_of_other_tools(pinned: HubName, folder: Path, reason: str) -> None:
    """Without a hub, accept files that another tool downloaded if a model can be loaded from them; else ConfigError."""
    files = [path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()]
    weights_folder = folder / module_folders(folder / MODULES).get("Transformer", "")
    weights = weight_files(path.name for path in weights_folder.glob("*"))[:1]
    expected = [
        ADAPTER_CONFIG if weights == [ADAPTER] else "config.json",
        *weights,
        *(shard for index in weights for shard in indexed_shards(weights_folder / index)),
    ]
    complete = weights and all((weights_folder / file).is_file() for file in expected)
    if _cached_listing(pinned) is not None or not complete:
        raise unreachable(pinned, reason) if reason else offline(pinned)
    if MODULES not in files and not (pinned.cache_folder / ".no_exist" / str(pinned.commit) / MODULES).is_file():
        warnings.warn(
            f"The cache does not say whether it has all files of {pinned}. If this is a sentence-transformers model, "
            f"{MODULES}, which says how to pool, is missing; load the model once with a network connection.",
            ModelNotice,
            stacklevel=2,
        )


def _download(pinned: HubName, folder: Path, trust_remote_code: bool) -> None:
    listing = listing_of(pinned)
    paths = list(listing.files)
    if _has_modules(paths):
        _fetch(pinned, [MODULES])
    needed = needed_files(paths, _modules(folder, paths), trust_remote_code=trust_remote_code)
    if not any(Path(file).name == name for file in needed for name, _ in WEIGHTS):
        raise no_weights(pinned, paths)
    missing = [file for file in needed if not (folder / file).is_file()]
    _check_room(pinned, sum(listing.files[file] for file in missing))
    _fetch(pinned, needed)
    lacking = [file for file in needed if not (folder / file).is_file()]
    if lacking:
        raise explained(RuntimeError(f"{lacking[0]} did not arrive"), pinned)


def _check_room(pinned: HubName, size: int) -> None:
    place = Path(constants.HF_HUB_CACHE)
    while not place.exists():
        place = place.parent
    free = shutil.disk_usage(place).free
    if size > free:
        raise no_room(pinned, size, free)


def _fetch(pinned: HubName, files: list[str]) -> None:
    if silent_reason() is not None:  # another thread found this meanwhile
        raise HubUnreachableError(silent_reason() or "")
    try:
        with limited_patience():
            snapshot_download(
                pinned.repo,
                revision=pinned.commit,
                endpoint=hub_address(),
                cache_dir=constants.HF_HUB_CACHE,
                allow_patterns=[glob.escape(file) for file in files],
                tqdm_class=_bar(pinned),
            )
    except Exception as error:  # the hub's library raises its own errors, the HTTP client's and the system's
        raise failure(error, pinned) from error


def _bar(pinned: HubName) -> type[tqdm]:
    """One progress bar for all bytes of a model, shown only on a terminal; the hub's library would show three."""

    class Bar(tqdm):
        def __init__(self, *args: Any, **options: Any) -> None:
            counts_bytes = str(options.get("desc", "")).startswith("Reconstructing")
            options["disable"] = bool(options.get("disable")) or not counts_bytes or not sys.stderr.isatty()
            options["desc"] = f"Downloading {pinned.repo}"
            super().__init__(*args, **options)

        def set_description(self, desc: str | None = None, refresh: bool | None = True) -> None:
            """Keep the model's name."""

        def set_description_str(self, desc: str | None = None, refresh: bool | None = True) -> None:
            """Keep the model's name."""

    return Bar
