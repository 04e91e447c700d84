"""The example that every implementation gets: one question, two passages, an answer of one token and one of three.

Both sides make it themselves, each with its own Transformers (5 for us, 4 for the peers), so this module imports
neither our library nor a peer. The weights are drawn in the order of the parameters' names and do not depend on how a
release of Transformers initialises a model.

Legend: K passages, T answer tokens, V vocabulary.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

VOCAB_SIZE = 30
QUESTION = [7, 8]
PASSAGES = ([12, 13, 14], [15, 16, 17])
ANSWERS = ([20], [20, 21, 22])  # without an end token
DOC_SCORES = [1.0, 0.0]  # the retriever's, before the softmax
CONTEXTS = [[*passage, *QUESTION] for passage in PASSAGES]


def with_seeded_weights(model: Any, *, spread: float) -> Any:
    """Give a model normal float64 weights of this standard deviation. They depend on its parameters' names only."""
    generator = torch.Generator().manual_seed(0)
    model = model.double().eval()
    with torch.no_grad():
        for _, parameter in sorted(model.named_parameters()):
            parameter.copy_(torch.randn(parameter.shape, generator=generator, dtype=torch.float64) * spread)
    return model


def tiny_llama() -> Any:
    """A decoder-only model with random weights."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=VOCAB_SIZE,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=64,
        tie_word_embeddings=False,
    )
    return with_seeded_weights(LlamaForCausalLM(config), spread=1.0)


def llama_logits(model: Any, answer: list[int]) -> Tensor:
    """Logits of shape (K, T, V) of an answer's tokens: the first is read at the context's last token."""
    with torch.no_grad():
        logits_KSV = model(torch.tensor([context + answer for context in CONTEXTS])).logits
    return logits_KSV[:, len(CONTEXTS[0]) - 1 : -1]
