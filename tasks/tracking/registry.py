"""Register a trained variant as an MLflow model with a signature, so that versions can be compared and served."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import mlflow
from mlflow.environment_variables import MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR
from mlflow.models import ModelSignature
from mlflow.types import ColSpec, DataType, Schema

from rag_core.errors import ArtifactError
from rag_core.model.settings import KIND
from rag_core.storage.artifact import local_copy, open_artifact
from rag_core.storage.places import absolute, as_place
from tasks.tracking.client import reaching
from tasks.tracking.journal import Entry

# Longer than for other calls, because a server may answer an upload only after it has stored it.
UPLOAD_SECONDS = 120
# Name of a registered version's tag: the fingerprint of the model's artifact.
FINGERPRINT = "fingerprint"
SIGNATURE = ModelSignature(
    inputs=Schema([ColSpec(DataType.string, "question")]),
    outputs=Schema([ColSpec(DataType.string, "answer"), ColSpec(DataType.double, "log_prob")]),
)


def model_entry(model: Path, index: Path, variant: str, *, unless_known: bool = False) -> Entry:
    """The journal entry that logs the model and registers it as `rag-sequence` or `rag-token`.

    Args:
        unless_known: register nothing if any run has already registered a model with exactly these weights.
    """
    manifest = open_artifact(model, KIND, check_content=False)
    return {
        "do": "model",
        "name": f"rag-{variant}",
        "model": absolute(model),
        "fingerprint": manifest.fingerprint,
        "index": absolute(index),
        "unless_known": unless_known,
    }


def register_now(uri: str, run_id: str, entry: Mapping[str, Any]) -> None:
    """Log and register the model of a `model_entry`, unless this run has registered its model already.

    Raises:
        ArtifactError: the folder now holds another model.
    """
    if open_artifact(as_place(entry["model"]), KIND, check_content=False).fingerprint != entry["fingerprint"]:
        raise ArtifactError(
            f"{entry['model']} no longer holds the model that MLflow run {run_id} trained, so nothing is registered as "
            f"{entry['name']}. Train again, or delete the line."
        )
    # We pass a signature and no input example, because MLflow would load the whole model to try the example.
    logging.getLogger("mlflow").setLevel(logging.ERROR)
    MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR.set(False)
    with reaching(uri, UPLOAD_SECONDS, retries=2) as client, warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        versions = client.search_model_versions(f"name = '{entry['name']}'")
        if any(version.run_id == run_id for version in versions):
            return
        fingerprint = entry["fingerprint"]
        if entry.get("unless_known") and any(version.tags.get(FINGERPRINT) == fingerprint for version in versions):
            return
        if mlflow.get_tracking_uri() != uri:
            mlflow.set_tracking_uri(uri)
        with mlflow.start_run(run_id=run_id, log_system_metrics=False):
            logged = mlflow.pyfunc.log_model(
                name="model",
                python_model=str(Path(__file__).with_name("served_model.py")),
                artifacts={"model": str(local_copy(as_place(entry["model"])).resolve())},
                model_config={"index": entry["index"]},
                signature=SIGNATURE,
                pip_requirements=["rag-pipeline"],
                registered_model_name=entry["name"],
            )
        client.set_model_version_tag(entry["name"], str(logged.registered_model_version), FINGERPRINT, fingerprint)
