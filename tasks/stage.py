"""The frame around every stage: skip finished work, open the MLflow run, publish a summary.

A stage is skipped when `out` already holds a whole artifact of the same work: same settings, same input contents (names
do not count). Otherwise the stage locks `out` until its work is done. It looks again after it has the lock, so that two
runs never do the same work. A skipped stage still gets a child run, tagged with the run that did the work, so that a
pipeline's page shows all stages.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
from prefect.artifacts import create_markdown_artifact
from prefect.exceptions import PrefectHTTPStatusError
from prefect.logging import get_run_logger
from prefect.settings import PREFECT_CLIENT_MAX_RETRIES, temporary_settings

from rag_core.errors import ArtifactError
from rag_core.storage.artifact import Manifest, find_finished, finish_publishing, working_place
from rag_core.storage.places import absolute, as_place
from rag_core.storage.writer_lock import reserved
from tasks.markdown import code_cell, table, text_cell
from tasks.notices import warn
from tasks.results import StageResult
from tasks.tracking.runs import StageRun, open_run, run_link, unsent_folder

# Prefect's clients retry for a minute by default; a summary is not worth that wait.
PAGE_RETRIES = 1


@dataclass(frozen=True)
class Input:
    """Something a stage reads: its place, and the fingerprint of its content."""

    path: Path
    fingerprint: str


def run_stage(
    stage: str,
    kind: str,
    out: Path,
    *,
    config: Mapping[str, Any],
    inputs: Mapping[str, Input],
    parent_run_id: str | None,
    work: Callable[[StageRun], Manifest],
    made_from: Mapping[str, str] | None = None,
    models: Mapping[str, str] | None = None,
    announce: Callable[[StageRun, bool], None] | None = None,
) -> StageResult:
    """Run `work`, unless its artifact is already at `out`.

    Args:
        stage: name of the MLflow run and of the summary.
        kind: kind of the artifact that `work` publishes at `out`.
        config: the settings that decide the artifact's content, as its manifest keeps them.
        inputs: what the stage reads; recorded as the run's data sets.
        parent_run_id: MLflow run of the pipeline.
        work: makes and publishes the artifact, and returns its manifest; it may log to the run.
        made_from: fingerprints for the artifact's key, where they differ from those of `inputs`.
        models: names of the models that the work starts from, by role, a hub's with its commit; parameters of the run.
        announce: tells others about the published artifact; its second argument says whether the work was skipped.
            After a skip it is called only if no note says that it was: the run that made the artifact may have been
            killed, or have run on another machine.
    """
    started, out = time.monotonic(), as_place(out)
    if made_from is None:
        made_from = {name: source.fingerprint for name, source in inputs.items()}
    with open_run(stage, parent_run_id, tags={"artifact": absolute(out), "kind": kind}) as run:
        run.log_params({**config, **(models or {})})
        for name, source in inputs.items():
            run.log_input(name, source.path, source.fingerprint)
        manifest, skipped = _find_or_make(out, kind, dict(config), dict(made_from), lambda: work(run))
        if skipped:
            get_run_logger().info("%s: %s is up to date, nothing to do", stage, out)
            run.set_tags({"skipped": "true", "made_by_run": _remembered_run(out)})
        if not skipped or (announce and not _run_file(out).is_file()):
            if announce:
                announce(run, skipped)
            _remember_run(out, run.run_id)
        run.log_metrics({f"count_{name}": count for name, count in manifest.counts.items()})
        run.log_dict(manifest.model_dump(exclude={"files"}), "manifest.json")
        run.set_tags({"fingerprint": manifest.fingerprint})
        seconds = time.monotonic() - started
        run.log_metrics({"seconds": seconds})
        result = StageResult(
            stage=stage,
            path=out.resolve(),
            fingerprint=manifest.fingerprint,
            counts=manifest.counts,
            metrics=run.metrics,
            run_id=run.run_id,
            skipped=skipped,
            seconds=seconds,
        )
        summarise(result, manifest, run)
    return result


def _find_or_make(
    out: Path, kind: str, config: dict[str, Any], made_from: dict[str, str], work: Callable[[], Manifest]
) -> tuple[Manifest, bool]:
    """The manifest of the artifact at `out`, and whether it was there already. If not, `work` makes it."""
    if manifest := find_finished(out, kind, config, made_from):
        return manifest, True
    with reserved(working_place(out)):
        # While we waited, another run may have finished this work. A killed run may have finished it without uploading.
        manifest = find_finished(out, kind, config, made_from) or finish_publishing(out, kind, config, made_from)
        if manifest:
            return manifest, True
        _run_file(out).unlink(missing_ok=True)
        return work(), False


def refuse_unseen_parts(folder: Path, names: Sequence[str], out: Path) -> None:
    """Raise ArtifactError if this machine does not see in `folder` all parts that workers have finished."""
    unseen = [name for name in names if not (folder / name).is_file()]
    if unseen:
        raise ArtifactError(
            f"{out}: {len(unseen)} of {len(names)} finished parts ({unseen[0]}, …) are not in {folder}: workers on "
            "other machines wrote them to their own disks. Choose an --out (and for s3:// a RAG_CACHE) on storage that "
            "every machine mounts at the same path."
        )


def summarise(result: StageResult, manifest: Manifest, run: StageRun) -> None:
    """Publish the result as a table on the Prefect flow run's page."""
    rows = {"folder": code_cell(str(result.path)), "fingerprint": code_cell(manifest.fingerprint[:16])}
    rows["MLflow run"] = run_link(run)
    rows |= {name: f"{count:,}" for name, count in manifest.counts.items()}
    rows |= {name: f"{value:.4g}" for name, value in result.metrics.items() if not name.startswith("count_")}
    publish_table(result.stage, rows, note="Up to date, not run again." if result.skipped else "")


def publish_table(stage: str, rows: Mapping[str, str], note: str = "", below: str = "") -> None:
    """Publish a Prefect artifact with the stage's name as its key: `rows` as a two-column table, then `below`."""
    body = table(["", ""], [[name, value] for name, value in rows.items()])
    key = re.sub("[^a-z0-9]+", "-", stage.lower()).strip("-") or "stage"
    publish_page(f"## {text_cell(stage)}\n{note}\n\n{body}\n\n{below}\n", key=key, description=stage)


def publish_page(markdown: str, key: str, description: str) -> None:
    """Publish Markdown on the Prefect flow run's page. If the server does not answer, keep it in a file instead."""
    try:
        with temporary_settings({PREFECT_CLIENT_MAX_RETRIES: PAGE_RETRIES}):
            create_markdown_artifact(markdown, key=key, description=description)
    except (httpx.HTTPError, PrefectHTTPStatusError) as error:
        file = unsent_folder() / f"{key}-{int(time.time())}.md"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(markdown, encoding="utf-8")
        warn(f"Prefect's server does not answer ({error}); the summary of {description} is kept in {file}.")


def _run_file(out: Path) -> Path:
    # Beside the artifact, not in it: its content does not depend on which run made it.
    place = working_place(out)
    return place.parent / f".{place.name}.mlflow-run"


def _remember_run(out: Path, run_id: str) -> None:
    file = _run_file(out)
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(run_id + "\n", encoding="utf-8")
    except OSError as error:  # the artifact was found in a folder where this run may not write
        get_run_logger().info("%s: cannot record which MLflow run made it (%s)", out, error)


def _remembered_run(out: Path) -> str:
    file = _run_file(out)
    return file.read_text(encoding="utf-8").strip() if file.is_file() else "unknown"
