"""Publish and open artifacts: the folders that stages write, each described by a manifest.

A reader never sees half an artifact. `publish` writes into a hidden draft folder beside the target, flushes it to
disk, describes it in `manifest.json` (counts, size and SHA-256 of every file, inputs), and renames it into place
last. `open_artifact` checks what it reads. Work made of parts can resume after a kill: `publish(..., resume=True)`
keeps the draft of unfinished work, and `finished_file` puts only whole parts into it. Only one process at a time
writes at a place (`writer_lock.py`). This module does not know what the files mean: each kind of artifact (corpus,
embeddings, index, model, predictions) has one owner module that does.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from rag_core.errors import ArtifactError
from rag_core.storage.draft import Draft, finished_file
from rag_core.storage.local import finished_folder, open_folder, publish_folder, refuse_foreign_folder
from rag_core.storage.manifest import (
    MANIFEST,
    SCHEMA_VERSION,
    FileEntry,
    Manifest,
    fingerprint_of_files,
    fingerprint_of_json,
    read_manifest,
    sha256_of_file,
    stage_key,
)
from rag_core.storage.places import ObjectPath, as_place

__all__ = [
    "MANIFEST",
    "SCHEMA_VERSION",
    "Draft",
    "FileEntry",
    "Manifest",
    "find_finished",
    "fingerprint_of_files",
    "fingerprint_of_json",
    "finish_publishing",
    "finished_file",
    "local_copy",
    "local_file",
    "manifest_at",
    "open_artifact",
    "publish",
    "refuse_foreign_folder",
    "sha256_of_file",
    "stage_key",
    "working_place",
]


def find_finished(out: Path, kind: str, config: dict[str, Any], made_from: dict[str, str]) -> Manifest | None:
    """The manifest of `out` if the same work made it and it is whole, else None (the stage has to run)."""
    try:
        if manifest_at(out, kind).key != stage_key(kind, config, made_from):
            return None  # do not fetch the files of other work
        return finished_folder(local_copy(out), kind, config, made_from)
    except ArtifactError:
        return None


def manifest_at(path: Path, kind: str | None = None) -> Manifest:
    """The manifest of an artifact, on disk or in an object store. Its files are not checked.

    Raises:
        ArtifactError: there is no manifest, it cannot be read, or (with `kind`) it is of another kind.
    """
    place = as_place(path)
    if not isinstance(place, ObjectPath):
        return read_manifest(place, kind)
    from rag_core.storage.stored_artifact import require_manifest

    return require_manifest(place, kind).manifest


def local_copy(path: Path) -> Path:
    """The folder to read an artifact from: `path` itself, or a copy fetched from the object store into the cache.

    Raises:
        ArtifactError: the store has no artifact there, or a file of it is missing or changed.
    """
    place = as_place(path)
    if not isinstance(place, ObjectPath):
        return place
    from rag_core.storage.stored_artifact import fetch

    return fetch(place)


def local_file(path: Path) -> Path:
    """A local path to read a plain file or folder from (not an artifact): `path` itself, or a copy from the store."""
    place = as_place(path)
    if not isinstance(place, ObjectPath):
        return place
    from rag_core.storage.stored_artifact import fetch_file

    return fetch_file(place)


def finish_publishing(out: Path, kind: str, config: dict[str, Any], made_from: dict[str, str]) -> Manifest | None:
    """Upload an artifact that a stopped run of the same work had finished locally; None if there is none."""
    place = as_place(out)
    if not isinstance(place, ObjectPath):
        return None
    from rag_core.storage.stored_artifact import finish_upload

    return finish_upload(place, kind, config, made_from)


def working_place(out: Path) -> Path:
    """The local folder in which an artifact is made: `out` itself, or one in the cache for an object store.

    Drafts, locks and notes lie beside it.
    """
    place = as_place(out)
    if not isinstance(place, ObjectPath):
        return place
    from rag_core.storage.stored_artifact import work_folder

    return work_folder(place)


@contextlib.contextmanager
def publish(
    out: Path,
    kind: str,
    *,
    config: dict[str, Any] | None = None,
    made_from: dict[str, str] | None = None,
    resume: bool = False,
    wait_seconds: float | None = None,
) -> Iterator[Draft]:
    """Write an artifact: yields a `Draft`; on a clean exit the whole folder appears at `out` and replaces an older one.

    After an exception (Ctrl-C included) an older artifact at `out` is untouched and the draft is deleted. With `resume`
    the draft is kept, and the next call with the same kind, config and made_from continues it. Drafts of other work for
    `out` are deleted. If `out` is a symbolic link to a folder, the artifact is written into that folder.

    Args:
        out: folder of the artifact, or `s3://bucket/prefix`.
        kind: kind of artifact, such as "corpus".
        config: settings that decide the content; part of the key.
        made_from: fingerprints of the inputs; part of the key.
        resume: continue the draft of a stopped run, and keep this one if the run is stopped.
        wait_seconds: how long to wait for another writer; default: `RAG_WAIT_SECONDS`, else 0.

    Raises:
        ArtifactError: `out` is a file, or a folder with files but no manifest; another process is writing there; the
            disk is full or refuses the write; or a link in the draft leads out of it.
    """
    place = as_place(out)
    options: dict[str, Any] = {"config": config, "made_from": made_from, "wait_seconds": wait_seconds}
    if isinstance(place, ObjectPath):
        from rag_core.storage.stored_artifact import publish_to_store

        with publish_to_store(place, kind, resume=resume, **options) as draft:
            yield draft
    else:
        with publish_folder(place, kind, resume=resume, **options) as draft:
            yield draft


def open_artifact(path: Path, kind: str, *, check_content: bool = True) -> Manifest:
    """Read and check the manifest of an artifact.

    Args:
        path: the artifact's folder, or its place in an object store.
        kind: the expected kind ("corpus", "embeddings", "index", "generator", "rag-model", "predictions").
        check_content: compare the SHA-256 of every file (default), or only presence and size.

    Raises:
        ArtifactError: no artifact there, another kind or schema version, or a file missing, cut or changed.
    """
    return open_folder(local_copy(path), kind, check_content=check_content)
