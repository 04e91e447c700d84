"""The result of a stage: a small reference that the next stage takes, never data."""

from __future__ import annotations

from pydantic import BaseModel

from rag_core.storage.places import ArtifactPath


class StageResult(BaseModel):
    """Where a stage's artifact is, what it holds, and where its MLflow run is."""

    stage: str
    path: ArtifactPath
    fingerprint: str
    counts: dict[str, int] = {}
    metrics: dict[str, float] = {}
    run_id: str
    skipped: bool = False
    seconds: float = 0.0
