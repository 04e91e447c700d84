"""Artifacts in an object store: `PREFIX/manifest.json`, and the files it describes in `PREFIX/files-FINGERPRINT/`.

A store has no rename. So files go to names that belong to their content and are of no account until `manifest.json`,
written last and on condition that it is still the one seen before, names them: of two publishers exactly one wins. Work
is done in a local folder, under the local lock, and uploaded from there; a killed upload goes on with what is missing.
Readers fetch the files into a local cache (`RAG_CACHE`), checked, and open that as any local artifact.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rag_core.errors import ArtifactError
from rag_core.storage.draft import Draft, disk_errors_named, finished_file
from rag_core.storage.local import finished_folder, publish_folder
from rag_core.storage.manifest import MANIFEST, Manifest, examine_file, parse_manifest, read_manifest
from rag_core.storage.object_store import (
    ManifestChangedError,
    delete,
    download,
    download_plain,
    is_stored,
    list_objects,
    read_object,
    upload,
    write_if_unchanged,
)
from rag_core.storage.places import ObjectPath
from rag_core.storage.writer_lock import reserved


@dataclass(frozen=True, slots=True)
class StoredManifest:
    """A manifest in a store, its bytes, and the ETag that tells it from any later one."""

    manifest: Manifest
    content: bytes
    etag: str


def cache_folder(place: ObjectPath) -> Path:
    """Where this machine keeps what belongs to a place: below `RAG_CACHE`, default `~/.cache/rag`."""
    root = Path(os.environ.get("RAG_CACHE") or Path.home() / ".cache" / "rag")
    return root / hashlib.sha256(str(place).encode()).hexdigest()[:16]


def work_folder(place: ObjectPath) -> Path:
    """The local folder in which an artifact for a place is made, before it is uploaded."""
    return cache_folder(place) / "work" / place.name


def copy_folder(place: ObjectPath, manifest: Manifest) -> Path:
    """Where the local copy of an artifact is."""
    return cache_folder(place) / manifest.fingerprint[:16] / place.name


def files_place(place: ObjectPath, manifest: Manifest) -> ObjectPath:
    """Where the files of an artifact are."""
    found: ObjectPath = place / f"files-{manifest.fingerprint[:16]}"
    return found


def read_stored_manifest(place: ObjectPath) -> StoredManifest | None:
    """The manifest at a place; None if there is none.

    Raises:
        ArtifactError: it cannot be read, has another schema version, or the store does not answer.
    """
    found = read_object(place / MANIFEST)
    return found and StoredManifest(parse_manifest(found[0], str(place / MANIFEST)), *found)


def fetch(place: ObjectPath) -> Path:
    """The artifact at a place as a local folder; files that are in the cache already are not fetched again.

    Raises:
        ArtifactError: there is none, or a file is missing or changed.
    """
    for last in (False, True):
        stored = needed_manifest(place)
        try:
            with disk_errors_named(cache_folder(place)):
                return _fetch(place, stored)
        except FileNotFoundError as error:
            # A publisher deletes the files of the artifact that it has replaced: look once more.
            if last:
                raise ArtifactError(
                    f"{error.args[-1]} is missing, though {place / MANIFEST} names it. "
                    f"Run `rag verify --repair {place}`, or make the artifact again."
                ) from error
    raise AssertionError("not reached")


def needed_manifest(place: ObjectPath, kind: str | None = None) -> StoredManifest:
    """The manifest at a place; ArtifactError if there is none, or (with `kind`) of another kind."""
    stored = read_stored_manifest(place)
    if stored is None:
        raise ArtifactError(f"{place} is not an artifact: it has no {MANIFEST}. Make one first, or correct the path.")
    if kind is not None and stored.manifest.kind != kind:
        raise ArtifactError(f"{place} holds {stored.manifest.kind!r}, but {kind!r} was expected. Correct the path.")
    return stored


def _fetch(place: ObjectPath, stored: StoredManifest) -> Path:
    folder = copy_folder(place, stored.manifest)
    files = files_place(place, stored.manifest)
    sizes = list_objects(files)
    for name, entry in stored.manifest.files.items():
        # A copy in the cache must not hide from this machine what others will miss.
        if name not in sizes:
            raise FileNotFoundError(files / name)
        if sizes[name] != entry.bytes:
            raise ArtifactError(
                f"{files / name} has {sizes[name]} bytes, the manifest says {entry.bytes} bytes. Run `rag verify --repair "
                f"{place}`, or make the artifact again."
            )
        if examine_file(folder, name, entry, check_content=False) is None:
            continue
        if not (folder / name).resolve().is_relative_to(folder.resolve()):
            raise ArtifactError(f"{place / MANIFEST} names {name!r}, which lies outside. Do not trust this artifact.")
        try:
            download(files / name, folder / name, entry)
        except FileNotFoundError as error:
            raise FileNotFoundError(files / name) from error
        except ArtifactError as error:
            raise ArtifactError(f"{error} Run `rag verify --repair {place}`, or make the artifact again.") from error
    folder.mkdir(parents=True, exist_ok=True)
    if not (folder / MANIFEST).is_file() or (folder / MANIFEST).read_bytes() != stored.content:
        _write_whole(folder / MANIFEST, stored.content)
    return folder


def _write_whole(file: Path, content: bytes) -> None:
    with finished_file(file) as unfinished:
        unfinished.write_bytes(content)


def fetch_file(place: ObjectPath) -> Path:
    """A file, or all files of a folder, that somebody else put into the store, as a local copy of today.

    Raises:
        ArtifactError: there is nothing at the place, or an object's name would lead out of the local folder.
    """
    names = list_objects(place)
    target = cache_folder(place) / "plain" / place.name
    try:
        if names:
            shutil.rmtree(target, ignore_errors=True)
            for name in names:
                if not (target / name).resolve().is_relative_to(target.resolve()):
                    raise ArtifactError(
                        f"{place} holds an object {name!r}, whose name leads elsewhere. Rename or remove it."
                    )
                download_plain(place / name, target / name)
        else:
            download_plain(place, target)
    except FileNotFoundError as error:
        raise ArtifactError(f"There is nothing at {place}. Correct the place.") from error
    return target


@contextlib.contextmanager
def publish_to_store(
    place: ObjectPath,
    kind: str,
    *,
    config: dict[str, Any] | None,
    made_from: dict[str, str] | None,
    resume: bool,
    wait_seconds: float | None,
) -> Iterator[Draft]:
    """`artifact.publish` for a place in a store: the same arguments, and the same rules on this machine.

    Raises:
        ArtifactError: as there; or another publisher, wherever it runs, replaced what was there in the meantime.
    """
    before = read_stored_manifest(place)
    if before is None and (foreign := [one for one in list_objects(place) if not one.startswith("files-")]):
        raise ArtifactError(
            f"{place} already holds {foreign[0]!r} and no {MANIFEST}, so it was not made by this program and is left "
            "alone. Give an empty or new place as --out."
        )
    work = work_folder(place)
    with reserved(work, wait_seconds):
        with publish_folder(work, kind, config=config, made_from=made_from, resume=resume) as draft:
            yield draft
        _upload_all(place, work, before)


def finish_upload(place: ObjectPath, kind: str, config: dict[str, Any], made_from: dict[str, str]) -> Manifest | None:
    """Upload the artifact that a run of the same work had made, when it was stopped before all was uploaded."""
    work = work_folder(place)
    if finished_folder(work, kind, config, made_from) is None:
        return None
    with reserved(work):
        return _upload_all(place, work, read_stored_manifest(place))


def _upload_all(place: ObjectPath, work: Path, before: StoredManifest | None) -> Manifest:
    manifest = read_manifest(work)
    files = files_place(place, manifest)

    def upload_missing() -> None:
        for name, entry in manifest.files.items():
            if not is_stored(files / name, entry):
                upload(work / name, files / name, entry)

    upload_missing()
    try:
        write_if_unchanged(place / MANIFEST, (work / MANIFEST).read_bytes(), before.etag if before else None)
    except ManifestChangedError as error:
        now = read_stored_manifest(place)
        winner = f"{now.manifest.fingerprint[:16]}…, made {now.manifest.created_at}" if now else "none any more"
        raise ArtifactError(
            f"{place} was published by another run in the meantime (the artifact there is {winner}); it stands, and this "
            "run's was not put there. Run the command again: it is skipped if the other made the same, and else replaces it."
        ) from error
    if before and before.manifest.fingerprint != manifest.fingerprint:
        delete(files_place(place, before.manifest), list(before.manifest.files))
    # Another publisher may have deleted files with the same content, as those of the artifact that it replaced.
    upload_missing()
    _keep_as_copy(place, work, manifest)
    return manifest


def _keep_as_copy(place: ObjectPath, work: Path, manifest: Manifest) -> None:
    """What was uploaded need not be fetched again."""
    copy = copy_folder(place, manifest)
    copy.parent.mkdir(parents=True, exist_ok=True)
    with contextlib.suppress(OSError):  # it is there already
        work.rename(copy)
    shutil.rmtree(work, ignore_errors=True)
