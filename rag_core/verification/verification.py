"""`rag verify`: all that is wrong with an artifact, or with every artifact below a folder."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from pathlib import Path

from rag_core.errors import ArtifactError
from rag_core.storage.artifact import local_copy, manifest_at
from rag_core.storage.inputs import GivenInputs, command_for, find_input
from rag_core.storage.manifest import MANIFEST, REPAIRABLE, Finding, Manifest, examine_files, foreign_files
from rag_core.storage.places import ObjectPath, as_place
from rag_core.verification.contents import content_findings
from rag_core.verification.stored import stored_artifacts_below, stored_findings

# In the order in which they are made: what is repaired first may be needed for what follows.
ORDER = ("corpus", "embeddings", "index", "generator", "rag-model", "predictions")
NOT_REPAIRED = ("outside", "foreign", "manifest")


@dataclass
class Report:
    """What was found out about one artifact; `manifest` is None where it cannot be read."""

    path: Path
    manifest: Manifest | None
    findings: list[Finding] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    repaired: list[str] = field(default_factory=list)

    def remedy(self, finding: Finding) -> str:
        """What to do about a finding."""
        if finding.state == "foreign":
            return "Move it elsewhere; repair leaves it alone."
        if self.manifest is None:
            return "Run the command that made it again; what it holds is not trusted."
        again = f"make it again: {command_for(self.path, self.manifest)}"
        damaged = finding.state in ("missing", "size", "content") or finding.file != "."
        if self.manifest.kind in REPAIRABLE and finding.state not in NOT_REPAIRED and damaged:
            return f"rag verify --repair {self.path}, or {again}"
        return again[0].upper() + again[1:]


def artifacts_below(path: Path) -> list[Path]:
    """The artifact at `path`, or all those below it, in the order in which they are made.

    A folder that a stage has made, and that has lost its manifest, counts as one.

    Raises:
        ArtifactError: there is none.
    """
    place = as_place(path)
    if isinstance(place, ObjectPath):
        stored = stored_artifacts_below(place)
        if not stored:
            raise ArtifactError(f"{place} holds no artifact: no {MANIFEST} there or below. Correct the place.")
        return sorted(stored, key=_stage)
    if not path.is_dir():
        raise ArtifactError(f"There is no folder {path}. Give an artifact's folder, or one that holds artifacts.")
    found: list[Path] = []
    for folder, folders, files in os.walk(path):
        place = Path(folder)
        if MANIFEST in files or (place.parent / f".{place.name}.mlflow-run").is_file():
            found.append(place)
            folders.clear()
        folders[:] = sorted(one for one in folders if not one.startswith("."))
    if not found:
        raise ArtifactError(
            f"{path} holds no artifact: no {MANIFEST} in it or below. Correct the path, or run the command that makes it."
        )
    return sorted(found, key=_stage)


def _stage(path: Path) -> int:
    try:
        return ORDER.index(manifest_at(path).kind)
    except (ArtifactError, ValueError):
        return len(ORDER)


def verify(path: Path, given: GivenInputs | None = None) -> Report:
    """Check one artifact completely: manifest, every file's presence, size and SHA-256, foreign files, and content.

    Content is read only where the files are right. Ids are compared with the corpus's where that is found.

    Raises:
        ArtifactError: `given` names a corpus or embeddings that the artifact was not made from.
    """
    place = as_place(path)
    try:
        manifest = manifest_at(place)
    except ArtifactError as error:
        return Report(path, None, [Finding(MANIFEST, "manifest", "a manifest of schema version 1", str(error))])
    if isinstance(place, ObjectPath):
        found = list(stored_findings(place, manifest))
    else:
        found = [*examine_files(place, manifest, check_content=True), *foreign_files(place, manifest)]
    report = Report(place, manifest, found)
    if any(one.state != "foreign" for one in found):
        return report
    inputs: dict[str, Path | None] = {}
    for kind in ("corpus", "embeddings"):
        inputs[kind] = find_input(place, manifest, kind, given or GivenInputs()) if kind in manifest.made_from else None
        if manifest.kind in ("embeddings", "index") and kind == "corpus" and inputs[kind] is None:
            report.notes.append(f"the {kind} that it was made from was not found, so ids were not compared with it")
    report.findings += content_findings(local_copy(place), manifest, inputs["corpus"], inputs["embeddings"])
    return report
