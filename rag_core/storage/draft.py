"""A folder while it is written: parts that are whole or absent, a description of all files, the swap into place.

What a killed run leaves beside its target is put right by the next one. Where the disk refuses (full, quota, read-only,
no permission), that is an `ArtifactError` which says so, and what stood at the target still stands.
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

# How names of parts begin while they are written.
UNFINISHED = ".unfinished-"
_FULL = (errno.ENOSPC, errno.EDQUOT)
_REFUSED = (errno.EROFS, errno.EACCES, errno.EPERM)


class Draft:
    """A folder being written. Put files into `folder`; what is set in `counts` and `details` goes to the manifest.

    Resumed work finds in `folder` what `finished_file` put there before.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.counts: dict[str, int] = {}
        self.details: dict[str, Any] = {}


def draft_folder(out: Path, key: str) -> Path:
    """Where the artifact for `out` is written by the work with this key."""
    return out.parent / f".{out.name}.draft-{key[:16]}"


@contextlib.contextmanager
def finished_file(file: Path) -> Iterator[Path]:
    """Yields a path to write to; on a clean exit it is flushed to disk and becomes `file`, so that `file` is whole."""
    unfinished = file.parent / f"{UNFINISHED}{uuid.uuid4().hex[:8]}{file.suffix}"
    try:
        yield unfinished
        sync(unfinished)
        unfinished.rename(file)
        sync(file.parent)
    finally:
        unfinished.unlink(missing_ok=True)


def describe(draft: Draft, kind: str, config: dict[str, Any], made_from: dict[str, str]) -> Manifest:
    """The manifest of what lies in the draft; every file is flushed to disk.

    Raises:
        ArtifactError: a link in the draft leads out of it, so the artifact would depend on a file that is not its own.
    """
    files: dict[str, FileEntry] = {}
    inside = draft.folder.resolve()
    for file in sorted(draft.folder.rglob("*")):
        name = file.relative_to(draft.folder).as_posix()
        if file.is_symlink() and not file.resolve().is_relative_to(inside):
            raise ArtifactError(
                f"{file} is a link to {file.resolve()}, outside the artifact that is written; nothing was published. "
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
    """What killed runs left beside `out`: drafts go but for `kept`, and in that one the parts that were not finished."""
    name = glob.escape(out.name)
    for old in out.parent.glob(f".{name}.old-*"):  # killed between the two renames of a swap, or after them
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
    """Delete the halves of parts: their writers were killed before `finished_file` could."""
    for part in list(folder.rglob(f"{UNFINISHED}*")):
        _remove(part)


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink()  # of a link, only the link


def swap_into_place(folder: Path, out: Path) -> None:
    """Rename `folder` to `out`; an older artifact there is moved aside first and deleted after."""
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
    """Flush a file, or a folder's list of names, to disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@contextlib.contextmanager
def disk_errors_named(out: Path, *, resume: bool = False) -> Iterator[None]:
    """Turn a disk's refusal while `out` is written into an ArtifactError; other errors pass as they are.

    Args:
        out: the place that is written.
        resume: finished parts are kept, which the message says.
    """
    try:
        yield
    except RagError:
        raise
    except Exception as error:
        reason = _full(error) or _refused(error, out)
        if reason is None:
            raise
        stands = "the artifact that was there still stands" if out.exists() else "nothing was published"
        kept = "; finished parts are kept, and the same command goes on from them" if resume else ""
        raise ArtifactError(f"{out} could not be written: {reason} (so far {stands}{kept})") from error


def _full(error: Exception) -> str | None:
    """Whether the disk, or the quota on it, is full.

    Libraries in C++ and Rust, and workers in other processes, hand on the system's words but not its number.
    """
    for number in _FULL:
        words = os.strerror(number)
        if getattr(error, "errno", None) == number or words in str(error):
            return f"{words}. Free some, or give an --out on another disk, and run it again."
    return None


def _refused(error: Exception, out: Path) -> str | None:
    """Whether the system does not let us write there; a file that could not be read elsewhere is another matter."""
    if not isinstance(error, OSError) or error.errno not in _REFUSED:
        return None
    place = Path(os.path.abspath(error.filename)) if isinstance(error.filename, str) else out
    if not place.is_relative_to(out.parent) and not out.is_relative_to(place):
        return None
    return f"{error.strerror} ({place}). Give an --out where you may write, or make this place writable."
