"""Every family of generators, with the special tokens of its released checkpoints, in likelihood and decoding.

The references are separate forward passes without padding or cache, exhaustive enumeration, and the family's own
`generate`.

Legend: B questions, K passages per question, S context tokens, T answer tokens, V vocabulary, N answers.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import BertConfig, BertLMHeadModel, BertModel

from rag_core.decoding import Hypothesis, decode_rag_sequence, decode_rag_token
from rag_core.errors import ConfigError
from rag_core.reading.likelihood import rag_nll
from tests.decoding.test_decoding import bayes_posterior, mixture_log_prob
from tests.reading.test_likelihood import paper_nll
from tests.support.models.tiny_models import ALL_BUILDS, random_contexts, tiny_bart, tiny_model

DECODE: dict[str, Callable[..., list[list[Hypothesis]]]] = {
    "sequence": decode_rag_sequence,
    "token": decode_rag_token,
}
VARIANTS = tuple(DECODE)
# The released settings, and two families with suppressed tokens on top: without and with a forced first token.
CASES = (*ALL_BUILDS, "t5, suppressing", "mbart, suppressing")
# LED's windows are 4 tokens wide: three of them, the last padded by the encoder itself.
CONTEXT_TOKENS = 11

Answer = tuple[int, ...]
Contexts = tuple[Tensor, Tensor, Tensor]


@dataclass(frozen=True)
class Rules:
    """The form of a family's answers, written down by hand."""

    prompt: list[int]
    end: int
    pad: int
    end_is_forced: bool = False
    never: tuple[int, ...] = ()
    never_first: tuple[int, ...] = ()


def rules_of(case: str, V: int) -> Rules:
    language = V - 1
    return {
        "bart": Rules(prompt=[2], end=2, pad=0),
        "bart-forced": Rules(prompt=[2, 1], end=2, pad=0, end_is_forced=True),
        "mbart": Rules(prompt=[2, language], end=2, pad=1, end_is_forced=True),
        "mbart-25": Rules(prompt=[language], end=2, pad=1, end_is_forced=True),
        "t5": Rules(prompt=[0], end=1, pad=0),
        "flan-t5": Rules(prompt=[0], end=1, pad=0),
        "pegasus": Rules(prompt=[0], end=1, pad=0, end_is_forced=True),
        "marian": Rules(prompt=[V - 1], end=0, pad=V - 1, end_is_forced=True, never=(V - 1,)),
        "led": Rules(prompt=[2], end=2, pad=1),
        "bert2bert": Rules(prompt=[1], end=2, pad=0),
        "t5, suppressing": Rules(prompt=[0], end=1, pad=0, never=(3, 4), never_first=(1, 5)),
        "mbart, suppressing": Rules(
            prompt=[2, language], end=2, pad=1, end_is_forced=True, never=(3, 4), never_first=(2, 5)
        ),
    }[case]


def build(case: str, V: int, seed: int, B: int, K: int) -> tuple[Any, Rules, Contexts]:
    rules = rules_of(case, V)
    model = tiny_model(case.removesuffix(", suppressing"), vocab_size=V, seed=seed)
    if case.endswith(", suppressing"):
        model.generation_config.suppress_tokens = [4]
        # transformers ignores a bad word that would forbid ending.
        model.generation_config.bad_words_ids = [[3], [rules.end]]
        model.generation_config.begin_suppress_tokens = [5, rules.end]
    return model, rules, random_contexts(B, K, CONTEXT_TOKENS, seed, vocab_size=V - 1, pad=rules.pad)


def answer_logits(model: Any, rules: Rules, contexts: Contexts, b: int, answers: list[Answer]) -> Tensor:
    """Logits (K, N, T, V) of N answers of one length to question b, by unpadded forward passes without a cache."""
    prompted = torch.tensor([rules.prompt + list(answer[:-1]) for answer in answers], dtype=torch.long)
    logits = []
    for ids_S, mask_S in zip(contexts[0][b], contexts[1][b], strict=True):
        context_NS = ids_S[mask_S == 1].expand(len(answers), -1)
        if model.config.is_encoder_decoder:
            read = model(input_ids=context_NS, decoder_input_ids=prompted, use_cache=False).logits
            logits.append(read[:, len(rules.prompt) - 1 :])
        else:
            read = model(input_ids=torch.cat((context_NS, prompted), dim=1), use_cache=False).logits
            logits.append(read[:, context_NS.shape[1] - 1 :])
    return torch.stack(logits)


def possible_answers(rules: Rules, V: int, T: int) -> Iterator[list[Answer]]:
    """All answers of at most T tokens, end token included, those of one length together."""
    tokens = [token for token in range(V) if token not in (rules.end, *rules.never)]
    for length in range(1, T + 1):
        bodies: list[Answer] = list(itertools.product(tokens, repeat=length - 1))
        answers = [(*body, rules.end) for body in bodies]
        if length == T and not rules.end_is_forced:
            answers += [(*body, token) for body in bodies for token in tokens]
        yield [answer for answer in answers if answer[0] not in rules.never_first]


def until_end(generated: Iterable[int], rules: Rules) -> list[int]:
    return list(itertools.takewhile(lambda token: token != rules.end, generated))


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("case", ALL_BUILDS)
def test_the_likelihood_equals_separate_unpadded_passes(case: str, variant: str) -> None:
    model, rules, contexts = build(case, V=7, seed=1, B=4, K=2)
    answers: list[Answer] = [(3, 5, 4, rules.end), (rules.end,), (4, rules.end), (5, 3)]
    labels_BT = torch.tensor([[*answer, *[-100] * (4 - len(answer))] for answer in answers])
    found_B = rag_nll(model, *contexts, labels_BT, variant=variant)  # type: ignore[arg-type]
    for b, answer in enumerate(answers):
        logits_1KTV = answer_logits(model, rules, contexts, b, [answer]).detach().transpose(0, 1)
        expected = paper_nll(logits_1KTV, contexts[2][b : b + 1], torch.tensor([answer]), variant)
        assert found_B[b].item() == pytest.approx(expected[0], abs=1e-10)
    one_B = rag_nll(model, *contexts, torch.full((4, 1), rules.end), variant=variant)  # type: ignore[arg-type]
    assert one_B[1].item() == pytest.approx(found_B[1].item(), abs=1e-10)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("case", ALL_BUILDS)
def test_every_gradient_is_finite_and_a_step_lowers_the_loss_to_first_order(case: str, variant: str) -> None:
    model, rules, (ids_BKS, mask_BKS, scores_BK) = build(case, V=7, seed=0, B=3, K=2)
    if case == "led":
        # In float64 transformers' own loss has NaN gradients too: LED casts its mask to float32, where it is -inf.
        model, scores_BK = model.float(), scores_BK.float()
    scores_BK.requires_grad_()
    labels_BT = torch.tensor([[3, 5, rules.end], [4, rules.end, -100], [rules.end, -100, -100]])

    def loss() -> Tensor:
        return rag_nll(model, ids_BKS, mask_BKS, scores_BK, labels_BT, variant=variant).sum()  # type: ignore[arg-type]

    before = loss()
    before.backward()
    # No path leads from the answer to LED's global attention (no token has it) and to BERT's pooler.
    learned = [scores_BK] + [
        parameter
        for name, parameter in model.named_parameters()
        if parameter.requires_grad and "_global" not in name and "pooler" not in name
    ]
    gradients = [parameter.grad for parameter in learned if parameter.grad is not None]
    assert len(gradients) == len(learned)
    assert all(bool(gradient.isfinite().all()) for gradient in gradients)
    step_size = 1e-3 / sum(float(gradient.square().sum()) for gradient in gradients)
    with torch.no_grad():
        for parameter, gradient in zip(learned, gradients, strict=True):
            parameter -= step_size * gradient
    assert (before - loss()).item() == pytest.approx(1e-3, rel=0.05)


@torch.no_grad()
@pytest.mark.parametrize("length_penalty", [0.0, 1.0])
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("case", CASES)
def test_a_wide_beam_equals_exhaustive_enumeration(case: str, variant: str, length_penalty: float) -> None:
    T = 3
    model, rules, contexts = build(case, V=7, seed=2, B=2, K=2)
    forced_first = len(rules.prompt) - 1
    decoded = DECODE[variant](
        model,
        *contexts,
        num_beams=300,  # at most 259 answers exist
        max_new_tokens=T + forced_first,
        num_return_sequences=300,
        length_penalty=length_penalty,
    )
    for b, hypotheses in enumerate(decoded):
        p_docs_K = contexts[2][b].softmax(dim=0)
        log_probs_KT: dict[Answer, Tensor] = {}
        for answers in possible_answers(rules, V=7, T=T):
            if answers:
                labels_KNT1 = torch.tensor(answers)[None, :, :, None].expand(2, -1, -1, 1)
                logits_KNTV = answer_logits(model, rules, contexts, b, answers)
                found_KNT = logits_KNTV.log_softmax(dim=-1).gather(3, labels_KNT1).squeeze(3)
                log_probs_KT |= {answer: found_KNT[:, n] for n, answer in enumerate(answers)}
        log_prob = {answer: mixture_log_prob(lp, p_docs_K, variant) for answer, lp in log_probs_KT.items()}
        score = dict(log_prob)
        if variant == "token":
            for answer, lp_KT in log_probs_KT.items():
                if len(answer) == T and rules.end_is_forced:  # a forced end token costs nothing
                    score[answer] = mixture_log_prob(lp_KT[:, :-1], p_docs_K, variant)
                score[answer] /= (len(answer) + forced_first) ** length_penalty
        ranked = sorted(score, key=lambda answer: score[answer], reverse=True)
        assert [h.token_ids for h in hypotheses] == [until_end(answer, rules) for answer in ranked]
        assert [h.ended for h in hypotheses] == [answer[-1] == rules.end for answer in ranked]
        assert [h.log_prob for h in hypotheses] == pytest.approx([log_prob[answer] for answer in ranked], abs=1e-9)
        assert [h.score for h in hypotheses] == pytest.approx([score[answer] for answer in ranked], abs=1e-9)
        for hypothesis, answer in zip(hypotheses, ranked, strict=True):
            expected = bayes_posterior(log_probs_KT[answer], p_docs_K, variant)
            if variant == "token":
                expected = expected[: len(hypothesis.token_ids)]
            torch.testing.assert_close(hypothesis.doc_log_posterior.exp(), expected, rtol=0, atol=1e-9)


@pytest.mark.parametrize("case", CASES)
def test_one_passage_gives_the_sequences_of_the_familys_own_generate(case: str) -> None:
    num_beams = 3
    ended_early, cut_off, stopping_matters = 0, 0, 0
    for seed in range(10):
        model, rules, (ids_BKS, mask_BKS, scores_BK) = build(case, V=9, seed=seed, B=4, K=1)
        max_new_tokens = (7, 4, 5)[seed % 3]
        # All kinds of early stopping where they differ most, and one kind without a length penalty.
        settings = [(1.0, False), (1.0, True), (1.0, "never"), (0.0, (False, True, "never")[seed // 3 % 3])]
        sequences = []
        for length_penalty, early_stopping in settings:
            search: dict[str, Any] = {
                "num_beams": num_beams,
                "num_return_sequences": num_beams,
                "max_new_tokens": max_new_tokens,
                "length_penalty": length_penalty,
                "early_stopping": early_stopping,
            }
            theirs = model.generate(
                input_ids=ids_BKS[:, 0],
                attention_mask=mask_BKS[:, 0],
                do_sample=False,
                return_dict_in_generate=True,
                output_scores=True,
                **search,
            )
            rows = theirs.sequences.tolist()
            assert all(row[: len(rules.prompt)] == rules.prompt for row in rows)
            expected = [until_end(row[len(rules.prompt) :], rules) for row in rows]
            by_token, by_sequence = (
                [h for hypotheses in decode(model, ids_BKS, mask_BKS, scores_BK, **search) for h in hypotheses]
                for decode in (decode_rag_token, decode_rag_sequence)
            )
            assert [h.token_ids for h in by_token] == expected
            assert [h.score for h in by_token] == pytest.approx(theirs.sequences_scores.tolist(), abs=1e-4)
            # RAG-Sequence ranks its beams' answers by probability, whatever the length penalty.
            for b in range(0, len(expected), num_beams):
                ours = by_sequence[b : b + num_beams]
                assert sorted(h.token_ids for h in ours) == sorted(expected[b : b + num_beams])
                assert [h.log_prob for h in ours] == sorted((h.log_prob for h in ours), reverse=True)
            ended_early += sum(h.ended and len(h.token_ids) < max_new_tokens - len(rules.prompt) for h in by_token)
            cut_off += sum(not h.ended for h in by_token)
            sequences.append(expected)
        stopping_matters += sequences[0] != sequences[1]
    assert ended_early > 20
    assert (cut_off == 0) == rules.end_is_forced
    assert stopping_matters > 0


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("case", ALL_BUILDS)
def test_an_answer_depends_neither_on_batch_mates_nor_on_padding_nor_on_the_cache(case: str, variant: str) -> None:
    lengths: set[int] = set()
    # With a length penalty a question that is done would still find better answers if it were not frozen.
    for seed, length_penalty in ((1, 1.0), (2, 0.0)):
        settings: dict[str, Any] = {"num_beams": 2, "max_new_tokens": 7, "num_return_sequences": 2}
        settings["length_penalty"] = length_penalty
        model, rules, (ids_BKS, mask_BKS, scores_BK) = build(case, V=9, seed=seed, B=5, K=2)
        padded_BKS = torch.nn.functional.pad(ids_BKS, (0, 3), value=rules.pad)
        runs = [
            DECODE[variant](model, ids_BKS, mask_BKS, scores_BK, **settings),
            DECODE[variant](
                model, padded_BKS, torch.nn.functional.pad(mask_BKS, (0, 3)), scores_BK, use_cache=False, **settings
            ),
        ]
        for b in range(5):
            longest = int(mask_BKS[b].sum(dim=1).max())
            question = ids_BKS[b : b + 1, :, :longest], mask_BKS[b : b + 1, :, :longest], scores_BK[b : b + 1]
            alone = DECODE[variant](model, *question, **settings)[0]
            lengths.update(len(h.token_ids) for h in alone)
            for run in runs:
                assert [h.token_ids for h in run[b]] == [h.token_ids for h in alone]
                for batched, single in zip(run[b], alone, strict=True):
                    assert (batched.log_prob, batched.score) == pytest.approx((single.log_prob, single.score), abs=1e-9)
                    torch.testing.assert_close(batched.doc_log_posterior, single.doc_log_posterior, rtol=0, atol=1e-9)
            for h in alone:
                labels_1T = torch.tensor([h.token_ids + [rules.end] * h.ended])
                nll = rag_nll(model, *question, labels_1T, variant=variant)  # type: ignore[arg-type]
                assert h.log_prob == pytest.approx(-nll.item(), abs=1e-9)
    assert len(lengths) > 1, "questions should end at different steps"


@pytest.mark.parametrize("case", ["bart-forced", "mbart", "marian"])
def test_a_folder_without_generation_config_gives_the_tokens_that_its_config_has(case: str, tmp_path: Path) -> None:
    model, _, contexts = build(case, V=9, seed=5, B=3, K=2)
    model.save_pretrained(tmp_path)
    generation, config = tmp_path / "generation_config.json", tmp_path / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | json.loads(generation.read_text())))
    generation.unlink()
    loaded = type(model).from_pretrained(tmp_path, dtype=torch.float64).eval()
    for decode in DECODE.values():
        expected, actual = (decode(m, *contexts, num_beams=3, max_new_tokens=4) for m in (model, loaded))
        assert [h.token_ids for (h,) in actual] == [h.token_ids for (h,) in expected]
        assert [h.log_prob for (h,) in actual] == pytest.approx([h.log_prob for (h,) in expected], abs=1e-9)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("case", ["bart-forced", "mbart"])
def test_forced_first_and_last_token_leave_no_room_in_two_new_tokens(case: str, variant: str) -> None:
    model, _, contexts = build(case, V=7, seed=0, B=2, K=2)
    for (only,) in DECODE[variant](model, *contexts, num_beams=3, max_new_tokens=2, num_return_sequences=3):
        assert (only.token_ids, only.ended) == ([], True)
        assert only.log_prob < 0
    with pytest.raises(ConfigError, match="max_new_tokens is 1, which the generator's forced first token takes up"):
        DECODE[variant](model, *contexts, num_beams=3, max_new_tokens=1)


def test_an_end_token_that_only_the_models_config_forces_is_not_forced() -> None:
    # BartConfig declares forced_eos_token_id = 2; `generate` reads the generation config only.
    cut_off = 0
    for seed in range(4):
        model, contexts = tiny_bart(seed=seed), random_contexts(B=4, K=2, S=6, seed=seed)
        expected = decode_rag_token(model, *contexts, num_beams=2, max_new_tokens=3)
        model.config.forced_eos_token_id = 2
        actual = decode_rag_token(model, *contexts, num_beams=2, max_new_tokens=3)
        assert [h.token_ids for (h,) in actual] == [h.token_ids for (h,) in expected]
        cut_off += sum(not h.ended for (h,) in actual)
    assert cut_off > 0


@pytest.mark.parametrize("is_lm", [True, False])
def test_a_model_that_writes_no_text_is_refused_by_name(is_lm: bool) -> None:
    config = BertConfig(vocab_size=7, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32)
    model = BertLMHeadModel(config) if is_lm else BertModel(config)
    contexts = random_contexts(B=1, K=2, S=4, seed=0)
    message = rf"The generator \({type(model).__name__}\) is an encoder \(bert\): it reads text, but writes none"
    for variant, decode in DECODE.items():
        with pytest.raises(ConfigError, match=message):
            decode(model, *contexts, num_beams=2, max_new_tokens=3)
        with pytest.raises(ConfigError, match=message):
            rag_nll(model, *contexts, torch.tensor([[3, 2]]), variant=variant)  # type: ignore[arg-type]
