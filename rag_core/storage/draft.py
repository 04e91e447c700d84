"""The draft folder of an artifact: write whole parts, describe all files, rename into place.

The next run cleans up what a killed run left beside the target. If the disk refuses a write (full, quota, read-only, no
permission), an `ArtifactError` says so, and an older artifact at the target is untouched.
"""

from __future__ import annotations

import contextlib
import datetime
import errno
import glob
import os
import shutil
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from rag_core.errors import ArtifactError, RagError
from rag_core.storage.manifest import FileEntry, Manifest, fingerprint_of_content, sha256_of_file, stage_key

# Prefix of a part's file name while it is being written.
UNFINISHED = ".unfinished-"
_FULL = (errno.ENOSPC, errno.EDQUOT)
_REFUSED = (errno.EROFS, errno.EACCES, errno.EPERM)


class Draft:
    """An artifact being written: put files into `folder`; `counts` and `details` go to the manifest.

    In resumed work, `folder` already holds the parts that `finished_file` wrote before.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.counts: dict[str, int] = {}
        self.details: dict[str, Any] = {}


def draft_folder(out: Path, key: str) -> Path:
    """The draft folder for `out` of the work with this key."""
    return out.parent / f".{out.name}.draft-{key[:16]}"


@contextlib.contextmanager
def finished_file(file: Path) -> Iterator[Path]:
    """Yields a path to write to; on a clean exit it is flushed to disk and renamed to `file`. So `file` is whole."""
    unfinished = file.parent / f"{UNFINISHED}{uuid.uuid4().hex[:8]}{file.suffix}"
    try:
        yield unfinished
        sync(unfinished)
        unfinished.rename(file)
        sync(file.parent)
    finally:
        unfinished.unlink(missing_ok=True)


def describe(draft: Draft, kind: str, config: dict[str, Any], made_from: dict[str, str]) -> Manifest:
    """Flush every file of the draft to disk and return the manifest that describes them.

    Raises:
        ArtifactError: a link in the draft leads out of it, so the artifact would depend on a file outside itself.
    """
    files: dict[str, FileEntry] = {}
    inside = draft.folder.resolve()
    for file in sorted(draft.folder.rglob("*")):
        name = file.relative_to(draft.folder).as_posix()
        if file.is_symlink() and not file.resolve().is_relative_to(inside):
            raise ArtifactError(
                f"{file} is a link to {file.resolve()}, outside the artifact; nothing was published. "
                "Put the file itself there, or remove the link."
            )
        if file.is_file():
            sync(file)
            files[name] = FileEntry(bytes=file.stat().st_size, sha256=sha256_of_file(file))
    return Manifest(
        kind=kind,
        created_at=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        key=stage_key(kind, config, made_from),
        fingerprint=fingerprint_of_content(files),
        config=config,
        made_from=made_from,
        counts=draft.counts,
        details=draft.details,
        files=files,
    )


def clear_up(out: Path, kept: Path | None) -> None:
    """Delete leftovers of killed runs: every draft except `kept`, and unfinished parts inside `kept`.

    If a run was killed between the two renames of a swap, the older artifact is put back at `out`.
    """
    name = glob.escape(out.name)
    for old in out.parent.glob(f".{name}.old-*"):
        if out.exists():
            _remove(old)
        else:
            old.rename(out)
    for draft in out.parent.glob(f".{name}.draft-*"):
        if draft != kept or draft.is_symlink():
            _remove(draft)
    if kept:
        drop_unfinished(kept)


def drop_unfinished(folder: Path) -> None:
    """Delete half-written parts whose writers were killed inside `finished_file`."""
    for part in list(folder.rglob(f"{UNFINISHED}*")):
        _remove(part)


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink()  # deletes a link itself, not its target


def swap_into_place(folder: Path, out: Path) -> None:
    """Rename `folder` to `out`. An older artifact there is moved aside first and deleted last."""
    old = out.parent / f".{out.name}.old-{uuid.uuid4().hex[:8]}"
    if out.exists():
        out.rename(old)
    try:
        folder.rename(out)
    except OSError:
        if old.exists():
            old.rename(out)
        raise
    sync(out.parent)
    shutil.rmtree(old, ignore_errors=True)


def write_synced(path: Path, text: str) -> None:
    """Write a small file and flush it and its folder to disk."""
    path.write_text(text, encoding="utf-8")
    sync(path)
    sync(path.parent)


def sync(path: Path) -> None:
    """Flush a file, or a folder's list of entries, to disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@contextlib.contextmanager
def explain_disk_errors(out: Path, *, resume: bool = False) -> Iterator[None]:
    """Turn an error of the disk (full, no permission) while writing `out` into an ArtifactError. Others pass unchanged.

    Args:
        out: the place being written.
        resume: finished parts are kept; the message then says so.
    """
    try:
        yield
    except RagError:
        raise
    except Exception as error:
        reason = _full(error) or _refused(error, out)
        if reason is None:
            raise
        state = "The older artifact there still stands" if out.exists() else "Nothing was published"
        kept = "; finished parts are kept, and the same command continues from them" if resume else ""
        raise ArtifactError(f"{out} could not be written: {reason} {state}{kept}.") from error


def _full(error: Exception) -> str | None:
    """The reason and remedy if the disk or its quota is full, else None.

    C++ and Rust libraries, and workers in other processes, pass on the system's message but not its errno.
    """
    for number in _FULL:
        words = os.strerror(number)
        if getattr(error, "errno", None) == number or words in str(error):
            return f"{words}. Free some space, or give an --out on another disk, and run it again."
    return None


def _refused(error: Exception, out: Path) -> str | None:
    """The reason and remedy if the system refuses to write at `out`; None for other errors and for files elsewhere."""
    if not isinstance(error, OSError) or error.errno not in _REFUSED:
        return None
    place = Path(os.path.abspath(error.filename)) if isinstance(error.filename, str) else out
    if not place.is_relative_to(out.parent) and not out.is_relative_to(place):
        return None
    return f"{error.strerror} ({place}). Give an --out where you may write, or make this place writable."
