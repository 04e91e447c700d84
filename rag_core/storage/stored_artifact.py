"""Artifacts in an object store: `PREFIX/manifest.json`, and the files it describes in `PREFIX/files-FINGERPRINT/`.

A store has no rename. So files go to a folder named after their content, and readers ignore it until `manifest.json`
points to it. The manifest is written last, on condition that nobody has changed it meanwhile: of two publishers
exactly one wins. A stage works in a local folder, under the local lock, and uploads from there; after a kill, only
missing files are uploaded. Readers fetch the files into a local cache (`RAG_CACHE`), check them, and open the copy as
a local artifact.
"""

from __future__ import annotations

import contextlib
import hashlib
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rag_core.errors import ArtifactError
from rag_core.storage.draft import Draft, explain_disk_errors, finished_file
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
from rag_core.storage.places import ObjectPath, cache_root
from rag_core.storage.writer_lock import reserved


@dataclass(frozen=True, slots=True)
class StoredManifest:
    """A manifest in a store, its bytes, and its ETag, which changes with every write."""

    manifest: Manifest
    content: bytes
    etag: str


def cache_folder(place: ObjectPath) -> Path:
    """The cache folder of a place on this machine, below `RAG_CACHE` (default `~/.cache/rag`)."""
    return cache_root() / hashlib.sha256(str(place).encode()).hexdigest()[:16]


def work_folder(place: ObjectPath) -> Path:
    """The local folder in which an artifact is made before it is uploaded to a place."""
    return cache_folder(place) / "work" / place.name


def copy_folder(place: ObjectPath, manifest: Manifest) -> Path:
    """The folder of an artifact's local copy."""
    return cache_folder(place) / manifest.fingerprint[:16] / place.name


def files_place(place: ObjectPath, manifest: Manifest) -> ObjectPath:
    """The place of an artifact's files in the store."""
    files: ObjectPath = place / f"files-{manifest.fingerprint[:16]}"
    return files


def read_stored_manifest(place: ObjectPath) -> StoredManifest | None:
    """The manifest at a place; None if there is none.

    Raises:
        ArtifactError: it cannot be read, has another schema version, or the store does not answer.
    """
    stored = read_object(place / MANIFEST)
    return stored and StoredManifest(parse_manifest(stored[0], str(place / MANIFEST)), *stored)


def fetch(place: ObjectPath) -> Path:
    """Fetch the artifact at a place into a local folder; files already in the cache are not fetched again.

    Raises:
        ArtifactError: there is no artifact, or a file is missing or changed.
    """
    for last in (False, True):
        stored = require_manifest(place)
        try:
            with explain_disk_errors(cache_folder(place)):
                return _fetch(place, stored)
        except FileNotFoundError as error:
            # A publisher may have replaced the artifact and deleted the old files: retry once with the new manifest.
            if last:
                raise ArtifactError(
                    f"{error.args[-1]} is missing, though {place / MANIFEST} names it. "
                    f"Run `rag verify --repair {place}`, or make the artifact again."
                ) from error
    raise AssertionError("not reached")


def require_manifest(place: ObjectPath, kind: str | None = None) -> StoredManifest:
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
        # Checked even if the cache has the file: this machine must not miss damage that others would see.
        if name not in sizes:
            raise FileNotFoundError(files / name)
        if sizes[name] != entry.bytes:
            raise ArtifactError(
                f"{files / name} has {sizes[name]} bytes, the manifest says {entry.bytes} bytes. "
                f"Run `rag verify --repair {place}`, or make the artifact again."
            )
        if examine_file(folder, name, entry, check_content=False) is None:
            continue
        if not (folder / name).resolve().is_relative_to(folder.resolve()):
            raise ArtifactError(
                f"{place / MANIFEST} names {name!r}, which lies outside the artifact's folder. "
                "Do not trust this artifact."
            )
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
    """Fetch a file, or all files of a folder, that is not an artifact. It is fetched anew at every call.

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
                        f"{place} holds an object {name!r}, whose name leads out of the folder. Rename or remove it."
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
        ArtifactError: as for `artifact.publish`; or another publisher, on any machine, published there meanwhile.
    """
    before = read_stored_manifest(place)
    if before is None and (foreign := [name for name in list_objects(place) if not name.startswith("files-")]):
        raise ArtifactError(
            f"{place} already holds {foreign[0]!r} and no {MANIFEST}, so it was not made by this program and is left "
            "unchanged. Give an empty or new place as --out."
        )
    work = work_folder(place)
    with reserved(work, wait_seconds):
        with publish_folder(work, kind, config=config, made_from=made_from, resume=resume) as draft:
            yield draft
        _upload_all(place, work, before)


def finish_upload(place: ObjectPath, kind: str, config: dict[str, Any], made_from: dict[str, str]) -> Manifest | None:
    """Upload an artifact that a run of the same work finished locally but did not upload; None if there is none."""
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
        winner = f"{now.manifest.fingerprint[:16]}…, made {now.manifest.created_at}" if now else "already gone"
        raise ArtifactError(
            f"{place} was published by another run in the meantime (the artifact there is {winner}); it stands, and "
            "this run's artifact was not published. Run the command again: it is skipped if the other run did the same "
            "work, and replaces the artifact otherwise."
        ) from error
    if before and before.manifest.fingerprint != manifest.fingerprint:
        delete(files_place(place, before.manifest), list(before.manifest.files))
    # If another publisher replaced an artifact with the same content meanwhile, it deleted these files: upload again.
    upload_missing()
    _keep_as_copy(place, work, manifest)
    return manifest


def _keep_as_copy(place: ObjectPath, work: Path, manifest: Manifest) -> None:
    """Move the uploaded folder into the cache, so that this machine need not fetch it again."""
    copy = copy_folder(place, manifest)
    copy.parent.mkdir(parents=True, exist_ok=True)
    with contextlib.suppress(OSError):  # the cache already has it
        work.rename(copy)
    shutil.rmtree(work, ignore_errors=True)
