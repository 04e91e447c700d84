"""Folders that a stage publishes: written aside, described by a manifest, renamed into place last.

A reader never sees half an artifact: everything is written into a hidden draft folder beside the target, flushed
to disk, described in `manifest.json` (counts, bytes and SHA-256 of every file, what it was made from), and only
then renamed. `open_artifact` checks what it reads. Work that is made of parts goes on where a killed run stopped:
`publish(..., resume=True)` keeps the draft of unfinished work, `finished_file` puts only whole parts into it. One process
at a time writes at a place (`writer_lock.py`). This module knows nothing about what the files mean: each kind
of artifact (corpus, embeddings, index, model, predictions) has one owner module that does.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from rag_core.errors import ArtifactError
from rag_core.storage.draft import (
    Draft,
    finished_file,
)
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
    """The manifest of `out` if it is whole and was made by the same work, else None (so the stage has to run)."""
    try:
        if manifest_at(out, kind).key != stage_key(kind, config, made_from):
            return None  # before all its files are fetched for nothing
        return finished_folder(local_copy(out), kind, config, made_from)
    except ArtifactError:
        return None


def manifest_at(path: Path, kind: str | None = None) -> Manifest:
    """The manifest of an artifact, here or in an object store; the files that it names are not looked at.

    Raises:
        ArtifactError: there is none, it cannot be read, or (with `kind`) it is of another kind.
    """
    place = as_place(path)
    if not isinstance(place, ObjectPath):
        return read_manifest(place, kind)
    from rag_core.storage.stored_artifact import needed_manifest

    return needed_manifest(place, kind).manifest


def local_copy(path: Path) -> Path:
    """A folder to read an artifact from: `path` itself, or what was fetched from an object store into the cache.

    Raises:
        ArtifactError: the store has no artifact there, or a file of it is missing or changed.
    """
    place = as_place(path)
    if not isinstance(place, ObjectPath):
        return place
    from rag_core.storage.stored_artifact import fetch

    return fetch(place)


def local_file(path: Path) -> Path:
    """A file (or a folder of files) to read that is no artifact: `path` itself, or a copy from an object store."""
    place = as_place(path)
    if not isinstance(place, ObjectPath):
        return place
    from rag_core.storage.stored_artifact import fetch_file

    return fetch_file(place)


def finish_publishing(out: Path, kind: str, config: dict[str, Any], made_from: dict[str, str]) -> Manifest | None:
    """Upload what a run of the same work had made for an object store when it was stopped; None if there is nothing."""
    place = as_place(out)
    if not isinstance(place, ObjectPath):
        return None
    from rag_core.storage.stored_artifact import finish_upload

    return finish_upload(place, kind, config, made_from)


def working_place(out: Path) -> Path:
    """The local folder beside which drafts, locks and notes of an artifact are: its own, or one in the cache."""
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
    """Write an artifact: yields a `Draft`; on a clean exit the folder appears at `out`, whole, replacing an older one.

    After an exception (Ctrl-C included) an artifact that stood at `out` still stands, and nothing else is left behind,
    unless `resume` is set: then the draft stays, and the next call for the same kind, config and made_from goes on with
    it. A draft of other work for `out` is deleted. Where `out` is a link to a folder, the artifact is written there.

    Args:
        out: folder of the artifact, or `s3://bucket/prefix`.
        kind: what it is.
        config: settings that decide the content; part of the key.
        made_from: fingerprints of the inputs; part of the key.
        resume: keep the draft of work that was stopped, and go on with it.
        wait_seconds: how long to wait for another writer; default: `RAG_WAIT_SECONDS`, else 0.

    Raises:
        ArtifactError: `out` is a file, or a folder with content that no stage of ours published; another process
            is writing there; the disk is full or refuses; or a link in the draft leads out of it.
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
        kind: what it must be ("corpus", "embeddings", "index", "generator", "rag-model", "predictions").
        check_content: compare the SHA-256 of every file (default), or only presence and size.

    Raises:
        ArtifactError: nothing there, another kind or schema version, or a file missing, cut or changed.
    """
    return open_folder(local_copy(path), kind, check_content=check_content)
