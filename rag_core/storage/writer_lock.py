"""Let only one process at a time write at a place; a second one waits or fails.

The lock is a hidden file beside the place, locked with `flock`; its text names the holder. The system releases it
when the process ends, even if killed, so nobody has to remove a lock by hand. `RAG_WAIT_SECONDS` (`rag --wait`) sets
how long to wait for another writer; 0, the default, fails at once.
"""

from __future__ import annotations

import contextlib
import datetime
import fcntl
import math
import os
import socket
import sys
import time
from collections.abc import Iterator
from contextvars import ContextVar
from pathlib import Path
from typing import IO

from rag_core.errors import ArtifactError, ConfigError
from rag_core.storage.draft import explain_disk_errors

WAIT_SETTING = "RAG_WAIT_SECONDS"
POLL_SECONDS = 0.2
REMIND_SECONDS = 30
NAME_SECONDS = 2

# Locks that `reserved` took in this context and that no `publish` uses at the moment.
_reserved: ContextVar[frozenset[Path]] = ContextVar("reserved", default=frozenset())


def wait_setting() -> float:
    """Seconds that a writer waits for another one; ConfigError if `RAG_WAIT_SECONDS` is not a number ≥ 0."""
    text = os.environ.get(WAIT_SETTING, "") or "0"
    try:
        seconds = float(text)
    except ValueError:
        seconds = math.nan
    if not seconds >= 0:
        raise ConfigError(
            f"{WAIT_SETTING} is {text!r}; expected a number of seconds: 0 fails at once if another run is writing, "
            "600 waits up to ten minutes, inf waits without limit."
        )
    return seconds


@contextlib.contextmanager
def only_writer(out: Path, wait_seconds: float | None = None) -> Iterator[None]:
    """Hold the lock of `out`, so that only this process writes there. Inside `reserved`, use the lock held already.

    Args:
        out: the place; its parent folder must exist.
        wait_seconds: how long to wait for another writer (standard error names it meanwhile); default: the setting.

    Raises:
        ArtifactError: another run is still writing there; the message names it and says since when.
    """
    lock = lock_file(out)
    reserved_locks = _reserved.get()
    if lock in reserved_locks:
        _reserved.set(reserved_locks - {lock})
        try:
            yield
        finally:
            _reserved.set(reserved_locks)
        return
    with _locked(lock, out, wait_setting() if wait_seconds is None else wait_seconds) as file:
        now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
        file.write(f"process {os.getpid()} on {socket.gethostname()}, since {now}")
        file.flush()
        try:
            yield
        finally:
            lock.unlink(missing_ok=True)


@contextlib.contextmanager
def reserved(out: Path, wait_seconds: float | None = None) -> Iterator[None]:
    """Hold the lock of `out` while deciding what to do and doing it; one `publish` at a time inside uses the lock.

    After waiting for another run, check under the lock whether that run has done the work.
    """
    out = Path(os.path.realpath(out))
    with contextlib.ExitStack() as stack:
        with explain_disk_errors(out):
            out.parent.mkdir(parents=True, exist_ok=True)
            stack.enter_context(only_writer(out, wait_seconds))
        before = _reserved.get()
        _reserved.set(before | {lock_file(out)})
        try:
            yield
        finally:
            _reserved.set(before)


def lock_file(out: Path) -> Path:
    """The lock file of a place."""
    return out.parent / f".{out.name}.lock"


@contextlib.contextmanager
def _locked(lock: Path, out: Path, wait_seconds: float) -> Iterator[IO[str]]:
    began = time.monotonic()
    reminded = -math.inf
    while True:
        with lock.open("a+", encoding="utf-8") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                waited = time.monotonic() - began
                if waited >= wait_seconds:
                    raise ArtifactError(_refusal(out, _holder(file), wait_seconds)) from error
                if waited - reminded >= REMIND_SECONDS:
                    reminded = waited
                    limit = "" if math.isinf(wait_seconds) else f" of at most {wait_seconds:.0f} s"
                    print(
                        f"{out} is being written by another run ({_holder(file)}). "
                        f"Waited {waited:.0f} s{limit} for it.",
                        file=sys.stderr,
                        flush=True,
                    )
            else:
                # The previous holder deletes its lock file. A lock on a deleted file protects nothing: open it again.
                if lock.exists() and os.path.samestat(os.fstat(file.fileno()), lock.stat()):
                    file.truncate(0)
                    yield file
                    return
                continue
        time.sleep(POLL_SECONDS)


def _holder(file: IO[str]) -> str:
    """Describe the lock's holder and how long it has held it.

    A holder that has just started gets `NAME_SECONDS` to write its name.
    """
    end = time.monotonic() + NAME_SECONDS
    while True:
        file.seek(0)
        name = file.read()
        if name or time.monotonic() > end:
            break
        time.sleep(0.01)
    age = max(0.0, time.time() - os.fstat(file.fileno()).st_mtime)
    return f"{name or 'it has just begun'}, {age:.0f} s ago"


def _refusal(out: Path, holder: str, wait_seconds: float) -> str:
    waited = f", still after {wait_seconds:.0f} s of waiting" if wait_seconds else ""
    return (
        f"{out} is being written by another run ({holder}){waited}. Wait until it has ended (`rag --wait SECONDS` or "
        f"{WAIT_SETTING} waits for it), or give another --out."
    )
