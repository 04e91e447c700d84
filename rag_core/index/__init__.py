"""From vectors to a FAISS index, and from a question's vector to passages."""

from __future__ import annotations

from typing import Any


def __getattr__(name: str) -> Any:
    # Models that were registered with MLflow before this folder was a module import it from here. FAISS is not imported
    # before it is needed: the processes that hold shards start without PyTorch.
    if name == "PassageIndex":
        from rag_core.index.passage_index import PassageIndex

        return PassageIndex
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
