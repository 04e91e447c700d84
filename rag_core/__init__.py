"""Retrieval-augmented generation after Lewis et al. 2020: likelihoods, decoders, retrieval and the artifacts on disk.

PyTorch, Transformers, FAISS and Arrow only; orchestration (Prefect, Ray, MLflow) lives above, in `tasks` and `flows`.
"""

import importlib
from typing import TYPE_CHECKING, Any

from rag_core.network.usage_reports import switch_off

switch_off()

if TYPE_CHECKING:
    from rag_core.decoding import Hypothesis, decode_rag_sequence, decode_rag_token
    from rag_core.embeddings.text_encoder import TextEncoder
    from rag_core.errors import ArtifactError, ConfigError, InputError, RagError
    from rag_core.index.passage_index import PassageIndex
    from rag_core.model.rag_model import RagModel
    from rag_core.model.reader import Answer, DecodingConfig
    from rag_core.model.settings import ModelConfig
    from rag_core.reading.likelihood import rag_nll, rag_sequence_nll, rag_token_nll
    from rag_core.reading.prompt import PromptConfig

# Loaded on first use: `rag --help` must not wait seconds for PyTorch.
_HOME = {
    "Answer": "rag_core.model.reader",
    "ArtifactError": "rag_core.errors",
    "ConfigError": "rag_core.errors",
    "DecodingConfig": "rag_core.model.reader",
    "Hypothesis": "rag_core.decoding",
    "InputError": "rag_core.errors",
    "ModelConfig": "rag_core.model.settings",
    "PassageIndex": "rag_core.index.passage_index",
    "PromptConfig": "rag_core.reading.prompt",
    "RagError": "rag_core.errors",
    "RagModel": "rag_core.model.rag_model",
    "TextEncoder": "rag_core.embeddings.text_encoder",
    "decode_rag_sequence": "rag_core.decoding",
    "decode_rag_token": "rag_core.decoding",
    "rag_nll": "rag_core.reading.likelihood",
    "rag_sequence_nll": "rag_core.reading.likelihood",
    "rag_token_nll": "rag_core.reading.likelihood",
}

__all__ = [
    "Answer",
    "ArtifactError",
    "ConfigError",
    "DecodingConfig",
    "Hypothesis",
    "InputError",
    "ModelConfig",
    "PassageIndex",
    "PromptConfig",
    "RagError",
    "RagModel",
    "TextEncoder",
    "decode_rag_sequence",
    "decode_rag_token",
    "rag_nll",
    "rag_sequence_nll",
    "rag_token_nll",
]


def __getattr__(name: str) -> Any:
    if name == "ArtefactError":  # how this project spelled it once; programs that import it keep working
        name = "ArtifactError"
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_HOME[name]), name)
