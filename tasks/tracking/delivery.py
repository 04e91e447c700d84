"""Send the entries of a journal to MLflow. Sending an entry twice does no harm.

Metrics carry their time, and MLflow's database keeps one point per (name, step, time, value). Parameters, tags, inputs
and files are overwritten with the same content. A model version or a late run is searched for before it is created.

A run that was opened while the server did not answer has a local id until MLflow creates it. It then carries that id as
the tag `local_run_id`, by which every process finds it.
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

# MLflow's id of each run that has a local id.
_mlflow_ids: dict[str, str] = {}


def experiment_id(client: MlflowClient, name: str) -> str:
    """The id of the experiment, which is created if it does not exist."""
    experiment = client.get_experiment_by_name(name)
    return str(experiment.experiment_id) if experiment else str(client.create_experiment(name))


def deliver(uri: str, header: Entry, entries: list[Entry], hurry: bool) -> None:
    """Send entries to the run that `header` names. With `hurry` the server must answer each within PROMPT_SECONDS.

    Raises:
        UnreachableError: the server does not answer.
        MlflowException: the server refuses an entry.
    """
    only_metrics = all("metrics" in entry for entry in entries)
    with reaching(uri, PROMPT_SECONDS if hurry else None) as client:
        run_id = mlflow_run_id(client, header)
        if only_metrics:
            _log_points(client, run_id, [point for entry in entries for point in _points(entry)])
            return
        for entry in entries:
            _deliver_one(client, uri, run_id, entry)


def _points(entry: Entry) -> list[Metric]:
    return [Metric(name, value, entry["time"], entry["step"]) for name, value in entry["metrics"].items()]


def _log_points(client: MlflowClient, run_id: str, points: list[Metric]) -> None:
    # MLflow limits a batch, but a question file may have any number of types, and an outage any number of points.
    for start in range(0, len(points), MAX_METRICS_PER_BATCH):
        client.log_batch(run_id, metrics=points[start : start + MAX_METRICS_PER_BATCH])


def _deliver_one(client: MlflowClient, uri: str, run_id: str, entry: Entry) -> None:
    match entry["do"]:
        case "metrics":
            _log_points(client, run_id, _points(entry))
        case "params":
            params = [Param(name, value) for name, value in entry["params"].items()]
            for start in range(0, len(params), MAX_PARAMS_TAGS_PER_BATCH):
                client.log_batch(run_id, params=params[start : start + MAX_PARAMS_TAGS_PER_BATCH])
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
                f"The journal has an entry {other!r}, which this release does not know. Use the release that wrote it."
            )


def mlflow_run_id(client: MlflowClient, header: Mapping[str, Any]) -> str:
    """MLflow's id of the header's run. A run that could not be created when it was opened is created now.

    Raises:
        UnreachableError: the run does not exist yet, and the header does not say how to create it.
    """
    run_id = str(header["run"])
    if not run_id.startswith(LOCAL):
        return run_id
    if run_id not in _mlflow_ids:
        query = f"tags.{LOCAL_TAG} = '{run_id}'"
        matches = client.search_runs([experiment_id(client, header["experiment"])], query, max_results=1)
        if matches:
            _mlflow_ids[run_id] = str(matches[0].info.run_id)
        elif "create" in header:
            _mlflow_ids[run_id] = make_run(client, header)
        else:
            # Only the run's own file says how to create it, and that lies on another machine.
            raise UnreachableError(f"MLflow does not have the run {run_id} yet.")
    return _mlflow_ids[run_id]


def make_run(client: MlflowClient, header: Mapping[str, Any]) -> str:
    """Create the run that the header's `create` describes; returns MLflow's id of it."""
    tags = dict(header["create"]["tags"]) | {LOCAL_TAG: header["run"]}
    parent = tags.get(MLFLOW_PARENT_RUN_ID, "")
    if parent.startswith(LOCAL):
        tags[MLFLOW_PARENT_RUN_ID] = mlflow_run_id(client, {"run": parent, "experiment": header["experiment"]})
    experiment = experiment_id(client, header["experiment"])
    run = client.create_run(experiment, header["create"]["time"], tags, tags[MLFLOW_RUN_NAME])
    return str(run.info.run_id)


def outage_entry(header: Entry) -> Entry:
    """The last entry of a journal: a tag that says from when to when MLflow could not be reached."""
    text = f"from {header['since']} to {now()}; writes of that time were kept and sent later"
    return {"do": "tags", "tags": {"mlflow_unreachable": text}}
