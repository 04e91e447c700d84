"""Folders that a stage publishes: written aside, described by a manifest, renamed into place last.

A reader never sees half an artefact: everything is written into a hidden draft folder beside the target, flushed
to disk, described in `manifest.json` (counts, bytes and SHA-256 of every file, what it was made from), and only
then renamed. `open_artefact` checks what it reads. Work that is made of parts goes on where a killed run stopped:
`publish(..., resume=True)` keeps the draft of unfinished work, `finished_file` puts only whole parts into it. One process
at a time writes at a place (`writer_lock.py`). This module knows nothing about what the files mean: each kind
of artefact (corpus, embeddings, index, model, predictions) has one owner module that does.
"""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from rag_core.errors import ArtefactError
from rag_core.storage.draft import (
    Draft,
    clear_up,
    describe,
    disk_errors_named,
    draft_folder,
    drop_unfinished,
    finished_file,
    swap_into_place,
    write_synced,
)
from rag_core.storage.manifest import (
    MANIFEST,
    SCHEMA_VERSION,
    FileEntry,
    Manifest,
    examine_files,
    fingerprint_of_files,
    fingerprint_of_json,
    read_manifest,
    remedy,
    sha256_of_file,
    stage_key,
)
from rag_core.storage.places import ObjectPath, as_place
from rag_core.storage.writer_lock import only_writer

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
    "open_artefact",
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
            return None  # before all its files are read for nothing
        return open_artefact(out, kind)
    except ArtefactError:
        return None


def manifest_at(path: Path, kind: str | None = None) -> Manifest:
    """The manifest of an artefact, here or in an object store; the files that it names are not looked at.

    Raises:
        ArtefactError: there is none, it cannot be read, or (with `kind`) it is of another kind.
    """
    place = as_place(path)
    if not isinstance(place, ObjectPath):
        return read_manifest(place, kind)
    from rag_core.storage.stored_artifact import needed_manifest

    return needed_manifest(place, kind).manifest


def local_copy(path: Path) -> Path:
    """A folder to read an artefact from: `path` itself, or what was fetched from an object store into the cache.

    Raises:
        ArtefactError: the store has no artefact there, or a file of it is missing or changed.
    """
    place = as_place(path)
    if not isinstance(place, ObjectPath):
        return place
    from rag_core.storage.stored_artifact import fetch

    return fetch(place)


def local_file(path: Path) -> Path:
    """A file (or a folder of files) to read that is no artefact: `path` itself, or a copy from an object store."""
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
    """The local folder beside which drafts, locks and notes of an artefact are: its own, or one in the cache."""
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
    """Write an artefact: yields a `Draft`; on a clean exit the folder appears at `out`, whole, replacing an older one.

    After an exception (Ctrl-C included) an artefact that stood at `out` still stands, and nothing else is left behind,
    unless `resume` is set: then the draft stays, and the next call for the same kind, config and made_from goes on with
    it. A draft of other work for `out` is deleted. Where `out` is a link to a folder, the artefact is written there.

    Args:
        out: folder of the artefact, or `s3://bucket/prefix`.
        kind: what it is.
        config: settings that decide the content; part of the key.
        made_from: fingerprints of the inputs; part of the key.
        resume: keep the draft of work that was stopped, and go on with it.
        wait_seconds: how long to wait for another writer; default: `RAG_WAIT_SECONDS`, else 0.

    Raises:
        ArtefactError: `out` is a file, or a folder with content that no stage of ours published; another process
            is writing there; the disk is full or refuses; or a link in the draft leads out of it.
    """
    place = as_place(out)
    if isinstance(place, ObjectPath):
        from rag_core.storage.stored_artifact import publish_to_store  # which is built on this module

        options: dict[str, Any] = {"config": config, "made_from": made_from, "wait_seconds": wait_seconds}
        with publish_to_store(place, kind, resume=resume, **options) as draft:
            yield draft
        return
    config, made_from = config or {}, made_from or {}
    out = Path(os.path.realpath(out))
    refuse_foreign_folder(out)
    with contextlib.ExitStack() as stack:
        stack.enter_context(disk_errors_named(out, resume=resume))
        out.parent.mkdir(parents=True, exist_ok=True)
        stack.enter_context(only_writer(out, wait_seconds))
        draft = Draft(draft_folder(out, stage_key(kind, config, made_from)))
        clear_up(out, kept=draft.folder if resume else None)
        draft.folder.mkdir(exist_ok=True)
        published = False
        try:
            yield draft
            drop_unfinished(draft.folder)
            manifest = describe(draft, kind, config, made_from)
            write_synced(draft.folder / MANIFEST, manifest.model_dump_json(indent=2) + "\n")
            swap_into_place(draft.folder, out)
            published = True
        finally:
            if published or not resume:
                shutil.rmtree(draft.folder, ignore_errors=True)


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
        path: the artefact's folder, or its place in an object store.
        kind: what it must be ("corpus", "embeddings", "index", "generator", "rag-model", "predictions").
        check_content: compare the SHA-256 of every file (default), or only presence and size.

    Raises:
        ArtefactError: nothing there, another kind or schema version, or a file missing, cut or changed.
    """
    path = local_copy(path)
    manifest = read_manifest(path, kind)
    for finding in examine_files(path, manifest, check_content=check_content):
        raise ArtefactError(f"{finding.sentence(path)} {remedy(path, kind, finding)}")
    return manifest
