"""Publish and open an artifact in a local folder.

`artifact.py` uses this for local paths, `stored_artifact.py` for the folder from which it uploads.
"""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from rag_core.errors import ArtifactError
from rag_core.storage.draft import (
    Draft,
    clear_up,
    describe,
    draft_folder,
    drop_unfinished,
    explain_disk_errors,
    swap_into_place,
    write_synced,
)
from rag_core.storage.manifest import MANIFEST, Manifest, examine_files, read_manifest, remedy, stage_key
from rag_core.storage.writer_lock import only_writer


@contextlib.contextmanager
def publish_folder(
    out: Path,
    kind: str,
    *,
    config: dict[str, Any] | None = None,
    made_from: dict[str, str] | None = None,
    resume: bool = False,
    wait_seconds: float | None = None,
) -> Iterator[Draft]:
    """`artifact.publish` for a local folder: the same arguments and errors."""
    config, made_from = config or {}, made_from or {}
    out = Path(os.path.realpath(out))
    refuse_foreign_folder(out)
    with contextlib.ExitStack() as stack:
        stack.enter_context(explain_disk_errors(out, resume=resume))
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


def open_folder(path: Path, kind: str, *, check_content: bool = True) -> Manifest:
    """`artifact.open_artifact` for a local folder: the same arguments and errors."""
    manifest = read_manifest(path, kind)
    for finding in examine_files(path, manifest, check_content=check_content):
        raise ArtifactError(f"{finding.sentence(path)} {remedy(path, kind, finding)}")
    return manifest


def finished_folder(out: Path, kind: str, config: dict[str, Any], made_from: dict[str, str]) -> Manifest | None:
    """`artifact.find_finished` for a local folder."""
    try:
        if read_manifest(out, kind).key != stage_key(kind, config, made_from):
            return None  # do not read the files of other work
        return open_folder(out, kind)
    except ArtifactError:
        return None


def refuse_foreign_folder(out: Path) -> None:
    """Raise ArtifactError if publishing at `out` would destroy files that this program did not make."""
    if out.is_file():
        raise ArtifactError(f"{out} is a file; the output must be a folder. Give another --out.")
    if out.is_dir() and any(out.iterdir()) and not (out / MANIFEST).is_file():
        raise ArtifactError(
            f"{out} already holds files and no {MANIFEST}, so it was not made by this program and is left unchanged. "
            "Give an empty or new folder as --out."
        )
