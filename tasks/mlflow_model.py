"""A trained variant as an MLflow registered model with a signature, so that versions can be compared and served."""

from __future__ import annotations

import logging
import warnings
from pathlib import Path

import mlflow
from mlflow.environment_variables import MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR
from mlflow.models import ModelSignature
from mlflow.types import ColSpec, DataType, Schema

from rag_core.artefact import local_copy
from rag_core.places import absolute
from tasks.tracking import StageRun

SIGNATURE = ModelSignature(
    inputs=Schema([ColSpec(DataType.string, "question")]),
    outputs=Schema([ColSpec(DataType.string, "answer"), ColSpec(DataType.double, "log_prob")]),
)


def register_model(run: StageRun, model: Path, index: Path, variant: str) -> None:
    """Log the model to the stage's run and register it as `rag-sequence` or `rag-token`."""
    # An input example would make MLflow load the whole model just to try it; the signature is given instead.
    logging.getLogger("mlflow").setLevel(logging.ERROR)
    MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR.set(False)
    with warnings.catch_warnings(), mlflow.start_run(run_id=run.run_id, log_system_metrics=False):
        warnings.simplefilter("ignore", UserWarning)
        mlflow.pyfunc.log_model(
            name="model",
            python_model=str(Path(__file__).with_name("answering_model.py")),
            artifacts={"model": str(local_copy(model).resolve())},
            model_config={"index": absolute(index)},
            signature=SIGNATURE,
            pip_requirements=["rag-pipeline"],
            registered_model_name=f"rag-{variant}",
        )
