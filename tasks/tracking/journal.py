"""Keep writes that MLflow did not take: one file of JSON lines per run, sent in order when the server answers again.

A write goes straight to the server while it answers. When it does not, the write is appended to the run's file and
flushed to disk. Later writes of any process queue behind it until all have been sent. The file belongs to no process:
any process that finds it may send it.

An entry is deleted only after the server has it. A kill in between loses nothing, because every entry carries its own
time and sending it twice changes nothing (`tasks.tracking.delivery`). This module knows nothing about MLflow.
"""

from __future__ import annotations

import contextlib
import datetime
import fcntl
import json
import os
import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

from rag_core.errors import ArtifactError
from rag_core.storage.draft import sync

SUFFIX = ".jsonl"
# Seconds between two attempts while the server does not answer; doubled each time.
FIRST_PAUSE, LONGEST_PAUSE = 2.0, 60.0
# A write spends at most this long on sending older ones first, so that it does not hold up a training step.
SECONDS_FOR_OLDER = 1.0
# Metrics sent with one call: MLflow takes at most 1,000 in a batch.
MOST_AT_ONCE = 1000

BUSY = "another process is sending it"

Entry = dict[str, Any]


class UnreachableError(Exception):
    """The server does not answer, or refuses for now. The entry itself is fine and can be sent later."""


@dataclass
class Pause:
    """When a server that did not answer may be tried again; all runs of a process share it."""

    seconds: float = 0.0
    until: float = 0.0

    @property
    def over(self) -> bool:
        return time.monotonic() >= self.until

    def longer(self) -> None:
        self.seconds = min(max(2 * self.seconds, FIRST_PAUSE), LONGEST_PAUSE)
        self.until = time.monotonic() + self.seconds

    def end(self) -> None:
        self.seconds = self.until = 0.0


@dataclass
class Journal:
    """The writes of one run.

    Args:
        file: holds the waiting entries; it exists only while there are some.
        header: the file's first line; names the run. `since` is added.
        deliver: sends (header, entries, hurry); raises UnreachableError if the server does not answer, and any other
            exception if it refuses an entry.
        pause: of the server.
        say: shows a message to the user.
        closing: makes a last entry from the header after all others have been sent.
    """

    file: Path
    header: Entry
    deliver: Callable[[Entry, list[Entry], bool], None]
    pause: Pause = field(default_factory=Pause)
    say: Callable[[str], None] = lambda text: None
    closing: Callable[[Entry], Entry] | None = None
    _refused: bool = False

    def write(self, entry: Entry) -> None:
        """Send the entry, or keep it. The `content` (bytes) of a kept entry becomes a file beside the journal."""
        if self.pause.over:
            if self.file.exists() and not self._refused:
                self.send(SECONDS_FOR_OLDER, hurry=True)
            if not self.file.exists() and self._delivered(entry):
                return
        self._append(entry)

    def send(self, seconds: float, *, wait: float = 0.0, hurry: bool = False) -> str:
        """Send the waiting entries, oldest first.

        Args:
            seconds: stop after about this time.
            wait: seconds to wait while another process is sending them.
            hurry: the server must answer at once.

        Returns:
            Why entries are left, or "" if all were sent.
        """
        end = time.monotonic() + wait
        while (problem := self._send_alone(seconds, hurry)) == BUSY and time.monotonic() < end:
            time.sleep(0.1)
        return problem

    def _send_alone(self, seconds: float, hurry: bool) -> str:
        with self._only_sender() as alone:
            if not alone:
                return BUSY if self.file.exists() else ""
            try:
                header, entries = read_journal(self.file)
            except ArtifactError as error:
                self._refused = True
                return str(error)
            sent, problem, end = 0, "", time.monotonic() + seconds
            for batch in _batches(entries):
                if time.monotonic() > end:
                    problem = "there was no time for the rest"
                    break
                try:
                    self.deliver(header, [self._with_content(entry) for entry in batch], hurry)
                    if self.closing and sent + len(batch) == len(entries):
                        self.deliver(header, [self.closing(header)], hurry)
                except UnreachableError as error:
                    self.pause.longer()
                    problem = str(error)
                    break
                except Exception as error:
                    # Refused: this entry and all later ones stay in the file until a person has looked at it.
                    problem, self._refused = f"line {sent + 2} was refused: {error}", True
                    break
                sent += len(batch)
            if sent or not entries:
                self._forget(sent)
        if sent and not problem:
            self.pause.end()
            self.say(f"MLflow answers again: {sent} writes that were kept in {self.file} have been sent.")
        return problem

    def _delivered(self, entry: Entry) -> bool:
        try:
            self.deliver(self.header, [entry], "metrics" in entry)
        except UnreachableError as error:
            first = not self.pause.seconds
            self.pause.longer()
            if first:
                self.say(f"{error} The work continues; writes to MLflow are kept in {self.file} and sent later.")
            return False
        self.pause.end()
        return True

    def _append(self, entry: Entry) -> None:
        self.file.parent.mkdir(parents=True, exist_ok=True)
        with _locked_folder(self.file.parent):
            if "content" in entry:
                kept = self._keep(Path(entry["path"]).name, entry["content"])
                entry = {name: value for name, value in entry.items() if name != "content"} | {"kept": kept}
            with self.file.open("ab+") as file:
                new = not _whole_lines(file)
                lines = ([self.header | {"since": now()}] if new else []) + [entry | {"at": now()}]
                file.write("".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines).encode())
                file.flush()
                os.fsync(file.fileno())
            if new:
                sync(self.file.parent)

    def _keep(self, name: str, content: bytes) -> str:
        folder = self.file.with_suffix(".files")
        folder.mkdir(exist_ok=True)
        kept = folder / f"{len(list(folder.iterdir())):04d}-{name}"
        with kept.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        return kept.name

    def _with_content(self, entry: Entry) -> Entry:
        if "kept" not in entry:
            return entry
        return entry | {"content": (self.file.with_suffix(".files") / entry["kept"]).read_bytes()}

    def _forget(self, sent: int) -> None:
        """Delete the first `sent` entries, or the whole file if no entries are left."""
        with _locked_folder(self.file.parent):
            header, entries = read_journal(self.file)
            left = entries[sent:]
            if not left:
                shutil.rmtree(self.file.with_suffix(".files"), ignore_errors=True)
                self.file.unlink()
                return
            draft = self.file.with_suffix(".part")
            with draft.open("w", encoding="utf-8") as file:
                file.writelines(json.dumps(line, ensure_ascii=False) + "\n" for line in [header, *left])
                file.flush()
                os.fsync(file.fileno())
            draft.rename(self.file)
            sync(self.file.parent)

    @contextlib.contextmanager
    def _only_sender(self) -> Iterator[bool]:
        """Try to lock the file for sending; yields whether this process holds the lock during the block."""
        try:
            file = self.file.open("rb")
        except FileNotFoundError:
            yield False
            return
        with file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                # Another sender may have deleted or replaced the file since it was opened here.
                alone = self.file.exists() and os.path.samestat(os.fstat(file.fileno()), self.file.stat())
            except (BlockingIOError, FileNotFoundError):
                alone = False
            yield alone


def read_journal(file: Path) -> tuple[Entry, list[Entry]]:
    """Header and entries of a journal. A half last line is ignored: its write never returned.

    Raises:
        ArtifactError: a line is damaged.
    """
    lines = []
    for number, line in enumerate(file.read_bytes().split(b"\n")[:-1], 1):
        try:
            lines.append(json.loads(line))
        except ValueError as error:
            raise ArtifactError(f"{file}, line {number} is not JSON ({error}). Correct or delete the line.") from error
    return (lines[0], lines[1:]) if lines else ({}, [])


def header_of(file: Path) -> Entry:
    """The first line of a journal; empty if it cannot be read, for example because another process has just sent it."""
    with contextlib.suppress(OSError, ValueError), file.open("rb") as lines:
        return dict(json.loads(lines.readline()))
    return {}


def now() -> str:
    """The current time (UTC), readable for people."""
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")


def _batches(entries: list[Entry]) -> Iterator[list[Entry]]:
    """Group neighbouring metrics into batches; every other entry is a batch of its own."""
    batch: list[Entry] = []
    points = 0
    for entry in entries:
        metrics = len(entry.get("metrics", ()))
        if batch and (not metrics or points + metrics > MOST_AT_ONCE):
            yield batch
            batch, points = [], 0
        if metrics:
            batch.append(entry)
            points += metrics
        else:
            yield [entry]
    if batch:
        yield batch


@contextlib.contextmanager
def _locked_folder(folder: Path) -> Iterator[None]:
    handle = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)


def _whole_lines(file: IO[bytes]) -> int:
    """Remove half a line that a killed process left at the end; returns the number of bytes that remain."""
    file.seek(0)
    size = file.read().rfind(b"\n") + 1
    file.truncate(size)
    return size
