"""`rag verify` for an artifact in an object store: read and compare every object, and replace damaged ones."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path, PurePosixPath

from rag_core.errors import ArtifactError
from rag_core.storage.draft import finished_file
from rag_core.storage.manifest import MANIFEST, Finding, Manifest, examine_file, sha256_of_file
from rag_core.storage.object_store import download, download_plain, list_objects, upload
from rag_core.storage.places import ObjectPath
from rag_core.storage.stored_artifact import cache_folder, copy_folder, files_place, require_manifest


def stored_artifacts_below(place: ObjectPath) -> list[ObjectPath]:
    """The places at or below `place` that have a manifest."""
    folders = [PurePosixPath(name).parent for name in list_objects(place) if PurePosixPath(name).name == MANIFEST]
    return [place / folder for folder in sorted(folders) if not any(part.startswith("files-") for part in folder.parts)]


def stored_findings(place: ObjectPath, manifest: Manifest) -> Iterator[Finding]:
    """Faults of the objects in the store. Every object is read from the store, even if the cache has a copy."""
    files = files_place(place, manifest)
    sizes = list_objects(place)
    scratch = cache_folder(place) / "verify"
    try:
        for name, entry in manifest.files.items():
            stored = f"{files.name}/{name}"
            if stored not in sizes:
                yield Finding(stored, "missing", f"{entry.bytes} bytes", "no such object")
            elif sizes[stored] != entry.bytes:
                yield Finding(stored, "size", f"{entry.bytes} bytes", f"{sizes[stored]} bytes")
            else:
                download_plain(files / name, scratch)
                if (sha256 := sha256_of_file(scratch)) != entry.sha256:
                    yield Finding(stored, "content", entry.sha256, sha256)
    finally:
        scratch.unlink(missing_ok=True)
    known = {MANIFEST, *(f"{files.name}/{name}" for name in manifest.files)}
    for name in sorted(set(sizes) - known):
        yield Finding(name, "foreign", "no such object", "the manifest does not list it")


def replace_damaged(place: ObjectPath, make_again: Callable[[Path], list[str]]) -> list[str]:
    """Upload damaged objects again from the local copy, whose own damaged files are made again; returns their names.

    Args:
        place: the artifact.
        make_again: makes the damaged or missing files of a local artifact again.
    """
    stored = require_manifest(place)
    manifest, files = stored.manifest, files_place(place, stored.manifest)
    start = f"{files.name}/"
    findings = stored_findings(place, manifest)
    damaged = [finding.file.removeprefix(start) for finding in findings if finding.state != "foreign"]
    if not damaged:
        return []
    copy = copy_folder(place, manifest)
    copy.mkdir(parents=True, exist_ok=True)
    for name, entry in manifest.files.items():
        if name not in damaged and examine_file(copy, name, entry, check_content=True):
            download(files / name, copy / name, entry)
    with finished_file(copy / MANIFEST) as unfinished:
        unfinished.write_bytes(stored.content)
    make_again(copy)
    for name in damaged:
        if examine_file(copy, name, manifest.files[name], check_content=True):
            raise ArtifactError(f"{files / name} could not be made again. Make the artifact again.")
        upload(copy / name, files / name, manifest.files[name])
    return damaged
