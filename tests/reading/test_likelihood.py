"""The likelihoods against the paper's formulas, evaluated with plain loops.

Legend: B questions, K passages per question, S context tokens, T answer tokens, V vocabulary.
"""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from rag_core.errors import ConfigError
from rag_core.generators import token_log_probs
from rag_core.reading.likelihood import rag_nll, rag_sequence_nll, rag_token_nll
from tests.support.models.tiny_models import FAMILIES, PAD, end_token, random_contexts, tiny_bart, tiny_model

NLL = {"sequence": rag_sequence_nll, "token": rag_token_nll}
VARIANTS = tuple(NLL)


def random_case(B: int = 3, K: int = 4, T: int = 5, V: int = 11, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    g = torch.Generator().manual_seed(seed)
    logits_BKTV = 3 * torch.randn(B, K, T, V, generator=g, dtype=torch.float64)
    doc_scores_BK = 2 * torch.randn(B, K, generator=g, dtype=torch.float64)
    return logits_BKTV, doc_scores_BK, torch.randint(0, V, (B, T), generator=g)


def paper_nll(logits_BKTV: Tensor, doc_scores_BK: Tensor, labels_BT: Tensor, variant: str) -> list[float]:
    """Section 2.1 in probabilities, one Python float at a time; labels of -100 are skipped."""

    def softmax(row: list[float]) -> list[float]:
        top = max(row)
        weights = [math.exp(x - top) for x in row]
        return [w / math.fsum(weights) for w in weights]

    result = []
    for logits_KTV, scores, labels in zip(
        logits_BKTV.tolist(), doc_scores_BK.tolist(), labels_BT.tolist(), strict=True
    ):
        p_docs = softmax(scores)
        p_KT = [
            [softmax(row)[label] for row, label in zip(logits_TV, labels, strict=True) if label != -100]
            for logits_TV in logits_KTV
        ]
        if variant == "sequence":
            p = math.fsum(p_doc * math.prod(p_T) for p_doc, p_T in zip(p_docs, p_KT, strict=True))
        else:
            p = math.prod(
                math.fsum(p_doc * p_T[t] for p_doc, p_T in zip(p_docs, p_KT, strict=True)) for t in range(len(p_KT[0]))
            )
        result.append(-math.log(p))
    return result


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("seed", range(5))
def test_loss_equals_the_papers_formula(variant: str, seed: int) -> None:
    logits_BKTV, doc_scores_BK, labels_BT = random_case(seed=seed)
    expected = torch.tensor(paper_nll(logits_BKTV, doc_scores_BK, labels_BT, variant), dtype=torch.float64)
    actual = NLL[variant](logits_BKTV, doc_scores_BK, labels_BT)
    assert actual.dtype == torch.float64
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-10)
    single = NLL[variant](logits_BKTV.float(), doc_scores_BK.float(), labels_BT)
    assert single.dtype == torch.float32
    torch.testing.assert_close(single.double(), expected, rtol=1e-5, atol=0)


@pytest.mark.parametrize("variant", VARIANTS)
def test_loss_is_float64_if_an_input_is_and_float32_otherwise(variant: str) -> None:
    logits_BKTV, doc_scores_BK, labels_BT = random_case()
    assert NLL[variant](logits_BKTV.float(), doc_scores_BK, labels_BT).dtype == torch.float64
    assert NLL[variant](logits_BKTV, doc_scores_BK.half(), labels_BT).dtype == torch.float64
    assert NLL[variant](logits_BKTV.bfloat16(), doc_scores_BK.half(), labels_BT).dtype == torch.float32


@pytest.mark.parametrize("variant", VARIANTS)
def test_result_and_gradient_do_not_depend_on_the_chunks(variant: str, monkeypatch: pytest.MonkeyPatch) -> None:
    logits_BKTV, doc_scores_BK, labels_BT = random_case()

    def loss_and_gradient() -> tuple[Tensor, Tensor]:
        leaf = logits_BKTV.clone().requires_grad_()
        loss_B = NLL[variant](leaf, doc_scores_BK, labels_BT)
        loss_B.sum().backward()
        assert leaf.grad is not None
        return loss_B.detach(), leaf.grad

    whole = loss_and_gradient()
    monkeypatch.setattr(token_log_probs, "_CHUNK_ELEMENTS", 7 * logits_BKTV.shape[-1])
    torch.testing.assert_close(loss_and_gradient(), whole, rtol=0, atol=1e-12)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize(("K", "T"), [(3, 3), (1, 3), (3, 1), (1, 1)])
@pytest.mark.parametrize("special", ["nothing", "ignored", "absent"])
def test_gradients_equal_finite_differences(special: str, K: int, T: int, variant: str) -> None:
    logits_BKTV, doc_scores_BK, labels_BT = random_case(B=2, K=K, T=T, V=5)
    if special == "ignored":
        labels_BT[0] = labels_BT[1, T // 2] = -100
    if special == "absent":
        doc_scores_BK[0, 1:] = doc_scores_BK[1, : K - 1] = float("-inf")
    logits_BKTV.requires_grad_()
    doc_scores_BK.requires_grad_()
    assert torch.autograd.gradcheck(lambda x, s: NLL[variant](x, s, labels_BT), (logits_BKTV, doc_scores_BK))


def test_one_passage_makes_both_variants_the_plain_likelihood() -> None:
    logits_BKTV, doc_scores_BK, labels_BT = random_case(K=1)
    plain_B = torch.nn.functional.cross_entropy(
        logits_BKTV[:, 0].transpose(1, 2), labels_BT, reduction="none", ignore_index=-100
    ).sum(dim=1)
    for nll in NLL.values():
        torch.testing.assert_close(nll(logits_BKTV, doc_scores_BK, labels_BT), plain_B, rtol=0, atol=1e-12)


def test_both_variants_agree_on_one_token_answers_and_differ_on_longer_ones() -> None:
    one, longer = random_case(T=1), random_case(T=3)
    torch.testing.assert_close(rag_sequence_nll(*one), rag_token_nll(*one), rtol=0, atol=1e-12)
    assert (rag_sequence_nll(*longer) - rag_token_nll(*longer)).abs().min() > 1e-3


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_huge_logits_and_one_sure_passage_keep_loss_and_gradients_finite(variant: str, dtype: torch.dtype) -> None:
    logits_BKTV, _, labels_BT = random_case()
    logits_BKTV = (1e4 * logits_BKTV.sign()).to(dtype).requires_grad_()
    doc_scores_BK = torch.tensor([[1e4, -1e4, -1e4, -1e4], [0.0, 1e3, -1e3, 5.0], [-1e4] * 4]).requires_grad_()
    loss_B = NLL[variant](logits_BKTV, doc_scores_BK, labels_BT)
    loss_B.sum().backward()
    assert loss_B.isfinite().all()
    for leaf in (logits_BKTV, doc_scores_BK):
        assert leaf.grad is not None
        assert leaf.grad.isfinite().all()


@pytest.mark.parametrize("variant", VARIANTS)
def test_ignored_labels_add_nothing_wherever_they_are(variant: str) -> None:
    logits_BKTV, doc_scores_BK, labels_BT = random_case()
    labels_BT[0, 0] = labels_BT[0, 2] = labels_BT[1, 4] = -100
    labels_BT[2] = -100
    actual_B = NLL[variant](logits_BKTV, doc_scores_BK, labels_BT)
    expected = torch.tensor(paper_nll(logits_BKTV, doc_scores_BK, labels_BT, variant), dtype=torch.float64)
    torch.testing.assert_close(actual_B, expected, rtol=0, atol=1e-10)
    other_B = NLL[variant](logits_BKTV, doc_scores_BK, labels_BT.masked_fill(labels_BT == -100, 999), ignore_index=999)
    assert torch.equal(other_B, actual_B)
    logits_BKTV.requires_grad_()
    NLL[variant](logits_BKTV, doc_scores_BK, labels_BT).sum().backward()
    assert logits_BKTV.grad is not None
    assert logits_BKTV.grad.transpose(1, 2)[labels_BT == -100].abs().max() == 0


@pytest.mark.parametrize("variant", VARIANTS)
def test_absent_passage_counts_as_probability_zero(variant: str) -> None:
    logits_BKTV, doc_scores_BK, labels_BT = random_case()
    without_B = NLL[variant](logits_BKTV[:, 1:], doc_scores_BK[:, 1:], labels_BT)
    doc_scores_BK[:, 0] = float("-inf")
    doc_scores_BK.requires_grad_()
    actual_B = NLL[variant](logits_BKTV, doc_scores_BK, labels_BT)
    torch.testing.assert_close(actual_B.detach(), without_B, rtol=0, atol=1e-12)
    actual_B.sum().backward()
    assert doc_scores_BK.grad is not None
    assert doc_scores_BK.grad.isfinite().all()


@pytest.mark.parametrize("variant", VARIANTS)
def test_half_precision_logits_are_accumulated_in_float32(variant: str) -> None:
    logits_BKTV, doc_scores_BK, labels_BT = random_case(T=8, V=5000)
    half_BKTV = logits_BKTV.bfloat16().requires_grad_()
    actual_B = NLL[variant](half_BKTV, doc_scores_BK.bfloat16(), labels_BT)
    assert actual_B.dtype == torch.float32
    exact_BKTV = half_BKTV.detach().double().requires_grad_()
    exact_B = NLL[variant](exact_BKTV, doc_scores_BK.bfloat16().double(), labels_BT)
    torch.testing.assert_close(actual_B.double(), exact_B, rtol=1e-6, atol=0)
    actual_B.sum().backward()
    exact_B.sum().backward()
    assert half_BKTV.grad is not None
    assert half_BKTV.grad.dtype == torch.bfloat16
    # Half a unit in the last place of bfloat16 is 2**-9: rounded once, at the end.
    torch.testing.assert_close(half_BKTV.grad.double(), exact_BKTV.grad, rtol=2**-8, atol=1e-30)


def separate_passes(model: Any, contexts: tuple[Tensor, Tensor, Tensor], labels: list[list[int]]) -> list[list[Tensor]]:
    """Logits (T, V) of each question under each of its passages, one unpadded forward pass per pair."""
    input_ids_BKS, attention_mask_BKS, _ = contexts
    start = model.config.decoder_start_token_id
    return [
        [
            model(
                input_ids=input_ids_BKS[b, k][attention_mask_BKS[b, k] == 1].unsqueeze(0),
                decoder_input_ids=torch.tensor([[start, *labels[b][:-1]]]),
            ).logits[0]
            for k in range(input_ids_BKS.shape[1])
        ]
        for b in range(len(labels))
    ]


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("family", FAMILIES)
def test_rag_nll_equals_separate_unpadded_passes(family: str, variant: str) -> None:
    model = tiny_model(family)
    contexts = random_contexts(B=3, K=2, S=7, seed=1)
    end = end_token(model)
    labels = [[3, 5, 4, end], [end], [6, end]]
    labels_BT = torch.tensor([row + [-100] * (4 - len(row)) for row in labels])
    actual_B = rag_nll(model, *contexts, labels_BT, variant=variant)  # type: ignore[arg-type]
    logits = separate_passes(model, contexts, labels)
    for b, row in enumerate(labels):
        expected = paper_nll(torch.stack(logits[b])[None], contexts[2][b : b + 1], torch.tensor([row]), variant)
        assert actual_B[b].item() == pytest.approx(expected[0], abs=1e-10)


@pytest.mark.parametrize("variant", VARIANTS)
def test_ignored_labels_inside_an_answer_are_read_as_padding_and_not_scored(variant: str) -> None:
    model = tiny_bart()
    contexts = random_contexts(B=1, K=2, S=6, seed=3)
    actual_B = rag_nll(model, *contexts, torch.tensor([[3, -100, 4, 2]]), variant=variant)  # type: ignore[arg-type]
    logits = torch.stack(separate_passes(model, contexts, [[3, PAD, 4, 2]])[0])[None]
    expected = paper_nll(logits, contexts[2], torch.tensor([[3, -100, 4, 2]]), variant)
    assert actual_B.item() == pytest.approx(expected[0], abs=1e-10)


@pytest.mark.parametrize("variant", VARIANTS)
def test_rag_nll_trains_generator_and_document_scores(variant: str) -> None:
    model = tiny_bart()
    input_ids_BKS, attention_mask_BKS, doc_scores_BK = random_contexts(B=2, K=3, S=5, seed=2)
    doc_scores_BK.requires_grad_()
    labels_BT = torch.tensor([[3, 2, -100], [4, 5, 2]])
    rag_nll(model, input_ids_BKS, attention_mask_BKS, doc_scores_BK, labels_BT, variant=variant).sum().backward()  # type: ignore[arg-type]
    assert doc_scores_BK.grad is not None
    # A softmax's scores can be shifted together without any effect.
    torch.testing.assert_close(doc_scores_BK.grad.sum(dim=1), torch.zeros(2, dtype=torch.float64))
    assert doc_scores_BK.grad.abs().max() > 1e-4
    assert model.model.encoder.layers[0].fc1.weight.grad.abs().max() > 0


def test_unknown_variant_is_refused_with_both_names() -> None:
    contexts = random_contexts(B=1, K=1, S=4, seed=0)
    with pytest.raises(ConfigError, match=r'"sequence" or "token"'):
        rag_nll(tiny_bart(), *contexts, torch.tensor([[2]]), variant="tokens")  # type: ignore[arg-type]


def test_a_model_that_only_reads_is_refused() -> None:
    contexts = random_contexts(B=1, K=1, S=4, seed=0)
    with pytest.raises(ConfigError, match=r"generator \(BertModel\) is an encoder"):
        rag_nll(tiny_model("bert2bert").encoder, *contexts, torch.tensor([[2]]), variant="token")


@pytest.mark.parametrize("nll", NLL.values())
def test_wrong_shapes_are_named(nll: Any) -> None:
    logits_BKTV, doc_scores_BK, labels_BT = random_case()
    with pytest.raises(ValueError, match=r"\(3, 4, 5, 11\), \(4, 3\), \(3, 5\)"):
        nll(logits_BKTV, doc_scores_BK.T, labels_BT)
    with pytest.raises(ValueError, match=r"labels \(B, T\).*\(3, 4\)$"):
        nll(logits_BKTV, doc_scores_BK, labels_BT[:, :-1])
    contexts = random_contexts(B=2, K=2, S=4, seed=0)
    with pytest.raises(ValueError, match=r"labels must have the shape \(B=2, T\); found \(3, 5\)"):
        rag_nll(tiny_bart(), *contexts, labels_BT, variant="token")
    with pytest.raises(ValueError, match=r"doc_scores the shape \(B, K\)"):
        rag_nll(tiny_bart(), contexts[0], contexts[1][:, :, 1:], contexts[2], labels_BT, variant="token")
