"""The former place of `RagModel`. Models that were registered with MLflow before the move import it from here.

New code imports it from `rag_core`.
"""

from rag_core.model.rag_model import RagModel

__all__ = ["RagModel"]
