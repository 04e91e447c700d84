"""What every stage does around its own work: skip what is already there, open the MLflow run, leave a summary.

A stage is skipped when its output folder holds a whole artifact that was made by the same work: same settings, same
input contents (names do not count). The output is held against other runs from before that is known until the work is
done. A skipped stage still gets a child run, tagged with the run that did the work, so
that a pipeline's page shows all of its stages.
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

# Prefect's own clients try for a minute; a summary is not worth that.
PAGE_RETRIES = 1


@dataclass(frozen=True)
class Input:
    """Something a stage reads: where it is, and what is in it."""

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
        config: the settings that decide what is made, as the artifact's manifest keeps them.
        inputs: what is read; recorded as the run's data sets.
        parent_run_id: MLflow run of the pipeline.
        work: does it and returns the manifest; it may log to the run.
        made_from: fingerprints in the artifact's key, where they are not those of `inputs`.
        models: names of the models that the work begins with, by role, a hub's with its commit; parameters of the run.
        announce: tells others of the published artifact. Called again, with True, by a later run that finds the artifact
            but no note that this was done: the run that made it may have been killed, or have been on another machine.
    """
    started, out = time.monotonic(), as_place(out)
    keys = dict(made_from) if made_from is not None else {name: one.fingerprint for name, one in inputs.items()}
    with open_run(stage, parent_run_id, tags={"artifact": absolute(out), "kind": kind}) as run:
        run.log_params({**config, **(models or {})})
        for name, one in inputs.items():
            run.log_input(name, one.path, one.fingerprint)
        manifest = find_finished(out, kind, dict(config), keys)
        skipped = manifest is not None
        if manifest is None:
            with reserved(working_place(out)):
                # Who had to wait for another run finds its work done; a run that was killed may have left it not uploaded.
                work_done = out, kind, dict(config), keys
                manifest = find_finished(*work_done) or finish_publishing(*work_done)
                skipped = manifest is not None
                if manifest is None:
                    _run_file(out).unlink(missing_ok=True)
                    manifest = work(run)
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


def refuse_unseen_parts(folder: Path, names: Sequence[str], out: Path) -> None:
    """Raise ArtifactError if parts that workers have finished are not in `folder` as this machine sees it."""
    unseen = [name for name in names if not (folder / name).is_file()]
    if unseen:
        raise ArtifactError(
            f"{out}: {len(unseen)} of {len(names)} finished parts ({unseen[0]}, …) are not in {folder}; workers wrote them on "
            "machines of their own. Give an --out (and for s3:// a RAG_CACHE) on storage that every machine mounts at the "
            "same path."
        )


def summarise(result: StageResult, manifest: Manifest, run: StageRun) -> None:
    """A readable table on the Prefect flow run's page."""
    rows = {"folder": code_cell(str(result.path)), "fingerprint": code_cell(manifest.fingerprint[:16])}
    rows["MLflow run"] = run_link(run)
    rows |= {name: f"{count:,}" for name, count in manifest.counts.items()}
    rows |= {name: f"{value:.4g}" for name, value in result.metrics.items() if not name.startswith("count_")}
    publish_table(result.stage, rows, note="Up to date, not run again." if result.skipped else "")


def publish_table(stage: str, rows: Mapping[str, str], note: str = "", below: str = "") -> None:
    """Two columns of Markdown, and what stands below them, as a Prefect artifact with the stage's name as its key."""
    body = table(["", ""], [[name, value] for name, value in rows.items()])
    key = re.sub("[^a-z0-9]+", "-", stage.lower()).strip("-") or "stage"
    publish_page(f"## {text_cell(stage)}\n{note}\n\n{body}\n\n{below}\n", key=key, description=stage)


def publish_page(markdown: str, key: str, description: str) -> None:
    """Markdown on the Prefect flow run's page. A server that does not answer costs the page, not the stage."""
    try:
        with temporary_settings({PREFECT_CLIENT_MAX_RETRIES: PAGE_RETRIES}):
            create_markdown_artifact(markdown, key=key, description=description)
    except (httpx.HTTPError, PrefectHTTPStatusError) as error:
        file = unsent_folder() / f"{key}-{int(time.time())}.md"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(markdown, encoding="utf-8")
        warn(f"Prefect's server does not answer ({error}); the summary of {description} is kept in {file}.")


def _run_file(out: Path) -> Path:
    # Beside the artifact, not in it: which run made it is no part of its content.
    beside = working_place(out)
    return beside.parent / f".{beside.name}.mlflow-run"


def _remember_run(out: Path, run_id: str) -> None:
    file = _run_file(out)
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(run_id + "\n", encoding="utf-8")
    except OSError as error:  # an artifact that is found in a place where this run may not write
        get_run_logger().info("%s: which MLflow run made it could not be noted (%s)", out, error)


def _remembered_run(out: Path) -> str:
    file = _run_file(out)
    return file.read_text(encoding="utf-8").strip() if file.is_file() else "unknown"
