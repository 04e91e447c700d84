"""An answer does not depend on other questions, padding, the passages' order or the cache.

Legend: B questions, K passages per question, S context tokens, H hypotheses.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from rag_core.decoding import Hypothesis
from tests.decoding.test_decoding import DECODE, VARIANTS
from tests.support.models.tiny_models import FAMILIES, random_contexts, tiny_model

# With a length penalty a question that is done would still find better answers if it were not frozen.
PENALTIES = (0.0, 2.0)
Contexts = tuple[Tensor, Tensor, Tensor]


def settings_with(length_penalty: float) -> dict[str, Any]:
    return {"num_beams": 2, "max_new_tokens": 8, "num_return_sequences": 2, "length_penalty": length_penalty}


def assert_same(actual: list[Hypothesis], expected: list[Hypothesis], order_K: list[int] | None = None) -> None:
    """`order_K`: passage k of `actual` is passage order_K[k] of `expected`."""
    assert [h.token_ids for h in actual] == [h.token_ids for h in expected]
    assert [h.log_prob for h in actual] == pytest.approx([h.log_prob for h in expected], abs=1e-10)
    assert [h.ended for h in actual] == [h.ended for h in expected]
    for hypothesis, reference in zip(actual, expected, strict=True):
        posterior = reference.doc_log_posterior if order_K is None else reference.doc_log_posterior[..., order_K]
        torch.testing.assert_close(hypothesis.doc_log_posterior, posterior, rtol=0, atol=1e-10)


@pytest.mark.parametrize("length_penalty", PENALTIES)
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("family", FAMILIES)
def test_an_answer_depends_neither_on_other_questions_nor_on_padding(
    family: str, variant: str, length_penalty: float
) -> None:
    decode, settings = DECODE[variant], settings_with(length_penalty)
    lengths = set()
    for seed in (2, 5, 9):
        model = tiny_model(family, seed=seed)
        ids_BKS, mask_BKS, scores_BK = random_contexts(B=8, K=2, S=6, seed=seed)
        more_BKS = torch.zeros(8, 2, 3, dtype=torch.long)
        padded = (torch.cat((ids_BKS, more_BKS), dim=2), torch.cat((mask_BKS, more_BKS), dim=2), scores_BK)
        together = decode(model, ids_BKS, mask_BKS, scores_BK, **settings)
        with_padding = decode(model, *padded, **settings)
        backwards = decode(model, ids_BKS.flip(0), mask_BKS.flip(0), scores_BK.flip(0), **settings)[::-1]
        for b in range(8):
            alone = decode(model, *(x[b : b + 1] for x in (ids_BKS, mask_BKS, scores_BK)), **settings)[0]
            lengths.update(len(h.token_ids) for h in alone)
            for other in (together[b], with_padding[b], backwards[b]):
                assert_same(other, alone)
    assert len(lengths) > 1, "questions should end at different steps"


@pytest.mark.parametrize("length_penalty", PENALTIES)
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("family", FAMILIES)
def test_an_answer_does_not_depend_on_the_order_of_the_passages(
    family: str, variant: str, length_penalty: float
) -> None:
    decode, settings, order_K = DECODE[variant], settings_with(length_penalty), [2, 0, 3, 1]
    for seed in range(3):
        model = tiny_model(family, seed=seed)
        contexts = random_contexts(B=4, K=4, S=6, seed=seed)
        shuffled: Contexts = (contexts[0][:, order_K], contexts[1][:, order_K], contexts[2][:, order_K])
        straight = decode(model, *contexts, **settings)
        for actual, expected in zip(decode(model, *shuffled, **settings), straight, strict=True):
            assert_same(actual, expected, order_K)


@pytest.mark.parametrize("length_penalty", PENALTIES)
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("family", FAMILIES)
def test_decoding_without_any_cache_gives_the_same_hypotheses(
    family: str, variant: str, length_penalty: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    decode, settings = DECODE[variant], settings_with(length_penalty)
    for seed in range(3):
        model = tiny_model(family, seed=seed)
        contexts = random_contexts(B=6, K=3, S=6, seed=seed)
        cached = decode(model, *contexts, **settings)
        lengths_read = set()
        forward = model.forward

        def without_cache(*args: Any, forward: Any = forward, lengths: set[int] = lengths_read, **inputs: Any) -> Any:
            assert inputs["past_key_values"] is None
            lengths.add(inputs["decoder_input_ids"].shape[1])
            return forward(*args, **inputs)

        with monkeypatch.context() as patch:
            patch.setattr(model, "forward", without_cache)
            uncached = decode(model, *contexts, use_cache=False, **settings)
        assert len(lengths_read) > 1
        for actual, expected in zip(uncached, cached, strict=True):
            assert_same(actual, expected)
