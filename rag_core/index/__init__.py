"""From vectors to a FAISS index, and from a question's vector to passages."""

from __future__ import annotations

from typing import Any


def __getattr__(name: str) -> Any:
    # Models registered with MLflow when this folder was still a module import the class from here. The import is lazy
    # because processes that hold shards start without PyTorch.
    if name == "PassageIndex":
        from rag_core.index.passage_index import PassageIndex

        return PassageIndex
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
