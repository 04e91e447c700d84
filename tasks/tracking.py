"""MLflow: one run a stage, under one parent run a pipeline.

A stage opens its run here and nowhere else. Workers never open runs: they are handed a `RunAddress` and write metrics
to that run. Any `MLFLOW_TRACKING_URI` works; the default is MLflow's own, a SQLite file in the current folder.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import mlflow
from matplotlib.figure import Figure
from mlflow import MlflowClient
from mlflow.data.meta_dataset import MetaDataset
from mlflow.data.sources import LocalArtifactDatasetSource  # type: ignore[attr-defined]  # made at import
from mlflow.entities import DatasetInput, InputTag, Metric, Param, RunStatus
from mlflow.utils.mlflow_tags import MLFLOW_PARENT_RUN_ID, MLFLOW_RUN_NAME, MLFLOW_USER

from rag_core.places import absolute

EXPERIMENT = "rag"


@dataclass(frozen=True)
class RunAddress:
    """Where a worker writes a stage's metrics."""

    tracking_uri: str
    run_id: str

    def log_metrics(self, metrics: Mapping[str, float], step: int = 0) -> None:
        """Add points to the run's curves."""
        now = int(time.time() * 1000)
        points = [Metric(metric_name(name), float(value), now, step) for name, value in metrics.items()]
        MlflowClient(self.tracking_uri).log_batch(self.run_id, metrics=points)


@dataclass
class StageRun:
    """An open MLflow run of one stage."""

    client: MlflowClient
    run_id: str
    address: RunAddress
    metrics: dict[str, float] = field(default_factory=dict)

    def log_params(self, params: Mapping[str, Any]) -> None:
        """Record settings; nested ones get dotted names."""
        flat = flatten(params)
        self.client.log_batch(self.run_id, params=[Param(name, str(value)[:500]) for name, value in flat.items()])

    def log_metrics(self, metrics: Mapping[str, float], step: int = 0) -> None:
        """Record figures; they also go into the stage's result."""
        self.metrics |= {name: float(value) for name, value in metrics.items()}
        self.address.log_metrics(metrics, step)

    def log_figure(self, figure: Figure, name: str) -> None:
        """Keep a plot under plots/."""
        self.client.log_figure(self.run_id, figure, f"plots/{name}")

    def log_dict(self, content: Mapping[str, Any], name: str) -> None:
        """Keep a JSON file."""
        self.client.log_dict(self.run_id, dict(content), name)

    def set_tags(self, tags: Mapping[str, str]) -> None:
        for name, value in tags.items():
            self.client.set_tag(self.run_id, name, value)

    def log_input(self, name: str, path: Path, fingerprint: str) -> None:
        """Lineage: this stage read the artefact or file `path`, whose content is `fingerprint`."""
        source = LocalArtifactDatasetSource(absolute(path))
        # MLflow keeps 36 characters of a digest.
        dataset = MetaDataset(source, name=name, digest=fingerprint[:36])  # type: ignore[abstract]
        entity = DatasetInput(dataset._to_mlflow_entity(), [InputTag("mlflow.data.context", name)])
        self.client.log_inputs(self.run_id, datasets=[entity])


@contextlib.contextmanager
def open_run(name: str, parent_run_id: str | None = None, tags: Mapping[str, str] | None = None) -> Iterator[StageRun]:
    """An MLflow run that ends as finished, failed, or killed (Ctrl-C), as the block does."""
    uri = tracking_uri()
    client = MlflowClient(uri)
    run_tags = {MLFLOW_RUN_NAME: name, MLFLOW_USER: os.environ.get("USER", "rag"), "stage": name, **(tags or {})}
    if parent_run_id:
        run_tags[MLFLOW_PARENT_RUN_ID] = parent_run_id
    run_id = client.create_run(experiment_id(client), tags=run_tags, run_name=name).info.run_id
    status = RunStatus.to_string(RunStatus.FAILED)
    try:
        yield StageRun(client, run_id, RunAddress(uri, run_id))
        status = RunStatus.to_string(RunStatus.FINISHED)
    except KeyboardInterrupt:
        status = RunStatus.to_string(RunStatus.KILLED)
        raise
    finally:
        client.set_terminated(run_id, status)


def experiment_id(client: MlflowClient) -> str:
    """The experiment that all runs go to: MLFLOW_EXPERIMENT_NAME, or "rag"; made when it is not there."""
    name = os.environ.get("MLFLOW_EXPERIMENT_NAME", EXPERIMENT)
    found = client.get_experiment_by_name(name)
    return str(found.experiment_id) if found else str(client.create_experiment(name))


def prepare_store() -> None:
    """Make the tracking store and the experiment, where they are not there."""
    experiment_id(MlflowClient(tracking_uri()))


def tracking_uri() -> str:
    """Where runs are kept: `MLFLOW_TRACKING_URI`, or a SQLite file in the current folder (absolute, for workers)."""
    return str(mlflow.get_tracking_uri())


def run_link(run: StageRun) -> str:
    """Where a person finds the run: a link for a tracking server, the command to start one for a local store."""
    experiment = experiment_id(run.client)
    uri = run.address.tracking_uri
    if uri.startswith("http"):
        return f"{uri.rstrip('/')}/#/experiments/{experiment}/runs/{run.run_id}"
    return f"`mlflow ui --backend-store-uri {uri}`, then /#/experiments/{experiment}/runs/{run.run_id}"


def metric_name(name: str) -> str:
    """MLflow refuses @ in names: recall@5 becomes recall_at_5."""
    return name.replace("@", "_at_")


def flatten(params: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested settings with dotted names."""
    flat: dict[str, Any] = {}
    for name, value in params.items():
        if isinstance(value, Mapping):
            flat |= flatten(value, f"{prefix}{name}.")
        else:
            flat[f"{prefix}{name}"] = value
    return flat
