"""One process at a time writes at a place; a second one waits or fails, by choice.

The lock is a hidden file beside the place, held with `flock` and saying who holds it: the system ends the hold with the
process, however that ends, so no lock has to be removed by hand. `RAG_WAIT_SECONDS` (`rag --wait`) is the choice: how
long to wait for another writer; 0, the default, fails at once.
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
from rag_core.storage.draft import disk_errors_named

WAIT_SETTING = "RAG_WAIT_SECONDS"
POLL_SECONDS = 0.2
REMIND_SECONDS = 30
NAME_SECONDS = 2

# Locks that this call chain holds for what it is going to publish.
_reserved: ContextVar[frozenset[Path]] = ContextVar("reserved", default=frozenset())


def wait_setting() -> float:
    """Seconds that a writer waits for another one; ConfigError if `RAG_WAIT_SECONDS` is not such a number."""
    text = os.environ.get(WAIT_SETTING, "") or "0"
    try:
        seconds = float(text)
    except ValueError:
        seconds = math.nan
    if not seconds >= 0:
        raise ConfigError(
            f"{WAIT_SETTING} is {text!r}; a number of seconds was expected: 0 fails at once where another run is writing, "
            "600 waits up to ten minutes, inf waits as long as it takes."
        )
    return seconds


@contextlib.contextmanager
def only_writer(out: Path, wait_seconds: float | None = None) -> Iterator[None]:
    """This process alone writes at `out`; who has it `reserved` goes on with that hold.

    Args:
        out: the place; its folder must exist.
        wait_seconds: how long to wait for another writer, who is named on standard error meanwhile; default: the setting.

    Raises:
        ArtifactError: another run still writes there; the message names it and says since when.
    """
    lock = lock_file(out)
    mine = _reserved.get()
    if lock in mine:
        _reserved.set(mine - {lock})
        try:
            yield
        finally:
            _reserved.set(mine)
        return
    with _held(lock, out, wait_setting() if wait_seconds is None else wait_seconds) as file:
        now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
        file.write(f"process {os.getpid()} on {socket.gethostname()}, since {now}")
        file.flush()
        try:
            yield
        finally:
            lock.unlink(missing_ok=True)


@contextlib.contextmanager
def reserved(out: Path, wait_seconds: float | None = None) -> Iterator[None]:
    """Hold `out` from before it is known what there is to do until it is done; one `publish` at a time uses the hold.

    Who had to wait looks again, under the hold, whether the other has done the work.
    """
    out = Path(os.path.realpath(out))
    with contextlib.ExitStack() as stack:
        with disk_errors_named(out):
            out.parent.mkdir(parents=True, exist_ok=True)
            stack.enter_context(only_writer(out, wait_seconds))
        before = _reserved.get()
        _reserved.set(before | {lock_file(out)})
        try:
            yield
        finally:
            _reserved.set(before)


def lock_file(out: Path) -> Path:
    """Where the lock of a place is."""
    return out.parent / f".{out.name}.lock"


@contextlib.contextmanager
def _held(lock: Path, out: Path, wait_seconds: float) -> Iterator[IO[str]]:
    began = time.monotonic()
    said = -math.inf
    while True:
        with lock.open("a+", encoding="utf-8") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                waited = time.monotonic() - began
                if waited >= wait_seconds:
                    raise ArtifactError(_refusal(out, _owner(file), wait_seconds)) from error
                if waited - said >= REMIND_SECONDS:
                    said = waited
                    limit = "" if math.isinf(wait_seconds) else f" of at most {wait_seconds:.0f} s"
                    print(
                        f"{out} is being written by another run ({_owner(file)}). Waited {waited:.0f} s{limit} for it.",
                        file=sys.stderr,
                        flush=True,
                    )
            else:
                # The former holder deletes the file that it holds: a lock on a deleted one keeps nobody out.
                if lock.exists() and os.path.samestat(os.fstat(file.fileno()), lock.stat()):
                    file.truncate(0)
                    yield file
                    return
                continue
        time.sleep(POLL_SECONDS)


def _owner(file: IO[str]) -> str:
    """Who holds the lock, as it wrote itself, and for how long already; who has it since a moment is given time to write."""
    end = time.monotonic() + NAME_SECONDS
    while True:
        file.seek(0)
        name = file.read()
        if name or time.monotonic() > end:
            break
        time.sleep(0.01)
    age = max(0.0, time.time() - os.fstat(file.fileno()).st_mtime)
    return f"{name or 'it has just begun'}, {age:.0f} s ago"


def _refusal(out: Path, owner: str, wait_seconds: float) -> str:
    waited = f", still after {wait_seconds:.0f} s of waiting" if wait_seconds else ""
    return (
        f"{out} is being written by another run ({owner}){waited}. Wait until it has ended (`rag --wait SECONDS`, or "
        f"{WAIT_SETTING}, does so), or give another --out."
    )
