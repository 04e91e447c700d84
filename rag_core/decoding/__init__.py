"""Decoding: the most probable answers of a question under RAG-Sequence and RAG-Token."""

from rag_core.decoding.hypothesis import Hypothesis
from rag_core.decoding.sequence import decode_rag_sequence
from rag_core.decoding.token import decode_rag_token

__all__ = ["Hypothesis", "decode_rag_sequence", "decode_rag_token"]
