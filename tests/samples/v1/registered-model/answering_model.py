"""The code that MLflow stores beside a registered RAG model ("models from code": no pickle).

MLflow runs this file to load the model; nothing of ours imports it. The RAG model's folder travels with the registered
model, the index stays where it is and is named in the model's configuration.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import mlflow
import pandas as pd
from mlflow.pyfunc import PythonModel

from rag_core.index import PassageIndex
from rag_core.rag_model import RagModel

# A server of this model has imported MLflow before this file, and with it the client that reports usage: rag_core has
# switched reports off meanwhile, unless somebody wants them, and this looks again.
mlflow.telemetry.set_telemetry_client()


class AnsweringModel(PythonModel):
    """`predict` takes a column `question` and returns `answer` and `log_prob`."""

    def load_context(self, context: Any) -> None:
        self._model = RagModel.from_pretrained(context.artifacts["model"])
        self._index = PassageIndex.open(Path(context.model_config["index"]))

    def predict(self, context: Any, model_input: pd.DataFrame, params: dict[str, Any] | None = None) -> pd.DataFrame:
        answers = self._model.answer(list(model_input["question"]), self._index)
        return pd.DataFrame({"answer": [one.text for one in answers], "log_prob": [one.log_prob for one in answers]})


mlflow.models.set_model(AnsweringModel())
