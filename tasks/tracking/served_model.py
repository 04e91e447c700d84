"""The code that MLflow stores with a registered RAG model ("models from code": no pickle).

MLflow runs this file to load the model; our own code never imports it. The stored copy outlives this release, so it
imports public names only. The RAG model's folder is stored with the registered model. The index stays where it is; the
model's configuration names it.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import mlflow
import pandas as pd
from mlflow.pyfunc import PythonModel

from rag_core import PassageIndex, RagModel

# A server of this model imports MLflow, and with it the client that reports usage, before this file. Importing rag_core
# has since switched reports off (unless the user wants them); this makes MLflow read that setting again.
mlflow.telemetry.set_telemetry_client()


class AnsweringModel(PythonModel):
    """`predict` takes a column `question` and returns `answer` and `log_prob`."""

    def load_context(self, context: Any) -> None:
        self._model = RagModel.from_pretrained(context.artifacts["model"])
        self._index = PassageIndex.open(Path(context.model_config["index"]))

    def predict(self, context: Any, model_input: pd.DataFrame, params: dict[str, Any] | None = None) -> pd.DataFrame:
        answers = self._model.answer(list(model_input["question"]), self._index)
        return pd.DataFrame(
            {"answer": [answer.text for answer in answers], "log_prob": [answer.log_prob for answer in answers]}
        )


mlflow.models.set_model(AnsweringModel())
