"""Losses and gradients against the paper's formulas in plain Python floats, on chosen and on random cases.

With p(z) = softmax(s)_z and r_z the posterior of passage z, the derivatives of the negative log-likelihoods are

    RAG-Sequence    ∂/∂x_ztv = r_z  (p_zt(v) − [v = a_t])      ∂/∂s_z = p(z) − r_z
    RAG-Token       ∂/∂x_ztv = r_zt (p_zt(v) − [v = a_t])      ∂/∂s_z = Σ_t (p(z) − r_zt)

where r_z = p(z|q,a) ∝ p(z) Π_t p_zt(a_t) and r_zt ∝ p(z) p_zt(a_t). Both are one formula over units: the whole answer
is one unit of RAG-Sequence, each of its tokens is one of RAG-Token.

Legend: B questions, K passages per question, T answer tokens, V vocabulary, U units.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from rag_core.generators.token_log_probs import token_log_probs
from rag_core.reading.likelihood import rag_sequence_nll, rag_token_nll

NLL = {"sequence": rag_sequence_nll, "token": rag_token_nll}
VARIANTS = tuple(NLL)
DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
ABSENT = float("-inf")
# The same examples in every run, and no time limit for one of them: machines are noisy.
PROPERTY = settings(max_examples=40)


class Case(NamedTuple):
    logits_BKTV: Tensor
    doc_scores_BK: Tensor
    labels_BT: Tensor


class Outcome(NamedTuple):
    nll_B: Tensor
    logits_grad_BKTV: Tensor
    scores_grad_BK: Tensor


def outcome(case: Case, variant: str, ignore_index: int = -100) -> Outcome:
    """The project's loss and the gradients of its sum."""
    logits_BKTV = case.logits_BKTV.clone().requires_grad_()
    doc_scores_BK = case.doc_scores_BK.clone().requires_grad_()
    nll_B = NLL[variant](logits_BKTV, doc_scores_BK, case.labels_BT, ignore_index=ignore_index)
    nll_B.sum().backward()
    assert logits_BKTV.grad is not None
    assert doc_scores_BK.grad is not None
    return Outcome(nll_B.detach(), logits_BKTV.grad, doc_scores_BK.grad)


def log_softmax(row: list[float]) -> list[float]:
    top = max(row)
    log_total = math.log(math.fsum(math.exp(x - top) for x in row))
    return [x - top - log_total for x in row]


def paper(case: Case, variant: str, ignore_index: int = -100) -> tuple[Outcome, Tensor]:
    """Loss and gradients by the formulas above, and for each document score Σ_u p(z) + r_zu: its gradient is the
    difference of these two terms."""
    nll_B, logits_grad_BKTV, scores_grad_BK, terms_BK = [], [], [], []
    for logits_KTV, scores, labels in zip(*(tensor.tolist() for tensor in case), strict=True):
        T, V = len(labels), len(logits_KTV[0][0])
        kept = [t for t in range(T) if labels[t] != ignore_index]
        units = [kept] if variant == "sequence" else [[t] for t in kept]
        log_docs = log_softmax(scores)
        log_p_KTV = [[log_softmax(row) for row in logits_TV] for logits_TV in logits_KTV]
        nll, terms = [], [[0.0] for _ in scores]
        grad_KTV = [[[0.0] * V for _ in range(T)] for _ in scores]
        scores_grad: list[list[float]] = [[0.0] for _ in scores]
        for unit in units:
            joint = [
                log_doc + math.fsum(log_p_TV[t][labels[t]] for t in unit)
                for log_doc, log_p_TV in zip(log_docs, log_p_KTV, strict=True)
            ]
            nll.append(-max(joint) - math.log(math.fsum(math.exp(x - max(joint)) for x in joint)))
            for k, log_posterior in enumerate(log_softmax(joint)):
                prior, posterior = math.exp(log_docs[k]), math.exp(log_posterior)
                scores_grad[k].append(prior - posterior)
                terms[k].append(prior + posterior)
                for t in unit:
                    p = [math.exp(x) for x in log_p_KTV[k][t]]
                    # 1 − p(label) as the sum of the others, which keeps its digits where p(label) is nearly one.
                    p[labels[t]] = -math.fsum(p[: labels[t]] + p[labels[t] + 1 :])
                    grad_KTV[k][t] = [posterior * x for x in p]
        nll_B.append(math.fsum(nll))
        logits_grad_BKTV.append(grad_KTV)
        scores_grad_BK.append([math.fsum(x) for x in scores_grad])
        terms_BK.append([math.fsum(x) for x in terms])
    exact, grads, scores_grads, sizes = (
        torch.tensor(x, dtype=torch.float64) for x in (nll_B, logits_grad_BKTV, scores_grad_BK, terms_BK)
    )
    return Outcome(exact, grads, scores_grads), sizes


def assert_equals_the_paper(case: Case, variant: str, ignore_index: int = -100) -> None:
    """float64 to 1e-10; float32 to a relative 1e-5, element by element; half precision likewise, and its gradients
    rounded once to their own type. A document score's gradient is a difference: its error is relative to both terms."""
    actual = outcome(case, variant, ignore_index)
    expected, terms_BK = paper(case, variant, ignore_index)
    dtype = case.logits_BKTV.dtype
    assert actual.logits_grad_BKTV.dtype == actual.scores_grad_BK.dtype == dtype
    if dtype == torch.float64:
        torch.testing.assert_close(actual, expected, rtol=0, atol=1e-10)
        return
    assert actual.nll_B.dtype == torch.float32
    torch.testing.assert_close(actual.nll_B.double(), expected.nll_B, rtol=1e-5, atol=1e-14)
    rounding = 0.0 if dtype == torch.float32 else torch.finfo(dtype).eps / 2
    smallest = {torch.float16: 2.0**-25}.get(dtype, 1e-36)
    torch.testing.assert_close(
        actual.logits_grad_BKTV.double(), expected.logits_grad_BKTV, rtol=1e-5 + rounding, atol=smallest
    )
    error_BK = (actual.scores_grad_BK.double() - expected.scores_grad_BK).abs()
    assert (error_BK <= 1e-5 * terms_BK + rounding * expected.scores_grad_BK.abs() + smallest).all()


def normal_case(B: int = 3, K: int = 4, T: int = 5, V: int = 11, seed: int = 0) -> Case:
    g = torch.Generator().manual_seed(seed)
    logits_BKTV = 3 * torch.randn(B, K, T, V, generator=g, dtype=torch.float64)
    doc_scores_BK = 2 * torch.randn(B, K, generator=g, dtype=torch.float64)
    return Case(logits_BKTV, doc_scores_BK, torch.randint(0, V, (B, T), generator=g))


def padded_answers(T: int) -> Case:
    """Answers of one token, of half the maximum and of the maximum."""
    case = normal_case(T=T)
    for labels_T, length in zip(case.labels_BT, (1, (T + 1) // 2, T), strict=True):
        labels_T[length:] = -100
    return case


def ignored_anywhere() -> Case:
    case = normal_case()
    case.labels_BT[0, 0] = case.labels_BT[0, 3] = case.labels_BT[1, 4] = -100
    case.labels_BT[2] = -100
    return case


def absent_passages() -> Case:
    case = normal_case()
    case.doc_scores_BK[0, 1] = case.doc_scores_BK[1, 0] = ABSENT
    case.doc_scores_BK[2, 1:] = ABSENT
    return case


def sure_passage() -> Case:
    scores_BK = torch.tensor([[1e4, -1e4, -1e4, -1e4], [0.0, 1e3, -1e3, 5.0], [-1e4] * 4], dtype=torch.float64)
    return normal_case()._replace(doc_scores_BK=scores_BK)


def huge_logits() -> Case:
    """Every logit 1e4 or −1e4: many tokens tie, and passages differ by multiples of 2e4 nats and by some logarithms."""
    case = normal_case(V=6)
    return case._replace(logits_BKTV=1e4 * case.logits_BKTV.sign())


def sure_tokens() -> Case:
    """Labels 5 to 60 nats above the rest: the loss and the label's gradient are tiny, and 1 − p loses all digits."""
    case = normal_case(seed=1)
    labels_BKT1 = case.labels_BT[:, None, :, None].expand(-1, 4, -1, -1)
    lead = torch.linspace(10, 60, 60, dtype=torch.float64).view(3, 4, 5, 1)
    return case._replace(logits_BKTV=case.logits_BKTV.scatter_add(3, labels_BKT1, lead))


CASES: dict[str, Callable[[], Case]] = {
    "normal": normal_case,
    "one passage": lambda: normal_case(K=1),
    "one token": lambda: normal_case(T=1),
    "padded to 2": lambda: padded_answers(2),
    "padded to 64": lambda: padded_answers(64),
    "ignored anywhere": ignored_anywhere,
    "absent passages": absent_passages,
    "sure passage": sure_passage,
    "logits of ±1e4": huge_logits,
    "sure tokens": sure_tokens,
}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("name", CASES)
def test_loss_and_gradients_equal_the_papers_formulas(name: str, variant: str, dtype: torch.dtype) -> None:
    logits_BKTV, doc_scores_BK, labels_BT = CASES[name]()
    assert_equals_the_paper(Case(logits_BKTV.to(dtype), doc_scores_BK.to(dtype), labels_BT), variant)


def numbers(dtype: torch.dtype, largest: float) -> list[st.SearchStrategy[float]]:
    """Kinds of finite numbers up to `largest`: extremes only, ordinary numbers, any."""
    ends = st.sampled_from([largest, -largest])
    few = st.sampled_from([0.0, 1.0, torch.finfo(dtype).tiny, 1e4, -1e4])
    return [ends, st.floats(-20, 20), st.one_of(st.floats(-largest, largest), few, ends)]


@st.composite
def cases(
    draw: Any, dtype: torch.dtype, largest: float, K: int | None = None, T: int | None = None
) -> tuple[Case, int]:
    """A case of any shape, with any passages but one absent and any positions ignored; and its `ignore_index`."""
    B, K, T, V = (
        draw(st.integers(1, 2)),
        K or draw(st.integers(1, 3)),
        T or draw(st.integers(1, 3)),
        draw(st.integers(1, 4)),
    )
    ignore_index = draw(st.sampled_from([-100, 0, V]))

    def tensor(elements: st.SearchStrategy[Any], *shape: int, dtype: torch.dtype) -> Tensor:
        n = math.prod(shape)
        wide = torch.int64 if dtype == torch.int64 else torch.float64
        return torch.tensor(draw(st.lists(elements, min_size=n, max_size=n)), dtype=wide).to(dtype).view(shape)

    # One kind per case: with a free mixture, all passages would hardly ever be extreme at once.
    logits, scores = (draw(st.sampled_from(numbers(dtype, largest))) for _ in range(2))
    scores_BK = tensor(scores, B, K, dtype=dtype)
    absent_BK = tensor(st.booleans(), B, K, dtype=torch.int64) == 1
    absent_BK[torch.arange(B), tensor(st.integers(0, K - 1), B, dtype=torch.int64)] = False
    labels = st.one_of(st.just(ignore_index), st.integers(0, V - 1))
    case = Case(
        tensor(logits, B, K, T, V, dtype=dtype),
        scores_BK.masked_fill(absent_BK, ABSENT),
        tensor(labels, B, T, dtype=torch.int64),
    )
    return case, ignore_index


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("variant", VARIANTS)
@PROPERTY
@given(data=st.data())
def test_no_finite_input_gives_an_infinite_loss_or_gradient(
    variant: str, dtype: torch.dtype, data: st.DataObject
) -> None:
    case, ignore_index = data.draw(cases(dtype, torch.finfo(dtype).max))
    actual = outcome(case, variant, ignore_index)
    T = case.labels_BT.shape[1]
    assert actual.nll_B.isfinite().all()
    assert actual.nll_B.min() >= -1e-12
    # A comparison with NaN is false.
    assert (actual.logits_grad_BKTV.abs() <= 1).all()
    assert (actual.scores_grad_BK.abs() <= T).all()
    assert (actual.scores_grad_BK[case.doc_scores_BK == ABSENT] == 0).all()
    assert (actual.logits_grad_BKTV.transpose(1, 2)[case.labels_BT == ignore_index] == 0).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("variant", VARIANTS)
@PROPERTY
@given(data=st.data())
def test_drawn_losses_and_gradients_equal_the_papers_formulas(
    variant: str, dtype: torch.dtype, data: st.DataObject
) -> None:
    case, ignore_index = data.draw(cases(dtype, 1e4))
    assert_equals_the_paper(case, variant, ignore_index)


@pytest.mark.parametrize("sizes", [{"K": 1}, {"T": 1}], ids=["one passage", "one token"])
@PROPERTY
@given(data=st.data())
def test_both_variants_agree_on_one_passage_and_on_one_token(sizes: dict[str, int], data: st.DataObject) -> None:
    case, ignore_index = data.draw(cases(torch.float64, torch.finfo(torch.float64).max, **sizes))
    sequence, token = (outcome(case, variant, ignore_index) for variant in VARIANTS)
    torch.testing.assert_close(sequence, token, rtol=1e-12, atol=1e-12)
    if "K" in sizes:
        assert (sequence.scores_grad_BK == 0).all()
        assert (token.scores_grad_BK == 0).all()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("variant", VARIANTS)
def test_only_impossible_tokens_count_ten_to_the_thirty(variant: str, dtype: torch.dtype) -> None:
    top = torch.finfo(dtype).max
    labels_BT, score_11 = torch.tensor([[0, 1]]), torch.zeros(1, 1, dtype=dtype)
    beyond = outcome(Case(torch.tensor([[[[top, -top], [top, -top]]]], dtype=dtype), score_11, labels_BT), variant)
    assert beyond.nll_B.item() == pytest.approx(1e30)
    within = outcome(Case(torch.tensor([[[[0.0, 0.0], [1e29, -1e29]]]], dtype=dtype), score_11, labels_BT), variant)
    assert within.nll_B.item() == pytest.approx(2e29)
    assert within.logits_grad_BKTV.flatten().tolist() == [-0.5, 0.5, 1.0, -1.0]


def test_token_log_probs_keep_minus_infinity_for_tokens_that_a_decoder_forbids() -> None:
    logits_TV = torch.tensor([[0.0, ABSENT, 0.0], [ABSENT, 1.0, ABSENT]])
    found_T = token_log_probs(logits_TV, torch.tensor([1, 1]))
    assert found_T.tolist() == [ABSENT, 0.0]
