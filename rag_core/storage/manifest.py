"""Read an artifact's `manifest.json` and compare the files beside it with it.

The manifest lists every file with its size and SHA-256, so missing, cut, changed and foreign files are found without
knowing what the files mean. This module only reads; `artifact.py` writes.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, Field, ValidationError, field_validator

from rag_core.errors import ArtifactError

SCHEMA_VERSION = 1
MANIFEST = "manifest.json"
# Kinds whose damaged files `rag verify --repair` can make again.
REPAIRABLE = ("corpus", "embeddings", "index", "predictions")


class FileEntry(BaseModel):
    """Size and SHA-256 of one file of an artifact."""

    bytes: int
    sha256: str


class Manifest(BaseModel):
    """The content of `manifest.json`.

    `fingerprint` identifies the content: a hash of the files' names and checksums. `key` identifies the work: a hash of
    the kind, the settings and the fingerprints of the inputs. A stage whose key is already on disk need not run again.
    """

    schema_version: int = SCHEMA_VERSION
    kind: str
    created_at: str
    key: str
    fingerprint: str
    config: dict[str, Any] = Field(default_factory=dict)
    made_from: dict[str, str] = Field(default_factory=dict)
    counts: dict[str, Annotated[int, Field(ge=0, lt=2**63)]] = Field(default_factory=dict)
    details: dict[str, Any] = Field(default_factory=dict)
    files: dict[str, FileEntry]

    @field_validator("files")
    @classmethod
    def _check_names(cls, files: dict[str, FileEntry]) -> dict[str, FileEntry]:
        """Refuse names that no file system allows; opening one would raise an error that does not name the manifest."""
        for name in files:
            if "\0" in name or len(name) > 1000 or any(len(part.encode()) > 255 for part in name.split("/")):
                raise ValueError(f"{name[:60]!r} cannot be the name of a file")
        return files


State = Literal["missing", "size", "content", "outside", "foreign", "unreadable", "manifest"]


@dataclass(frozen=True, slots=True)
class Finding:
    """One fault of an artifact: the file, what was expected of it, and what was found instead."""

    file: str
    state: State
    expected: str
    found: str

    def sentence(self, folder: Path) -> str:
        """The finding as a sentence, with the file's whole path."""
        file = folder / self.file
        return {
            "missing": f"{file} is missing, the manifest says {self.expected}.",
            "size": f"{file} has {self.found}, the manifest says {self.expected}.",
            "content": f"{file} was changed since it was published: its SHA-256 is {self.found}, the manifest says "
            f"{self.expected}.",
            "outside": f"{file} lies outside the folder ({self.found}). Do not trust this artifact.",
            "foreign": f"{file} is not part of the artifact: {self.found}.",
        }.get(self.state, f"{file}: {self.found}; expected {self.expected}.")


def sha256_of_file(path: Path) -> str:
    """SHA-256 of a file's bytes, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def fingerprint_of_files(paths: Iterable[Path]) -> str:
    """SHA-256 over the contents of several files, in the order given. File names do not count."""
    digest = hashlib.sha256()
    for path in paths:
        digest.update(bytes.fromhex(sha256_of_file(path)))
    return digest.hexdigest()


def fingerprint_of_json(value: Any) -> str:
    """SHA-256 of a JSON-like value, independent of the order of its keys."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def fingerprint_of_content(files: dict[str, FileEntry]) -> str:
    """The fingerprint of an artifact: a hash of its files' names and checksums."""
    return fingerprint_of_json({name: entry.sha256 for name, entry in files.items()})


def stage_key(kind: str, config: dict[str, Any], made_from: dict[str, str]) -> str:
    """The key of a piece of work: a hash of the kind, the settings and the fingerprints of the inputs."""
    return fingerprint_of_json([SCHEMA_VERSION, kind, config, made_from])


def parse_manifest(content: bytes, place: str) -> Manifest:
    """Parse the bytes of a manifest; `place` names it in messages.

    Raises:
        ArtifactError: not JSON, not a manifest, or of another schema version.
    """
    try:
        manifest = Manifest.model_validate_json(content)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        reason = f"{'.'.join(str(part)[:60] for part in first['loc'])}: {first['msg']}".removeprefix(": ")
        raise ArtifactError(
            f"{place} cannot be read ({reason}); a JSON object with schema_version {SCHEMA_VERSION} "
            "was expected. Make the artifact again."
        ) from error
    if manifest.schema_version != SCHEMA_VERSION:
        raise ArtifactError(
            f"{place} has schema version {manifest.schema_version}; this program reads version "
            f"{SCHEMA_VERSION}. Use the release that wrote it, or make the artifact again."
        )
    return manifest


def read_manifest(folder: Path, kind: str | None = None) -> Manifest:
    """The manifest of an artifact's folder. Its files are not checked.

    Raises:
        ArtifactError: no such folder, no manifest, one that cannot be read, or (with `kind`) of another kind.
    """
    file = folder / MANIFEST
    if not file.is_file():
        reason = f"it has no {MANIFEST}" if folder.exists() else "no such folder"
        raise ArtifactError(
            f"{folder} is not {_with_article(kind)} artifact: {reason}. Make one first, or correct the path."
        )
    try:
        content = file.read_bytes()
    except OSError as error:
        raise ArtifactError(f"{file} cannot be read ({error.strerror}). Check the permissions and the disk.") from error
    manifest = parse_manifest(content, str(file))
    if kind is not None and manifest.kind != kind:
        raise ArtifactError(f"{folder} holds {manifest.kind!r}, but {kind!r} was expected here. Correct the path.")
    return manifest


def _with_article(kind: str | None) -> str:
    return "an" if kind is None else f"an {kind}" if kind[0] in "aeiou" else f"a {kind}"


def examine_files(folder: Path, manifest: Manifest, *, check_content: bool) -> Iterator[Finding]:
    """Faults of the files that the manifest lists, and of its own fingerprint.

    Checks presence, place, size and, with `check_content`, SHA-256.
    """
    for name, entry in manifest.files.items():
        finding = examine_file(folder, name, entry, check_content=check_content)
        if finding:
            yield finding
    fingerprint = fingerprint_of_content(manifest.files)
    if fingerprint != manifest.fingerprint:
        yield Finding(
            MANIFEST, "manifest", f"fingerprint {fingerprint} (of its files)", f"fingerprint {manifest.fingerprint}"
        )


def examine_file(folder: Path, name: str, entry: FileEntry, *, check_content: bool) -> Finding | None:
    """The fault of one file of an artifact; None if the file is as the manifest says."""
    file = folder / name
    if not file.resolve().is_relative_to(folder.resolve()):
        return Finding(name, "outside", "a file within the folder", f"it leads to {file.resolve()}")
    if not file.is_file():
        return Finding(name, "missing", f"{entry.bytes} bytes", "no such file")
    size = file.stat().st_size
    if size != entry.bytes:
        return Finding(name, "size", f"{entry.bytes} bytes", f"{size} bytes")
    try:
        if check_content and (found := sha256_of_file(file)) != entry.sha256:
            return Finding(name, "content", entry.sha256, found)
    except OSError as error:  # no permission, or a failing disk
        return Finding(name, "unreadable", f"{entry.bytes} readable bytes", str(error.strerror))
    return None


def foreign_files(folder: Path, manifest: Manifest) -> Iterator[Finding]:
    """Files and links in the folder that the manifest does not list."""
    known = {MANIFEST, *manifest.files}
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        if name not in known and (path.is_symlink() or not path.is_dir()):
            yield Finding(name, "foreign", "no such file", "the manifest does not list it")


def remedy(folder: Path, kind: str, finding: Finding) -> str:
    """What to do about a finding."""
    if finding.state == "foreign":
        return "Move it elsewhere."
    if kind in REPAIRABLE and finding.state not in ("outside", "manifest"):
        return f"Run `rag verify --repair {folder}`, or make the artifact again."
    return f"Make the artifact again. `rag verify {folder}` lists everything that is wrong with it."
