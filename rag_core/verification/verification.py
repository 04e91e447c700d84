"""`rag verify`: list all faults of an artifact, or of every artifact below a folder."""

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

# In the order in which they are made, because a repair may need the artifacts before it.
ORDER = ("corpus", "embeddings", "index", "generator", "rag-model", "predictions")
NOT_REPAIRED = ("outside", "foreign", "manifest")


@dataclass
class Report:
    """Findings about one artifact; `manifest` is None if it cannot be read."""

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
            return "Run the command that made it again; its content cannot be trusted."
        again = f"make it again: {command_for(self.path, self.manifest)}"
        damaged = finding.state in ("missing", "size", "content") or finding.file != "."
        if self.manifest.kind in REPAIRABLE and finding.state not in NOT_REPAIRED and damaged:
            return f"rag verify --repair {self.path}, or {again}"
        return again[0].upper() + again[1:]


def artifacts_below(path: Path) -> list[Path]:
    """The artifact at `path`, or all artifacts below it, in the order in which they are made.

    A folder that a stage made but that lost its manifest counts as an artifact.

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
    artifacts: list[Path] = []
    for folder, subfolders, files in os.walk(path):
        place = Path(folder)
        if MANIFEST in files or (place.parent / f".{place.name}.mlflow-run").is_file():
            artifacts.append(place)
            subfolders.clear()
        subfolders[:] = sorted(name for name in subfolders if not name.startswith("."))
    if not artifacts:
        raise ArtifactError(
            f"{path} holds no artifact: no {MANIFEST} in it or below. "
            "Correct the path, or run the command that makes it."
        )
    return sorted(artifacts, key=_stage)


def _stage(path: Path) -> int:
    try:
        return ORDER.index(manifest_at(path).kind)
    except (ArtifactError, ValueError):
        return len(ORDER)


def verify(path: Path, inputs: GivenInputs | None = None) -> Report:
    """Check one artifact completely: manifest, every file's presence, size and SHA-256, foreign files, and content.

    Content is read only if the files are right. Ids are compared with those of the corpus if the corpus is found.

    Raises:
        ArtifactError: `inputs` names a corpus or embeddings that the artifact was not made from.
    """
    place = as_place(path)
    try:
        manifest = manifest_at(place)
    except ArtifactError as error:
        return Report(path, None, [Finding(MANIFEST, "manifest", "a manifest of schema version 1", str(error))])
    if isinstance(place, ObjectPath):
        findings = list(stored_findings(place, manifest))
    else:
        findings = [*examine_files(place, manifest, check_content=True), *foreign_files(place, manifest)]
    report = Report(place, manifest, findings)
    if any(finding.state != "foreign" for finding in findings):
        return report
    inputs = inputs or GivenInputs()
    corpus = find_input(place, manifest, "corpus", inputs) if "corpus" in manifest.made_from else None
    if manifest.kind in ("embeddings", "index") and corpus is None:
        report.notes.append("the corpus that it was made from was not found, so ids were not compared with it")
    report.findings += content_findings(local_copy(place), manifest, corpus)
    return report
