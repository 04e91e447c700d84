"""Both decoders against exhaustive enumeration, hand-written loops and Hugging Face's beam search.

Legend: B questions, K passages per question, S context tokens, T answer tokens, V vocabulary, H hypotheses in a beam.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from rag_core.decoding import Hypothesis, decode_rag_sequence, decode_rag_token
from rag_core.errors import ConfigError
from rag_core.reading.likelihood import rag_nll
from tests.support.models.tiny_models import FAMILIES, answer_tokens, end_token, random_contexts, tiny_bart, tiny_model

DECODE: dict[str, Callable[..., list[list[Hypothesis]]]] = {
    "sequence": decode_rag_sequence,
    "token": decode_rag_token,
}
VARIANTS = tuple(DECODE)
MAX_NEW_TOKENS = 4
WHOLE_SPACE = 1600  # beams; at most 6**4 + 6**3 + 6**2 + 6 + 1 = 1555 answers exist

Answer = tuple[int, ...]


@torch.no_grad()
def all_answers(
    model: Any, input_ids_KS: Tensor, attention_mask_KS: Tensor, ends: tuple[int, ...] | None = None
) -> dict[Answer, Tensor]:
    """log p(a_t|q,z,a_<t) of shape (K, T) for every possible answer, by unpadded forward passes without a cache."""
    ends = ends or (end_token(model),)
    tokens = [token for token in answer_tokens(model) if token not in ends]
    generated: list[list[Answer]] = [
        [(*body, end) for body in itertools.product(tokens, repeat=length) for end in ends]
        for length in range(MAX_NEW_TOKENS)
    ]
    generated.append(list(itertools.product(tokens, repeat=MAX_NEW_TOKENS)))
    result = {}
    for answers in generated:
        answers_NT = torch.tensor(answers)
        start_N1 = torch.full((len(answers), 1), model.config.decoder_start_token_id)
        log_probs_KNT = []
        for ids_S, mask_S in zip(input_ids_KS, attention_mask_KS, strict=True):
            logits_NTV = model(
                input_ids=ids_S[mask_S == 1].expand(len(answers), -1),
                decoder_input_ids=torch.cat((start_N1, answers_NT[:, :-1]), dim=1),
                use_cache=False,
            ).logits
            log_probs_KNT.append(logits_NTV.log_softmax(dim=-1).gather(2, answers_NT.unsqueeze(2)).squeeze(2))
        for n, answer in enumerate(answers):
            result[answer] = torch.stack([log_probs_NT[n] for log_probs_NT in log_probs_KNT])
    return result


def mixture_log_prob(log_probs_KT: Tensor, p_docs_K: Tensor, variant: str) -> float:
    """The paper's formulas in probabilities."""
    if variant == "sequence":
        return math.log((p_docs_K * log_probs_KT.sum(dim=1).exp()).sum())
    return float((p_docs_K.unsqueeze(1) * log_probs_KT.exp()).sum(dim=0).log().sum())


def bayes_posterior(log_probs_KT: Tensor, p_docs_K: Tensor, variant: str) -> Tensor:
    """p(z|q,a), shape (K,), or p(z|q,a_<t and a_t) from token t alone, shape (T, K); by Bayes' rule."""
    p_KT = log_probs_KT.exp()
    joint = p_docs_K * p_KT.prod(dim=1) if variant == "sequence" else p_docs_K * p_KT.T
    return joint / joint.sum(dim=-1, keepdim=True)


def answer_of(generated: list[int], end: int) -> list[int]:
    """Generated tokens up to the end token; what follows it is padding."""
    return generated[: generated.index(end)] if end in generated else generated


def body(answer: Answer, model: Any) -> list[int]:
    return [token for token in answer if token != end_token(model)]


@pytest.mark.parametrize("length_penalty", [0.0, 1.0])
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("family", FAMILIES)
def test_wide_beam_equals_exhaustive_enumeration(family: str, variant: str, length_penalty: float) -> None:
    for seed in range(2):
        model = tiny_model(family, seed=seed)
        contexts = random_contexts(B=2, K=3, S=6, seed=seed)
        decoded = DECODE[variant](
            model,
            *contexts,
            num_beams=WHOLE_SPACE,
            max_new_tokens=MAX_NEW_TOKENS,
            num_return_sequences=10,
            length_penalty=length_penalty,
        )
        for b, hypotheses in enumerate(decoded):
            answers = all_answers(model, contexts[0][b], contexts[1][b])
            p_docs_K = contexts[2][b].softmax(dim=0)
            log_probs = {answer: mixture_log_prob(lp, p_docs_K, variant) for answer, lp in answers.items()}
            # RAG-Sequence ranks its beams' answers by probability. These beams hold all answers.
            penalty = length_penalty if variant == "token" else 0.0
            ranked = sorted(answers, key=lambda a: log_probs[a] / len(a) ** penalty, reverse=True)[:10]
            assert [h.token_ids for h in hypotheses] == [body(answer, model) for answer in ranked]
            for hypothesis, answer in zip(hypotheses, ranked, strict=True):
                assert hypothesis.log_prob == pytest.approx(log_probs[answer], abs=1e-9)
                assert hypothesis.score == pytest.approx(log_probs[answer] / len(answer) ** penalty, abs=1e-9)
                assert hypothesis.ended == (answer[-1] == end_token(model))
                torch.testing.assert_close(
                    hypothesis.doc_log_posterior.exp().sum(dim=-1),
                    torch.ones(hypothesis.doc_log_posterior.shape[:-1], dtype=torch.float64),
                )
                expected = bayes_posterior(answers[answer], p_docs_K, variant)
                if variant == "token":
                    expected = expected[: len(hypothesis.token_ids)]
                torch.testing.assert_close(hypothesis.doc_log_posterior.exp(), expected, rtol=0, atol=1e-9)


def test_length_penalty_ranks_the_answers_of_rag_token_and_steers_the_beams_of_rag_sequence() -> None:
    contexts = random_contexts(B=2, K=3, S=6, seed=3)
    settings: dict[str, Any] = {"num_beams": WHOLE_SPACE, "max_new_tokens": MAX_NEW_TOKENS, "num_return_sequences": 20}
    by_probability, by_length = (
        decode_rag_token(tiny_bart(seed=3), *contexts, length_penalty=p, **settings) for p in (0.0, 2.0)
    )
    for plain, penalised in zip(by_probability, by_length, strict=True):
        assert [h.token_ids for h in plain] != [h.token_ids for h in penalised]
        scores = [h.log_prob / (len(h.token_ids) + h.ended) ** 2.0 for h in penalised]
        assert scores == sorted(scores, reverse=True)
        assert [h.score for h in penalised] == pytest.approx(scores)
    by_penalty = {}
    for p in (0.0, 4.0):
        answers = [
            decode_rag_sequence(
                tiny_bart(seed=seed), *contexts, num_beams=2, max_new_tokens=6, length_penalty=p, num_return_sequences=2
            )
            for seed in range(6)
        ]
        by_penalty[p] = [[tuple(h.token_ids) for h in hypotheses] for decoded in answers for hypotheses in decoded]
        assert all(h[0].log_prob >= h[1].log_prob for decoded in answers for h in decoded)
    assert by_penalty[0.0] != by_penalty[4.0]


@pytest.mark.parametrize("num_beams", [1, 2, 4])
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("mode", ["fast", "thorough"])
def test_rag_sequence_merges_the_passages_beams_by_definition(mode: str, family: str, num_beams: int) -> None:
    settings = {"num_beams": num_beams, "max_new_tokens": MAX_NEW_TOKENS, "num_return_sequences": num_beams}
    held_by_some = 0
    for seed in range(2):
        model = tiny_model(family, seed=seed)
        contexts = random_contexts(B=2, K=3, S=6, seed=seed)
        decoded = decode_rag_sequence(model, *contexts, mode=mode, **settings)  # type: ignore[arg-type]
        for b in range(2):
            # RAG-Token with one passage is plain beam search: each passage's own candidates.
            beams = [
                {
                    tuple(h.token_ids): h.log_prob
                    for h in decode_rag_token(model, *(x[b : b + 1, k : k + 1] for x in contexts), **settings)[0]
                }
                for k in range(3)
            ]
            answers = {
                tuple(body(a, model)): lp for a, lp in all_answers(model, contexts[0][b], contexts[1][b]).items()
            }
            p_docs = contexts[2][b].softmax(dim=0).tolist()
            joint: dict[Answer, list[float]] = {}
            for answer in set().union(*beams):
                exact_K = answers[answer].sum(dim=1).exp().tolist()
                held = [answer in beam for beam in beams]
                held_by_some += any(held) and not all(held)
                joint[answer] = [p_docs[k] * exact_K[k] * (held[k] or mode == "thorough") for k in range(3)]
            ranked = sorted(joint, key=lambda a: sum(joint[a]), reverse=True)[:num_beams]
            assert [tuple(h.token_ids) for h in decoded[b]] == ranked
            for hypothesis in decoded[b]:
                expected_K = torch.tensor(joint[tuple(hypothesis.token_ids)], dtype=torch.float64)
                assert hypothesis.log_prob == pytest.approx(math.log(expected_K.sum()), abs=1e-9)
                posterior_K = hypothesis.doc_log_posterior.exp()
                torch.testing.assert_close(posterior_K, expected_K / expected_K.sum(), rtol=0, atol=1e-9)
    assert held_by_some > 0


@pytest.mark.parametrize("num_beams", [2, 4])
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("family", FAMILIES)
def test_answers_of_narrow_beams_are_sorted_distinct_and_score_themselves(
    family: str, variant: str, num_beams: int
) -> None:
    for seed in range(3):
        model = tiny_model(family, vocab_size=12, seed=seed)
        contexts = random_contexts(B=4, K=3, S=6, seed=seed, vocab_size=12)
        decoded = DECODE[variant](
            model, *contexts, num_beams=num_beams, max_new_tokens=7, num_return_sequences=num_beams
        )
        for b, hypotheses in enumerate(decoded):
            assert len(hypotheses) == num_beams
            log_probs = [h.log_prob for h in hypotheses]
            assert log_probs == sorted(log_probs, reverse=True)
            assert len({tuple(h.token_ids) for h in hypotheses}) == num_beams
            for h in hypotheses:
                labels = h.token_ids + [end_token(model)] * h.ended
                question = (x[b : b + 1] for x in contexts)
                nll = rag_nll(model, *question, torch.tensor([labels]), variant=variant)  # type: ignore[arg-type]
                assert h.log_prob == pytest.approx(-nll.item(), abs=1e-9)


@pytest.mark.parametrize("length_penalty", [0.0, 1.0])
def test_one_passage_gives_the_answers_of_hugging_face_beam_search(length_penalty: float) -> None:
    ended_early = 0
    for seed in range(30):
        model = tiny_bart(vocab_size=9, seed=seed)
        ids_BKS, mask_BKS, scores_BK = random_contexts(B=2, K=1, S=6, seed=seed, vocab_size=9)
        num_beams = 2 + seed % 3
        theirs = model.generate(
            input_ids=ids_BKS[:, 0],
            attention_mask=mask_BKS[:, 0],
            num_beams=num_beams,
            num_return_sequences=num_beams,
            max_new_tokens=7,
            length_penalty=length_penalty,
            early_stopping=False,
            do_sample=False,
            return_dict_in_generate=True,
            output_scores=True,
        )
        expected = [answer_of(row[1:], end=2) for row in theirs.sequences.tolist()]
        for decode in DECODE.values():
            ours = decode(
                model,
                ids_BKS,
                mask_BKS,
                torch.zeros_like(scores_BK),
                num_beams=num_beams,
                max_new_tokens=7,
                length_penalty=length_penalty,
                num_return_sequences=num_beams,
            )
            flat = [h for hypotheses in ours for h in hypotheses]
            if decode is decode_rag_sequence:  # which ranks them by probability
                theirs_first = [expected[:num_beams], expected[num_beams:]]
                order = [
                    sorted(hs, key=lambda h, e=e: e.index(h.token_ids))
                    for hs, e in zip(ours, theirs_first, strict=True)
                ]
                flat = [h for hypotheses in order for h in hypotheses]
            assert [h.token_ids for h in flat] == expected
            scores = [h.log_prob / (len(h.token_ids) + h.ended) ** length_penalty for h in flat]
            assert scores == pytest.approx(theirs.sequences_scores.tolist(), abs=1e-5)
        ended_early += sum(0 < len(token_ids) < 7 for token_ids in expected)
    assert ended_early > 10


@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_rag_token_equals_a_loop_without_cache(family: str) -> None:
    for seed in range(3):
        model = tiny_model(family, vocab_size=10, seed=seed)
        contexts = random_contexts(B=3, K=3, S=6, seed=seed, vocab_size=10)
        decoded = decode_rag_token(model, *contexts, num_beams=1, max_new_tokens=6)
        for b, (hypothesis,) in enumerate(decoded):
            generated = [model.config.decoder_start_token_id]
            log_prob = 0.0
            for _ in range(6):
                p_V = torch.zeros(10, dtype=torch.float64)
                for k in range(3):
                    context = contexts[0][b, k][contexts[1][b, k] == 1]
                    logits_TV = model(input_ids=context[None], decoder_input_ids=torch.tensor([generated])).logits[0]
                    p_V += contexts[2][b].softmax(dim=0)[k] * logits_TV[-1].softmax(dim=0).detach()
                token = int(p_V.argmax())
                generated.append(token)
                log_prob += math.log(p_V[token])
                if token == end_token(model):
                    break
            assert hypothesis.token_ids == body(tuple(generated[1:]), model)
            assert hypothesis.log_prob == pytest.approx(log_prob, abs=1e-9)


@pytest.mark.parametrize("variant", VARIANTS)
def test_absent_passage_counts_as_probability_zero(variant: str) -> None:
    model = tiny_bart(seed=1)
    ids_BKS, mask_BKS, scores_BK = random_contexts(B=2, K=3, S=6, seed=1)
    settings = {"num_beams": WHOLE_SPACE, "max_new_tokens": 3, "num_return_sequences": 5}
    scores_BK[:, 1] = float("-inf")
    keep = [0, 2]
    without = DECODE[variant](model, ids_BKS[:, keep], mask_BKS[:, keep], scores_BK[:, keep], **settings)
    for actual, expected in zip(DECODE[variant](model, ids_BKS, mask_BKS, scores_BK, **settings), without, strict=True):
        assert [h.token_ids for h in actual] == [h.token_ids for h in expected]
        assert [h.log_prob for h in actual] == pytest.approx([h.log_prob for h in expected], abs=1e-10)
        assert all(bool((h.doc_log_posterior[..., 1] == float("-inf")).all()) for h in actual)
    scores_BK[0] = float("-inf")
    with pytest.raises(ValueError, match="finite score for every question"):
        DECODE[variant](model, ids_BKS, mask_BKS, scores_BK, **settings)


@pytest.mark.parametrize("variant", VARIANTS)
def test_any_of_several_end_tokens_ends_an_answer(variant: str) -> None:
    model = tiny_bart(seed=2)
    model.generation_config.eos_token_id = [2, 5]
    contexts = random_contexts(B=1, K=2, S=6, seed=2)
    actual = DECODE[variant](
        model, *contexts, num_beams=WHOLE_SPACE, max_new_tokens=MAX_NEW_TOKENS, num_return_sequences=10
    )[0]
    best: dict[Answer, float] = {}
    for answer, log_probs_KT in all_answers(model, contexts[0][0], contexts[1][0], ends=(2, 5)).items():
        answer_body = answer[:-1] if answer[-1] in (2, 5) else answer
        log_prob = mixture_log_prob(log_probs_KT, contexts[2][0].softmax(dim=0), variant)
        best[answer_body] = max(log_prob, best.get(answer_body, -math.inf))
    ranked = sorted(best, key=lambda a: best[a], reverse=True)[:10]
    assert [tuple(h.token_ids) for h in actual] == ranked
    assert [h.log_prob for h in actual] == pytest.approx([best[a] for a in ranked], abs=1e-9)


@pytest.mark.parametrize("variant", VARIANTS)
def test_contexts_are_encoded_once_and_modules_keep_their_mode(variant: str) -> None:
    model = tiny_bart(seed=4)
    encoded: list[int] = []
    model.get_encoder().register_forward_hook(lambda *_: encoded.append(1))
    contexts = random_contexts(B=2, K=3, S=6, seed=4)
    expected = DECODE[variant](model, *contexts, num_beams=3, max_new_tokens=5)
    assert len(encoded) == 1
    model.train()
    model.get_encoder().eval()
    modes = [module.training for module in model.modules()]
    actual = DECODE[variant](model, *contexts, num_beams=3, max_new_tokens=5)
    assert [module.training for module in model.modules()] == modes
    assert [h.token_ids for (h,) in actual] == [h.token_ids for (h,) in expected], "dropout must be off"


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_lower_precision_models_give_nearly_their_float64_log_probs(variant: str, dtype: torch.dtype) -> None:
    model = tiny_bart(seed=6, dtype=dtype)
    contexts = random_contexts(B=3, K=2, S=6, seed=6, dtype=torch.float32)
    decoded = DECODE[variant](model, *contexts, num_beams=2, max_new_tokens=5)
    labels_BT = torch.full((3, 5), -100)
    for b, (h,) in enumerate(decoded):
        labels = h.token_ids + [2] * (len(h.token_ids) < 5)
        labels_BT[b, : len(labels)] = torch.tensor(labels)
        assert h.doc_log_posterior.dtype == torch.float32
    nll_B = rag_nll(model.double(), *contexts, labels_BT, variant=variant)  # type: ignore[arg-type]
    tolerance = 1e-4 if dtype == torch.float32 else 0.6
    assert [h.log_prob for (h,) in decoded] == pytest.approx((-nll_B).tolist(), abs=tolerance)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_beams": 0}, "num_beams is 0"),
        ({"max_new_tokens": 0}, "max_new_tokens is 0"),
        ({"num_return_sequences": 0}, "num_return_sequences is 0"),
        ({"num_return_sequences": 3}, "num_return_sequences is 3 and num_beams 2"),
        ({"early_stopping": "always"}, "early_stopping is 'always'"),
        ({"early_stopping": 1}, "early_stopping is 1"),
    ],
)
@pytest.mark.parametrize("variant", VARIANTS)
def test_settings_out_of_range_are_refused(variant: str, settings: dict[str, Any], message: str) -> None:
    contexts = random_contexts(B=1, K=2, S=4, seed=0)
    with pytest.raises(ConfigError, match=message):
        DECODE[variant](tiny_bart(), *contexts, **({"num_beams": 2, "max_new_tokens": 3} | settings))


@pytest.mark.parametrize("variant", VARIANTS)
def test_unusable_models_and_inputs_are_refused(variant: str) -> None:
    decode, settings = DECODE[variant], {"num_beams": 2, "max_new_tokens": 3}
    ids_BKS, mask_BKS, scores_BK = random_contexts(B=1, K=2, S=4, seed=0)
    with pytest.raises(ConfigError, match="is an encoder"):
        decode(tiny_model("bert2bert").encoder, ids_BKS, mask_BKS, scores_BK, **settings)
    with pytest.raises(ValueError, match=r"\(1, 2, 4\), \(1, 2, 3\), \(1, 2\)"):
        decode(tiny_bart(), ids_BKS, mask_BKS[:, :, 1:], scores_BK, **settings)
    for name in ("eos_token_id", "decoder_start_token_id", "pad_token_id"):
        model = tiny_bart()
        for place in (model.generation_config, model.config):
            setattr(place, name, None)
        with pytest.raises(ConfigError, match=f"has no {name}"):
            decode(model, ids_BKS, mask_BKS, scores_BK, **settings)


def test_special_tokens_of_a_nested_decoder_are_found() -> None:
    model = tiny_model("bert2bert", seed=1)
    contexts = random_contexts(B=2, K=2, S=5, seed=1)
    expected = decode_rag_token(model, *contexts, num_beams=2, max_new_tokens=4)
    for place in (model.generation_config, model.config):
        place.eos_token_id = None
    model.config.decoder.eos_token_id = 2
    actual = decode_rag_token(model, *contexts, num_beams=2, max_new_tokens=4)
    assert [h.token_ids for (h,) in actual] == [h.token_ids for (h,) in expected]


def test_unknown_mode_is_refused_with_both_names() -> None:
    contexts = random_contexts(B=1, K=2, S=4, seed=0)
    with pytest.raises(ConfigError, match='"thorough" or "fast"'):
        decode_rag_sequence(tiny_bart(), *contexts, num_beams=2, max_new_tokens=3, mode="quick")  # type: ignore[arg-type]
