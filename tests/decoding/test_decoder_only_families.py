"""Every family of decoder-only generators, in likelihood and decoding.

The references are separate forward passes without padding or cache, exhaustive enumeration, and the family's own loss
and `generate`.

Legend: B questions, K passages per question, S context tokens, T answer tokens, V vocabulary, H hypotheses in a beam.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import MambaConfig, MambaForCausalLM

from rag_core.decoding import Hypothesis, decode_rag_token
from rag_core.errors import ConfigError
from rag_core.generators import grouping
from rag_core.generators.decoder_only import passage_decoder
from rag_core.generators.kinds import as_generator
from rag_core.reading.likelihood import rag_nll
from tests.decoding.test_decoding import bayes_posterior, mixture_log_prob
from tests.decoding.test_generator_families import (
    DECODE,
    VARIANTS,
    Answer,
    Contexts,
    Rules,
    answer_logits,
    possible_answers,
    until_end,
)
from tests.support.models.tiny_causal import CAUSAL_FAMILIES, END, PAD, tiny_causal
from tests.support.models.tiny_models import random_contexts

# Longer than the sliding windows of 4 tokens.
CONTEXT_TOKENS = 9
RULES = Rules(prompt=[], end=END, pad=PAD)
# Transformers computes norms, softmax or linear attention of these families in float32, whatever the model's type.
ROUNDED = {"gemma2": 1e-6, "gemma3": 1e-6, "olmo-hybrid": 1e-5}
# Families whose hypotheses share a context's keys and values; the others' are copied.
COPIED = {"falcon", "bloom", "gpt-oss", "olmo-hybrid"}
# A number of beams, and each length penalty with its early stopping.
SEARCHES: tuple[tuple[Any, ...], ...] = (
    (1, (0.0, False)),
    (2, (1.0, True)),
    (3, (0.0, False), (2.0, "never")),
    (4, (0.5, False)),
    (5, (1.0, False), (1.0, True)),
)
ANSWERS: list[Answer] = [(3, 5, 4, END), (END,), (4, END), (5, 3)]


@pytest.fixture(autouse=True)
def _small_groups(monkeypatch: pytest.MonkeyPatch) -> None:
    """Contexts of unlike length are read in groups of their own, as large ones are."""
    monkeypatch.setattr(grouping, "MIN_GROUP_TOKENS", 12)


def tolerance(family: str) -> float:
    return ROUNDED.get(family, 1e-10)


def contexts_of(B: int, K: int, seed: int, V: int = 7) -> Contexts:
    return random_contexts(B, K, CONTEXT_TOKENS, seed, vocab_size=V, pad=PAD)


def padded_left(contexts: Contexts, more: int = 2) -> Contexts:
    """The same contexts with their padding in front, and `more` of it."""
    ids_BKS, mask_BKS, scores_BK = contexts
    order_BKS = mask_BKS.argsort(dim=2, stable=True)
    left = (torch.nn.functional.pad(part.gather(2, order_BKS), (more, 0)) for part in (ids_BKS, mask_BKS))
    return next(left), next(left), scores_BK


def labels_of(answers: list[Answer]) -> Tensor:
    longest = max(map(len, answers))
    return torch.tensor([[*answer, *[-100] * (longest - len(answer))] for answer in answers])


def expected_nll(model: Any, contexts: Contexts, variant: str) -> Tensor:
    """The paper's formula over separate unpadded passes, differentiable; shape (B,)."""
    nll = []
    for b, answer in enumerate(ANSWERS):
        log_probs_KTV = answer_logits(model, RULES, contexts, b, [answer])[:, 0].log_softmax(dim=2)
        log_probs_KT = log_probs_KTV[:, torch.arange(len(answer)), list(answer)]
        log_docs_K = contexts[2][b].log_softmax(dim=0)
        if variant == "sequence":
            nll.append(-(log_docs_K + log_probs_KT.sum(dim=1)).logsumexp(dim=0))
        else:
            nll.append(-(log_docs_K.unsqueeze(1) + log_probs_KT).logsumexp(dim=0).sum())
    return torch.stack(nll)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("family", CAUSAL_FAMILIES)
def test_the_likelihood_and_its_gradients_equal_separate_unpadded_passes(family: str, variant: str) -> None:
    model, contexts = tiny_causal(family, seed=1), contexts_of(B=4, K=2, seed=1)
    parameters = {name: weight for name, weight in model.named_parameters() if weight.requires_grad}
    expected_B = expected_nll(model, contexts, variant)
    expected = torch.autograd.grad(expected_B.sum(), list(parameters.values()), allow_unused=True)
    assert sum(gradient is not None for gradient in expected) > len(expected) // 2
    for side in (contexts, padded_left(contexts)):
        nll_B = rag_nll(model, *side, labels_of(ANSWERS), variant=variant)  # type: ignore[arg-type]
        torch.testing.assert_close(nll_B, expected_B, rtol=0, atol=tolerance(family))
        gradients = torch.autograd.grad(nll_B.sum(), list(parameters.values()), allow_unused=True)
        for name, gradient, reference in zip(parameters, gradients, expected, strict=True):
            if reference is not None:
                allowed = tolerance(family) * max(1.0, float(reference.abs().max()))
                torch.testing.assert_close(gradient, reference, rtol=0, atol=allowed, msg=lambda m, n=name: f"{n}: {m}")


@torch.no_grad()
@pytest.mark.parametrize("family", CAUSAL_FAMILIES)
def test_with_one_passage_the_loss_is_the_models_own(family: str) -> None:
    model, contexts = tiny_causal(family, seed=3), contexts_of(B=4, K=1, seed=3)
    for variant in VARIANTS:
        nll_B = rag_nll(model, *contexts, labels_of(ANSWERS), variant=variant)  # type: ignore[arg-type]
        for b, answer in enumerate(ANSWERS):
            context = contexts[0][b, 0][contexts[1][b, 0] == 1].tolist()
            labels = torch.tensor([[-100] * len(context) + list(answer)])
            # Transformers computes the loss in float32.
            theirs = model(input_ids=torch.tensor([context + list(answer)]), labels=labels, use_cache=False).loss
            assert nll_B[b].item() == pytest.approx(theirs.item() * len(answer), abs=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("family", CAUSAL_FAMILIES)
def test_a_beam_as_wide_as_the_space_equals_enumeration(family: str, variant: str) -> None:
    T, V = 3, 6
    model, contexts = tiny_causal(family, vocab_size=V, seed=2), contexts_of(B=2, K=2, seed=2, V=V)
    width = sum(len(answers) for answers in possible_answers(RULES, V, T))
    decoded = DECODE[variant](model, *contexts, num_beams=width, max_new_tokens=T, num_return_sequences=width)
    for b, hypotheses in enumerate(decoded):
        p_docs_K, log_probs_KT = contexts[2][b].softmax(dim=0), {}
        for answers in possible_answers(RULES, V, T):
            logits_KNTV = answer_logits(model, RULES, contexts, b, answers)
            labels_KNT1 = torch.tensor(answers)[None, :, :, None].expand(2, -1, -1, 1)
            found_KNT = logits_KNTV.log_softmax(dim=-1).gather(3, labels_KNT1).squeeze(3)
            log_probs_KT |= {answer: found_KNT[:, n] for n, answer in enumerate(answers)}
        log_prob = {answer: mixture_log_prob(lp, p_docs_K, variant) for answer, lp in log_probs_KT.items()}
        assert sorted(h.token_ids for h in hypotheses) == sorted(until_end(answer, RULES) for answer in log_prob)
        by_tokens = {(tuple(until_end(answer, RULES)), answer[-1] == END): answer for answer in log_prob}
        for h in hypotheses:
            answer = by_tokens[tuple(h.token_ids), h.ended]
            assert h.log_prob == pytest.approx(log_prob[answer], abs=10 * tolerance(family))
            expected = bayes_posterior(log_probs_KT[answer], p_docs_K, variant)
            if variant == "token":
                expected = expected[: len(h.token_ids)]
            torch.testing.assert_close(h.doc_log_posterior.exp(), expected, rtol=0, atol=10 * tolerance(family))
        assert [h.log_prob for h in hypotheses] == sorted((h.log_prob for h in hypotheses), reverse=True)


@pytest.mark.parametrize("family", CAUSAL_FAMILIES)
def test_one_passage_gives_the_sequences_of_the_familys_own_generate(family: str) -> None:
    lengths: set[int] = set()
    for seed, (num_beams, *settings) in enumerate(SEARCHES):
        model, contexts = tiny_causal(family, vocab_size=9, seed=seed), contexts_of(B=3, K=1, seed=seed + 10, V=9)
        for length_penalty, early_stopping in settings:
            search: dict[str, Any] = {
                "num_beams": num_beams,
                "num_return_sequences": num_beams,
                "max_new_tokens": 5,
                "length_penalty": length_penalty,
                "early_stopping": early_stopping,
            }
            ours = decode_rag_token(model, *contexts, **search)
            for b, hypotheses in enumerate(ours):
                context_1S = contexts[0][b][contexts[1][b] == 1].unsqueeze(0)
                mask_1S = torch.ones_like(context_1S)
                rows = model.generate(input_ids=context_1S, attention_mask=mask_1S, do_sample=False, **search)
                expected = [until_end(row[context_1S.shape[1] :], RULES) for row in rows.tolist()]
                assert [h.token_ids for h in hypotheses] == expected
                lengths.update(map(len, expected))
    assert len(lengths) > 1, "answers should end at different steps"


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("family", CAUSAL_FAMILIES)
def test_batch_mates_padding_the_order_of_passages_and_the_cache_change_nothing(family: str, variant: str) -> None:
    settings: dict[str, Any] = {"num_beams": 3, "max_new_tokens": 6, "num_return_sequences": 2, "length_penalty": 1.0}
    model, contexts = tiny_causal(family, vocab_size=9, seed=4), contexts_of(B=4, K=3, seed=4, V=9)
    reference = DECODE[variant](model, *contexts, **settings)

    def assert_same(found: list[list[Hypothesis]], order_K: list[int], expected: list[list[Hypothesis]]) -> None:
        for hypotheses, references in zip(found, expected, strict=True):
            assert [h.token_ids for h in hypotheses] == [h.token_ids for h in references]
            for h, r in zip(hypotheses, references, strict=True):
                assert h.log_prob == pytest.approx(r.log_prob, abs=10 * tolerance(family))
                posterior = r.doc_log_posterior[..., order_K]
                torch.testing.assert_close(h.doc_log_posterior, posterior, rtol=0, atol=100 * tolerance(family))

    in_order = [0, 1, 2]
    assert_same(DECODE[variant](model, *padded_left(contexts), **settings), in_order, reference)
    assert_same(DECODE[variant](model, *contexts, use_cache=False, **settings), in_order, reference)
    turned = [2, 0, 1]
    ids_BKS, mask_BKS, scores_BK = (part[:, turned] for part in contexts)
    assert_same(DECODE[variant](model, ids_BKS, mask_BKS, scores_BK, **settings), turned, reference)
    for b in range(4):
        ids_1KS, mask_1KS, scores_1K = (part[b : b + 1] for part in contexts)
        alone = DECODE[variant](model, ids_1KS, mask_1KS, scores_1K, **settings)
        assert_same(alone, in_order, [reference[b]])
        for h in alone[0]:
            labels_1T = torch.tensor([h.token_ids + [END] * h.ended])
            nll_1 = rag_nll(model, ids_1KS, mask_1KS, scores_1K, labels_1T, variant=variant)  # type: ignore[arg-type]
            assert h.log_prob == pytest.approx(-nll_1.item(), abs=10 * tolerance(family))


@torch.inference_mode()
@pytest.mark.parametrize("family", CAUSAL_FAMILIES)
def test_contexts_keys_are_stored_once_wherever_the_layers_allow_it(family: str) -> None:
    model, (ids_BKS, mask_BKS, _) = tiny_causal(family), contexts_of(B=3, K=1, seed=0)
    decoder = as_generator(model).passage_decoder(ids_BKS[:, 0], mask_BKS[:, 0], use_cache=True)
    decoder.step(torch.full((3, 1), 4), torch.zeros(3, 1, dtype=torch.long))
    decoder.step(torch.full((3, 5), 4), torch.zeros(3, 5, dtype=torch.long))
    copied = isinstance(decoder._rows, passage_decoder._CopiedRows)  # type: ignore[attr-defined]
    assert copied == (family in COPIED)


def test_any_of_several_end_tokens_ends_an_answer() -> None:
    shorter = 0
    for seed in range(4):
        model, contexts = tiny_causal("llama", vocab_size=9, seed=seed), contexts_of(B=3, K=2, seed=seed, V=9)
        model.generation_config.eos_token_id = [END, 6]
        for decode in DECODE.values():
            for (best,) in decode(model, *contexts, num_beams=3, max_new_tokens=6):
                assert not {END, 6} & set(best.token_ids)
                shorter += best.ended and len(best.token_ids) < 5
    assert shorter > 0


def test_a_model_without_a_padding_token_gives_the_same_answers() -> None:
    model, contexts = tiny_causal("qwen3", seed=5), contexts_of(B=3, K=2, seed=5)
    labels_BT = labels_of(ANSWERS[:3])
    expected = decode_rag_token(model, *contexts, num_beams=3, max_new_tokens=5)
    expected_B = rag_nll(model, *contexts, labels_BT, variant="token")
    model.config.pad_token_id = model.generation_config.pad_token_id = None
    actual = decode_rag_token(model, *contexts, num_beams=3, max_new_tokens=5)
    assert [[h.token_ids for h in hypotheses] for hypotheses in actual] == [
        [h.token_ids for h in hypotheses] for hypotheses in expected
    ]
    assert torch.equal(rag_nll(model, *contexts, labels_BT, variant="token"), expected_B)


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_context_and_answer_share_the_positions_and_one_token_too_many_is_refused(family: str) -> None:
    model = tiny_causal(family)
    ids_BKS = torch.randint(3, 7, (1, 2, 60), generator=torch.Generator().manual_seed(0))
    contexts = ids_BKS, torch.ones_like(ids_BKS), torch.zeros(1, 2, dtype=torch.float64)
    # 64 positions: 60 tokens of context, and all of the answer but its last token.
    assert torch.isfinite(rag_nll(model, *contexts, torch.full((1, 5), 3), variant="token")).all()
    assert decode_rag_token(model, *contexts, num_beams=2, max_new_tokens=5)[0]
    with pytest.raises(ConfigError, match=r"contexts and answers of 65 tokens .* has positions for: 64\. Set"):
        rag_nll(model, *contexts, torch.full((1, 6), 3), variant="token")
    for decode in DECODE.values():
        with pytest.raises(ConfigError, match=r"max_new_tokens 6 is more than the generator .* has positions for: 5\."):
            decode(model, *contexts, num_beams=2, max_new_tokens=6)


def test_a_model_with_a_cache_of_its_own_is_refused_by_name() -> None:
    config = MambaConfig(vocab_size=7, hidden_size=16, num_hidden_layers=1, eos_token_id=END)
    model, contexts = MambaForCausalLM(config).double().eval(), contexts_of(B=1, K=2, seed=0)
    with pytest.raises(
        ConfigError, match=r"MambaForCausalLM\) keeps its state in a cache of its own, .* use_cache=False"
    ):
        decode_rag_token(model, *contexts, num_beams=2, max_new_tokens=3)
    (best,) = decode_rag_token(model, *contexts, num_beams=2, max_new_tokens=3, use_cache=False)[0]
    labels_1T = torch.tensor([best.token_ids + [END] * best.ended])
    assert best.log_prob == pytest.approx(-rag_nll(model, *contexts, labels_1T, variant="token").item(), abs=1e-6)
