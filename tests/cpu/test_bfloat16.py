"""Encoding in bfloat16 on a CPU equals float64 up to the precision of bf16, and leaves the model unchanged."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from transformers import MPNetConfig, MPNetModel, RobertaConfig, RobertaModel

from rag_core.cpu.bfloat16 import MOST_TOKENS, additive_mask, attention, cpu_bfloat16
from rag_core.decoding import decode_rag_token
from rag_core.embeddings.text_encoder import PACK_FROM, TextEncoder
from rag_core.reading.likelihood import rag_nll
from tests.conftest import MINILM
from tests.support.models.tiny_causal import END, tiny_causal
from tests.support.models.tiny_models import random_contexts

LENGTHS = (7, 3, 1)
TEXTS = [f"Zürich, no. {number}, lies on the Limmat. " * (1 + number % 9) for number in range(60)]


def _reference(query: Any, key: Any, value: Any, lengths: Any) -> torch.Tensor:
    """(B, S, H, F) in float64; every row of a text attends to its real tokens only."""
    scores = query.double() @ key.double().transpose(2, 3) / query.shape[3] ** 0.5
    hidden = torch.arange(key.shape[2]) >= torch.tensor(lengths)[:, None]
    return (scores.masked_fill(hidden[:, None, None], float("-inf")).softmax(-1) @ value.double()).transpose(1, 2)


@pytest.mark.parametrize("tokens", [7, MOST_TOKENS + 1])
@pytest.mark.parametrize("masked", [False, True])
def test_attention_equals_a_float64_computation(tokens: int, masked: bool) -> None:
    g = torch.Generator().manual_seed(0)
    states = [torch.randn(3, 2, tokens, 4, generator=g).bfloat16() for _ in range(3)]
    lengths = LENGTHS if masked else (tokens,) * 3
    mask_BS = torch.arange(tokens) < torch.tensor(lengths)[:, None]
    mask = additive_mask(
        batch_size=3,
        q_length=tokens,
        kv_length=tokens,
        mask_function=lambda batch, head, query, key: torch.ones_like(key, dtype=torch.bool),
        attention_mask=mask_BS,
        allow_is_causal_skip=False,
        allow_is_bidirectional_skip=True,
    )
    assert (mask is not None) == masked
    module: Any = nn.Module()
    module.is_causal = False
    output, weights = attention(module, *states, mask, dropout=0.0)
    assert weights is None
    # Probabilities and sums are rounded to 8 bits.
    torch.testing.assert_close(output.double(), _reference(*states, lengths), rtol=0, atol=0.03)


def test_query_heads_that_share_a_key_head_read_that_one() -> None:
    g = torch.Generator().manual_seed(1)
    query = torch.randn(3, 6, 7, 4, generator=g).bfloat16()
    key, value = (torch.randn(3, 2, 7, 4, generator=g).bfloat16() for _ in range(2))
    module: Any = nn.Module()
    module.is_causal, module.num_key_value_groups = False, 3
    output, _ = attention(module, query, key, value, None)
    expected = _reference(query, key.repeat_interleave(3, dim=1), value.repeat_interleave(3, dim=1), (7, 7, 7))
    torch.testing.assert_close(output.double(), expected, rtol=0, atol=0.03)


@pytest.mark.parametrize("family", ["llama", "mistral", "gemma3", "gpt2"])
def test_a_language_models_likelihood_and_answers_in_bfloat16_are_near_those_in_float32(family: str) -> None:
    model = tiny_causal(family, vocab_size=30, dtype=torch.float32)
    contexts = random_contexts(B=6, K=2, S=20, seed=0, vocab_size=30, dtype=torch.float32)
    labels_BT = torch.randint(3, 30, (6, 4), generator=torch.Generator().manual_seed(0))
    search = {"num_beams": 3, "max_new_tokens": 5}
    expected_B = rag_nll(model, *contexts, labels_BT, variant="token")
    expected = [best for (best,) in decode_rag_token(model, *contexts, **search)]
    with torch.autocast("cpu", torch.bfloat16):
        nll_B = rag_nll(model, *contexts, labels_BT, variant="token")
        nll_B.sum().backward()
        found = [best for (best,) in decode_rag_token(model, *contexts, **search)]
        scored = [score(model, contexts, b, best) for b, best in enumerate(found)]
    # Logits of these models have a spread of about 2.5, and bf16 has 8 bits.
    torch.testing.assert_close(nll_B, expected_B, rtol=0.05, atol=0.2)
    assert all(weight.grad is None or weight.grad.isfinite().all() for weight in model.parameters())
    assert sum(f.token_ids == e.token_ids for f, e in zip(found, expected, strict=True)) >= 3
    assert [best.log_prob for best in found] == pytest.approx(scored, abs=0.15)


def score(model: Any, contexts: Any, b: int, best: Any) -> float:
    """log p of an answer by the likelihood."""
    labels_1T = torch.tensor([best.token_ids + [END] * best.ended])
    return -rag_nll(model, *(part[b : b + 1] for part in contexts), labels_1T, variant="token").item()


def test_the_model_gets_its_own_attention_back() -> None:
    model: Any = RobertaModel(
        RobertaConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8, vocab_size=9)
    )
    with cpu_bfloat16(model):
        assert model.config._attn_implementation == "rag_matmul"
        assert model.embeddings.LayerNorm(torch.ones(2, 8)).dtype == torch.bfloat16
    assert model.config._attn_implementation == "sdpa"
    assert model.embeddings.LayerNorm(torch.ones(2, 8)).dtype == torch.float32


@pytest.mark.parametrize("family", ["roberta", "mpnet"])
def test_bfloat16_keeps_directions_in_families_with_and_without_the_interface(family: str) -> None:
    torch.manual_seed(0)
    shape: dict[str, Any] = {
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "intermediate_size": 48,
        "vocab_size": 40_000,
        "max_position_embeddings": 300,
    }
    minilm = TextEncoder.from_pretrained(MINILM)
    models: dict[str, Any] = {"roberta": (RobertaModel, RobertaConfig), "mpnet": (MPNetModel, MPNetConfig)}
    model_class, config_class = models[family]
    encoder = TextEncoder(model_class(config_class(**shape)), minilm.tokenizer, minilm.settings).eval()
    exact_ND = torch.nn.functional.normalize(torch.cat([encoder.embed([text]) for text in TEXTS]), dim=1)
    for precision, least in (("float32", 0.99999), ("bfloat16", 0.999)):
        encoded_ND = torch.from_numpy(encoder.encode(TEXTS, precision=precision))
        assert float((encoded_ND * exact_ND).sum(1).min().detach()) > least


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_embedding_many_texts_leaves_weights_gradients_and_fingerprint_unchanged(precision: Any) -> None:
    encoder = TextEncoder.from_pretrained(MINILM)
    fingerprint, before_BD = encoder.fingerprint(), encoder.embed(TEXTS[:3])
    # Enough texts for packed weights and for several batches.
    assert sum(map(len, TEXTS)) > PACK_FROM
    many_ND = encoder.encode(TEXTS, precision=precision)
    assert encoder.fingerprint() == fingerprint
    after_BD = encoder.embed(TEXTS[:3])
    torch.testing.assert_close(after_BD, before_BD, rtol=0, atol=0)
    after_BD.sum().backward()
    # A text's vector does not depend on the number of texts, although few texts are encoded without packed weights.
    few_ND = encoder.encode(TEXTS[:3], precision=precision)
    np.testing.assert_allclose(many_ND[:3], few_ND, atol=1e-6 if precision == "float32" else 5e-3)
    # The next call uses changed weights.
    with torch.no_grad():
        next(encoder.parameters()).mul_(1.5)
    assert np.abs(encoder.encode(TEXTS, precision=precision)[:3] - many_ND[:3]).max() > 1e-3
