"""Resolve a hub name to a commit: ask the hub once per process, or read the cache if no hub answers.

A process remembers the commit of a name, the files of a commit, and that a hub does not answer. So a branch that moves
meanwhile changes nothing, and a silent hub costs one request of at most HF_HUB_ETAG_TIMEOUT + `MORE_SECONDS` seconds.
"""

from __future__ import annotations

import contextlib
import os
import threading
import uuid
import warnings
from dataclasses import dataclass, field

from huggingface_hub import HfApi, constants

from rag_core.errors import ModelNotice
from rag_core.network.server_probe import within
from rag_core.pretrained.hub.failures import (
    MAIN,
    check_hub_address,
    explained,
    offline,
    root_of,
    unreachable,
    why_unreachable,
)
from rag_core.pretrained.hub.name import COMMIT, HubName, hub_address, shown_address

# Name lookup and connecting may each take as long as an answer, so all three together have one limit, below 15 s.
MORE_SECONDS = 2.0


class HubUnreachableError(Exception):
    """The hub does not answer or is out of order; the text is the reason, "" if no hub may be asked."""


@dataclass(frozen=True)
class Listing:
    """A commit, and the size in bytes of each of its files (0 where the hub does not say)."""

    commit: str
    files: dict[str, int]


@dataclass
class _Memory:
    """What this process knows about hubs; keys begin with the hub's address."""

    listings: dict[tuple[str, str], Listing] = field(default_factory=dict)
    commits: dict[tuple[str, str], str] = field(default_factory=dict)
    silent: dict[str, str] = field(default_factory=dict)


_memory = _Memory()
_lock = threading.RLock()


def commit_of(name: HubName) -> str:
    """The commit of a name, as the hub says, or the cache if no hub answers. A full commit hash needs no request.

    Raises:
        ConfigError: the hub has no such model or revision, or does not let us read it; or no hub answers and the cache
            does not know the name.
    """
    if name.commit:
        return name.commit
    with _lock:
        known = _memory.commits.get((hub_address(), str(name)))
        if known:
            return known
        try:
            commit = listing_of(name).commit
        except HubUnreachableError as error:
            commit = _cached_commit(name, str(error))
        _memory.commits[hub_address(), str(name)] = commit
        return commit


def listing_of(name: HubName) -> Listing:
    """The commit of a name and its files, with one request.

    Raises:
        HubUnreachableError: no hub answers, or HF_HUB_OFFLINE is set (then the text is empty).
        ConfigError: the hub refuses.
    """
    with _lock:
        key = hub_address(), str(name)
        if key not in _memory.listings:
            listing = _ask(name)
            _memory.listings[key] = _memory.listings[hub_address(), str(name.at(listing.commit))] = listing
        return _memory.listings[key]


def silent_reason() -> str | None:
    """Why the hub is no longer asked: "" if HF_HUB_OFFLINE is set; None if it is asked."""
    return "" if constants.is_offline_mode() else _memory.silent.get(hub_address())


def remember_silence(reason: str) -> None:
    """Record that the hub does not answer, as a download or another process found."""
    _memory.silent[hub_address()] = reason


def failure(error: Exception, name: HubName) -> Exception:
    """The error for a failed request or download: HubUnreachableError (a silent hub is remembered) or ConfigError."""
    if isinstance(error, HubUnreachableError):
        return error
    reason = why_unreachable(root_of(error))
    if reason is None:
        return explained(error, name)
    if not reason.startswith("HTTP status"):
        remember_silence(reason)
    return HubUnreachableError(reason)


def forget() -> None:
    """Forget everything. For tests, where one process plays several; no command calls it."""
    global _memory
    _memory = _Memory()


def write_references(name: HubName, commit: str) -> None:
    """Once all files of a commit are in the cache, record there which names this process resolved to it.

    Offline, this program and others find a name this way. A read-only cache is left unchanged.
    """
    for (server, known), its_commit in list(_memory.commits.items()):
        repo, _, revision = known.partition("@")
        if (server, repo, its_commit) != (hub_address(), name.repo, commit):
            continue
        file = name.cache_folder / "refs" / (revision or MAIN)
        with contextlib.suppress(OSError):
            if not file.is_file() or file.read_text(encoding="utf-8") != commit:
                file.parent.mkdir(parents=True, exist_ok=True)
                draft = file.with_name(f"{file.name}.{uuid.uuid4().hex[:8]}.tmp")
                draft.write_text(commit, encoding="utf-8")
                os.replace(draft, file)


def _ask(name: HubName) -> Listing:
    reason = silent_reason()
    if reason is not None:
        raise HubUnreachableError(reason)
    check_hub_address()
    api, seconds = HfApi(endpoint=hub_address()), float(constants.HF_HUB_ETAG_TIMEOUT)

    def ask() -> Listing:
        info = api.model_info(name.repo, revision=name.revision, timeout=seconds, files_metadata=True)
        files = {sibling.rfilename: sibling.size or 0 for sibling in info.siblings or []}
        if not COMMIT.fullmatch(info.sha or ""):
            raise ValueError("no commit")
        return Listing(str(info.sha), files)

    try:
        return within(seconds + MORE_SECONDS, ask)
    except Exception as error:
        raise failure(error, name) from error


def _cached_commit(name: HubName, reason: str) -> str:
    file = name.cache_folder / "refs" / (name.revision or MAIN)
    commit = file.read_text(encoding="utf-8").strip() if file.is_file() else ""
    if not COMMIT.fullmatch(commit):
        raise unreachable(name, reason) if reason else offline(name)
    if reason:
        warnings.warn(
            f"The hub {shown_address()} does not answer ({reason}); {name} is taken from the cache, commit {commit}.",
            ModelNotice,
            stacklevel=2,
        )
    return commit
