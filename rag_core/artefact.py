"""Folders that a stage publishes: written aside, described by a manifest, renamed into place last.

A reader never sees half an artefact: everything is written into a hidden draft folder beside the target, flushed
to disk, described in `manifest.json` (counts, bytes and SHA-256 of every file, what it was made from), and only
then renamed. `open_artefact` checks what it reads. Work that is made of parts goes on where a killed run stopped:
`publish(..., resume=True)` keeps the draft of unfinished work, `finished_file` puts only whole parts into it. One process
at a time writes at a place. This module knows nothing about what the files mean: each kind
of artefact (corpus, embeddings, index, model, predictions) has one owner module that does.
"""

from __future__ import annotations

import contextlib
import datetime
import fcntl
import glob
import hashlib
import json
import os
import shutil
import socket
import uuid
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import IO, Any

from pydantic import BaseModel, Field, ValidationError

from rag_core.errors import ArtefactError

SCHEMA_VERSION = 1
MANIFEST = "manifest.json"
# How names of parts begin while they are written.
_UNFINISHED = ".unfinished-"


class FileEntry(BaseModel):
    """Size and SHA-256 of one file of an artefact."""

    bytes: int
    sha256: str


class Manifest(BaseModel):
    """What `manifest.json` says of the folder it lies in.

    `fingerprint` identifies the content (it is made from the files' names and checksums); `key` identifies the work
    (it is made from the kind, the settings and the fingerprints of the inputs), so that a stage whose key is
    already on disk need not run again.
    """

    schema_version: int = SCHEMA_VERSION
    kind: str
    created_at: str
    key: str
    fingerprint: str
    config: dict[str, Any] = Field(default_factory=dict)
    made_from: dict[str, str] = Field(default_factory=dict)
    counts: dict[str, int] = Field(default_factory=dict)
    details: dict[str, Any] = Field(default_factory=dict)
    files: dict[str, FileEntry]


class Draft:
    """A folder being written. Put files into `folder`; what is set in `counts` and `details` goes to the manifest.

    Resumed work finds in `folder` what `finished_file` put there before.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.counts: dict[str, int] = {}
        self.details: dict[str, Any] = {}


def sha256_of_file(path: Path) -> str:
    """SHA-256 of a file's bytes, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def fingerprint_of_files(paths: Iterable[Path]) -> str:
    """SHA-256 over the contents of several files, in the order given. Names do not count, so a renamed file is the same."""
    digest = hashlib.sha256()
    for path in paths:
        digest.update(bytes.fromhex(sha256_of_file(path)))
    return digest.hexdigest()


def fingerprint_of_json(value: Any) -> str:
    """SHA-256 of a JSON-like value, independent of the order of its keys."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def stage_key(kind: str, config: dict[str, Any], made_from: dict[str, str]) -> str:
    """Identity of a piece of work: what is made, with which settings, from which contents."""
    return fingerprint_of_json([SCHEMA_VERSION, kind, config, made_from])


def find_finished(out: Path, kind: str, config: dict[str, Any], made_from: dict[str, str]) -> Manifest | None:
    """The manifest of `out` if it is whole and was made by the same work, else None (so the stage has to run)."""
    try:
        manifest = open_artefact(out, kind)
    except ArtefactError:
        return None
    return manifest if manifest.key == stage_key(kind, config, made_from) else None


@contextlib.contextmanager
def publish(
    out: Path,
    kind: str,
    *,
    config: dict[str, Any] | None = None,
    made_from: dict[str, str] | None = None,
    resume: bool = False,
) -> Iterator[Draft]:
    """Write an artefact: yields a `Draft`; on a clean exit the folder appears at `out`, whole, replacing an older one.

    After an exception (Ctrl-C included) an artefact that stood at `out` still stands, and nothing else is left behind,
    unless `resume` is set: then the draft stays, and the next call for the same kind, config and made_from goes on with
    it. A draft of other work for `out` is deleted.

    Raises:
        ArtefactError: `out` is a file, or a folder with content that no stage of ours published, or another process
            is writing there.
    """
    config, made_from = config or {}, made_from or {}
    out = Path(os.path.abspath(out))
    refuse_foreign_folder(out)
    out.parent.mkdir(parents=True, exist_ok=True)
    with _only_writer(out):
        draft = Draft(out.parent / f".{out.name}.draft-{stage_key(kind, config, made_from)[:16]}")
        _clear_up(out, kept=draft.folder if resume else None)
        draft.folder.mkdir(exist_ok=True)
        published = False
        try:
            yield draft
            manifest = _describe(draft, kind, config, made_from)
            _write_synced(draft.folder / MANIFEST, manifest.model_dump_json(indent=2) + "\n")
            _swap_into_place(draft.folder, out)
            published = True
        finally:
            if published or not resume:
                shutil.rmtree(draft.folder, ignore_errors=True)


@contextlib.contextmanager
def finished_file(file: Path) -> Iterator[Path]:
    """Yields a path to write to; on a clean exit it is flushed to disk and becomes `file`, so that `file` is whole."""
    unfinished = file.parent / f"{_UNFINISHED}{uuid.uuid4().hex[:8]}{file.suffix}"
    try:
        yield unfinished
        _sync(unfinished)
        unfinished.rename(file)
        _sync(file.parent)
    finally:
        unfinished.unlink(missing_ok=True)


def refuse_foreign_folder(out: Path) -> None:
    """Raise ArtefactError if publishing at `out` would destroy something that is not an artefact of ours."""
    if out.is_file():
        raise ArtefactError(f"{out} is a file; the output must be a folder. Give another --out.")
    if out.is_dir() and any(out.iterdir()) and not (out / MANIFEST).is_file():
        raise ArtefactError(
            f"{out} already holds files and no {MANIFEST}, so it was not made by this program and is left alone. "
            "Give an empty or new folder as --out."
        )


def open_artefact(path: Path, kind: str, *, check_content: bool = True) -> Manifest:
    """Read and check the manifest of an artefact.

    Args:
        path: the artefact's folder.
        kind: what it must be ("corpus", "embeddings", "index", "generator", "rag-model", "predictions").
        check_content: compare the SHA-256 of every file (default), or only presence and size.

    Raises:
        ArtefactError: nothing there, another kind or schema version, or a file missing, cut or changed.
    """
    path = Path(path)
    manifest_path = path / MANIFEST
    if not manifest_path.is_file():
        found = "no such folder" if not path.exists() else f"it has no {MANIFEST}"
        raise ArtefactError(f"{path} is not a {kind} artefact: {found}. Make one first, or correct the path.")
    try:
        manifest = Manifest.model_validate_json(manifest_path.read_bytes())
    except (ValidationError, UnicodeDecodeError) as error:
        raise ArtefactError(
            f"{manifest_path} cannot be read ({_first_line(error)}). Make the artefact again."
        ) from error
    if manifest.schema_version != SCHEMA_VERSION:
        raise ArtefactError(
            f"{manifest_path} has schema version {manifest.schema_version}; this program reads version "
            f"{SCHEMA_VERSION}. Use the release that wrote it, or make the artefact again."
        )
    if manifest.kind != kind:
        raise ArtefactError(f"{path} holds {manifest.kind!r}, but {kind!r} was expected here. Correct the path.")
    for name, entry in manifest.files.items():
        _check_file(path, name, entry, check_content=check_content)
    return manifest


def _check_file(folder: Path, name: str, entry: FileEntry, *, check_content: bool) -> None:
    file = folder / name
    if not file.resolve().is_relative_to(folder.resolve()):
        raise ArtefactError(
            f"{folder / MANIFEST} names {name!r}, which lies outside the folder. Do not trust this artefact."
        )
    if not file.is_file():
        raise ArtefactError(f"{file} is missing, though the manifest names it. Make the artefact again.")
    size = file.stat().st_size
    if size != entry.bytes:
        raise ArtefactError(f"{file} has {size} bytes, the manifest says {entry.bytes}. Make the artefact again.")
    if check_content and sha256_of_file(file) != entry.sha256:
        raise ArtefactError(f"{file} was changed since it was published (SHA-256 differs). Make the artefact again.")


def _describe(draft: Draft, kind: str, config: dict[str, Any], made_from: dict[str, str]) -> Manifest:
    files: dict[str, FileEntry] = {}
    for file in sorted(path for path in draft.folder.rglob("*") if path.is_file()):
        _sync(file)
        name = file.relative_to(draft.folder).as_posix()
        files[name] = FileEntry(bytes=file.stat().st_size, sha256=sha256_of_file(file))
    return Manifest(
        kind=kind,
        created_at=_now(),
        key=stage_key(kind, config, made_from),
        fingerprint=fingerprint_of_json({name: entry.sha256 for name, entry in files.items()}),
        config=config,
        made_from=made_from,
        counts=draft.counts,
        details=draft.details,
        files=files,
    )


@contextlib.contextmanager
def _only_writer(out: Path) -> Iterator[None]:
    """This process alone writes at `out`. The system ends the hold with the process, however that ends."""
    lock = out.parent / f".{out.name}.lock"
    with _held(lock, out) as file:
        file.write(f"process {os.getpid()} on {socket.gethostname()}, since {_now()}")
        file.flush()
        try:
            yield
        finally:
            lock.unlink(missing_ok=True)


@contextlib.contextmanager
def _held(lock: Path, out: Path) -> Iterator[IO[str]]:
    while True:
        with lock.open("a+", encoding="utf-8") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                file.seek(0)
                raise ArtefactError(
                    f"{out} is being written by another run ({file.read() or 'it has just begun'}). Wait until it has "
                    "ended, or give another --out."
                ) from error
            # The former holder deletes the file that it holds: a lock on a deleted one keeps nobody out.
            if lock.exists() and os.path.samestat(os.fstat(file.fileno()), lock.stat()):
                file.truncate(0)
                yield file
                return


def _clear_up(out: Path, kept: Path | None) -> None:
    """What killed runs left beside `out`: drafts go but for `kept`, and in that one the parts that were not finished."""
    name = glob.escape(out.name)
    for old in out.parent.glob(f".{name}.old-*"):  # killed between the two renames of a swap, or after them
        if out.exists():
            shutil.rmtree(old)
        else:
            old.rename(out)
    for draft in out.parent.glob(f".{name}.draft-*"):
        if draft != kept:
            shutil.rmtree(draft)
    for part in kept.rglob(f"{_UNFINISHED}*") if kept else ():
        part.unlink()


def _swap_into_place(folder: Path, out: Path) -> None:
    """Rename `folder` to `out`; an older artefact there is moved aside first and deleted after."""
    old = out.parent / f".{out.name}.old-{uuid.uuid4().hex[:8]}"
    if out.exists():
        out.rename(old)
    try:
        folder.rename(out)
    except OSError:
        if old.exists():
            old.rename(out)
        raise
    _sync(out.parent)
    shutil.rmtree(old, ignore_errors=True)


def _write_synced(path: Path, text: str) -> None:
    path.write_text(text, encoding="utf-8")
    _sync(path)
    _sync(path.parent)


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _now() -> str:
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")


def _first_line(error: Exception) -> str:
    return str(error).splitlines()[0]
