"""Entries of a journal to MLflow: each may be sent again without harm.

Metrics carry their time, and MLflow's database keeps one point for one (name, step, time, value); parameters, tags,
inputs and files are overwritten by themselves; a model version and a run made late are looked for first. A run that was
opened while the server did not answer has an id of ours until it is made; it then carries that id as the tag
`local_run_id`, by which everybody finds it.
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mlflow import MlflowClient
from mlflow.data.meta_dataset import MetaDataset
from mlflow.data.sources import LocalArtifactDatasetSource  # type: ignore[attr-defined]  # made at import
from mlflow.entities import DatasetInput, InputTag, Metric, Param
from mlflow.utils.mlflow_tags import MLFLOW_PARENT_RUN_ID, MLFLOW_RUN_NAME
from mlflow.utils.validation import MAX_METRICS_PER_BATCH, MAX_PARAMS_TAGS_PER_BATCH

from rag_core.errors import ArtifactError
from tasks.tracking.client import PROMPT_SECONDS, reaching
from tasks.tracking.journal import Entry, UnreachableError, now

LOCAL = "local-"
LOCAL_TAG = "local_run_id"

_made: dict[str, str] = {}


def experiment_id(client: MlflowClient, name: str) -> str:
    """The experiment of that name; made when it is not there."""
    found = client.get_experiment_by_name(name)
    return str(found.experiment_id) if found else str(client.create_experiment(name))


def deliver(uri: str, header: Entry, entries: list[Entry], hurry: bool) -> None:
    """Send entries of the run that `header` names; in a hurry, the server must answer each within PROMPT_SECONDS.

    Raises:
        UnreachableError: the server does not answer.
        MlflowException: it refuses them.
    """
    only_metrics = all("metrics" in entry for entry in entries)
    with reaching(uri, PROMPT_SECONDS if hurry else None) as client:
        run_id = found_run(client, header)
        if only_metrics:
            _log_points(client, run_id, [point for entry in entries for point in _points(entry)])
            return
        for entry in entries:
            _deliver_one(client, uri, run_id, entry)


def _points(entry: Entry) -> list[Metric]:
    return [Metric(name, value, entry["time"], entry["step"]) for name, value in entry["metrics"].items()]


def _log_points(client: MlflowClient, run_id: str, points: list[Metric]) -> None:
    # A question file may have any number of types, and an outage leave any number of points.
    for at in range(0, len(points), MAX_METRICS_PER_BATCH):
        client.log_batch(run_id, metrics=points[at : at + MAX_METRICS_PER_BATCH])


def _deliver_one(client: MlflowClient, uri: str, run_id: str, entry: Entry) -> None:
    match entry["do"]:
        case "metrics":
            _log_points(client, run_id, _points(entry))
        case "params":
            params = [Param(name, value) for name, value in entry["params"].items()]
            for at in range(0, len(params), MAX_PARAMS_TAGS_PER_BATCH):
                client.log_batch(run_id, params=params[at : at + MAX_PARAMS_TAGS_PER_BATCH])
        case "tags":
            for name, value in entry["tags"].items():
                client.set_tag(run_id, name, value)
        case "input":
            source = LocalArtifactDatasetSource(entry["path"])
            dataset = MetaDataset(source, name=entry["name"], digest=entry["digest"])  # type: ignore[abstract]
            tags = [InputTag("mlflow.data.context", entry["name"])]
            client.log_inputs(run_id, datasets=[DatasetInput(dataset._to_mlflow_entity(), tags)])
        case "file":
            path = Path(entry["path"])
            with tempfile.TemporaryDirectory() as folder:
                (Path(folder) / path.name).write_bytes(entry["content"])
                client.log_artifact(
                    run_id, str(Path(folder) / path.name), str(path.parent) if path.parent.name else None
                )
        case "model":
            from tasks.tracking.registry import register_now

            register_now(uri, run_id, entry)
        case "end":
            client.set_terminated(run_id, entry["status"], entry["time"])
        case other:
            raise ArtifactError(
                f"An entry says {other!r}, which this release does not know. Use the one that wrote it."
            )


def found_run(client: MlflowClient, header: Mapping[str, Any]) -> str:
    """MLflow's id of the header's run, which is made now if it could not be made when it was opened."""
    run_id = str(header["run"])
    if not run_id.startswith(LOCAL):
        return run_id
    if run_id not in _made:
        query = f"tags.{LOCAL_TAG} = '{run_id}'"
        found = client.search_runs([experiment_id(client, header["experiment"])], query, max_results=1)
        if found:
            _made[run_id] = str(found[0].info.run_id)
        elif "create" in header:
            _made[run_id] = make_run(client, header)
        else:
            # The run's file on another machine says how to make it.
            raise UnreachableError(f"MLflow does not have the run {run_id} yet.")
    return _made[run_id]


def make_run(client: MlflowClient, header: Mapping[str, Any]) -> str:
    """Open a run as the header's `create` says; returns MLflow's id of it."""
    tags = dict(header["create"]["tags"]) | {LOCAL_TAG: header["run"]}
    parent = tags.get(MLFLOW_PARENT_RUN_ID, "")
    if parent.startswith(LOCAL):
        tags[MLFLOW_PARENT_RUN_ID] = found_run(client, {"run": parent, "experiment": header["experiment"]})
    experiment = experiment_id(client, header["experiment"])
    run = client.create_run(experiment, header["create"]["time"], tags, tags[MLFLOW_RUN_NAME])
    return str(run.info.run_id)


def outage(header: Entry) -> Entry:
    """Last entry of a journal that has been sent: the run says so itself."""
    text = f"from {header['since']} to {now()}; what was written meanwhile was kept and sent later"
    return {"do": "tags", "tags": {"mlflow_unreachable": text}}
