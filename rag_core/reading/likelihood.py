"""The likelihood of an answer under RAG-Sequence and RAG-Token, and the one place where passages are marginalised.

Lewis et al. 2020 (arXiv 2005.11401), section 2.1, with p(z|q) = softmax of the retriever's scores over the K
passages of a question:

    RAG-Sequence    p(a|q) = Σ_z p(z|q) Π_t p(a_t | q, z, a_<t)
    RAG-Token       p(a|q) = Π_t Σ_z p(z|q) p(a_t | q, z, a_<t)

The document's probability enters once per answer (Sequence) or once per token (Token), whatever the first token is.

The logits are the largest tensor of a training step. Their log-softmax is never stored, neither forwards nor for the
gradient; the price is that second derivatives are not defined. Log-probabilities of tokens are float64, as they are V
times fewer: in float32, a long answer's log-probability of −1000 would separate passages only to the fourth digit. The
price is that the device must have float64.

This module knows nothing about retrieval, tokenisers, optimisers or devices.

Legend: B questions, K passages per question, N contexts (B·K), S context tokens, T answer tokens, M labels,
V vocabulary.
"""

from __future__ import annotations

from typing import Any, Literal, get_args

import torch
from torch import Tensor

from rag_core.errors import ConfigError
from rag_core.generators.kinds import as_generator
from rag_core.generators.limits import refuse_long_answers
from rag_core.generators.token_log_probs import IGNORE_INDEX, at_least_float32, token_log_probs

Variant = Literal["sequence", "token"]

# Lower bound of a token's log-probability in a loss, in nats. Without it, logits near the end of their type's range
# give −inf, and a gradient of NaN. Sums of this bound stay finite in float32; logits within ±10²⁹ do not reach it.
_FLOOR = -1e30


def rag_sequence_nll(
    logits_BKTV: Tensor, doc_scores_BK: Tensor, labels_BT: Tensor, *, ignore_index: int = IGNORE_INDEX
) -> Tensor:
    """−log p(a|q) of RAG-Sequence.

    Args:
        logits_BKTV: the generator's logits for every (question, passage) pair, floating point. Half precision is
            accumulated in float32; float64 stays float64.
        doc_scores_BK: the retriever's scores before the softmax, floating point. −inf marks an absent passage; each
            question has at least one passage.
        labels_BT: int64 token ids of the answer, end token included, no start token.
        ignore_index: label of ignored positions; they may be anywhere.

    Returns:
        nll_B in nats, summed over tokens, float32 (float64 if an input is float64). Loss and gradients are finite for
        all finite inputs; a token less probable than e^−10³⁰ counts as e^−10³⁰ and gives no gradient.

    Raises:
        ValueError: the shapes do not fit each other.

    Source: Lewis et al. 2020, section 2.1, "RAG-Sequence Model".
    """
    return _nll(logits_BKTV, doc_scores_BK, labels_BT, variant="sequence", ignore_index=ignore_index)


def rag_token_nll(
    logits_BKTV: Tensor, doc_scores_BK: Tensor, labels_BT: Tensor, *, ignore_index: int = IGNORE_INDEX
) -> Tensor:
    """−log p(a|q) of RAG-Token. Arguments, result and errors as in `rag_sequence_nll`.

    Source: Lewis et al. 2020, section 2.1, "RAG-Token Model".
    """
    return _nll(logits_BKTV, doc_scores_BK, labels_BT, variant="token", ignore_index=ignore_index)


def rag_nll(
    generator: Any,
    input_ids_BKS: Tensor,
    attention_mask_BKS: Tensor,
    doc_scores_BK: Tensor,
    labels_BT: Tensor,
    *,
    variant: Variant,
) -> Tensor:
    """−log p(a|q) of answers, with one forward pass of the generator over all (question, passage) pairs.

    Contexts are read in groups of similar length. Logits are computed only at positions that have a label.

    Args:
        generator: a transformers encoder-decoder model or causal language model. An encoder-decoder's decoder reads
            the generator's prompt (the start token, and a forced first token if its generation config has one) and the
            labels; see `GenerationTokens`. A causal language model reads the labels behind the context.
        input_ids_BKS: int64 token ids of the contexts (question and passage), padded on either side.
        attention_mask_BKS: 1 for real tokens, 0 for padding; at least one real token in each context.
        doc_scores_BK: the retriever's scores before the softmax. −inf marks an absent passage.
        labels_BT: int64 token ids of the answers, end token included, no start token, padded with −100.
        variant: "sequence" or "token".

    Returns:
        nll_B in nats, summed over tokens, float32 (float64 for a float64 generator).

    Raises:
        ConfigError: the variant is unknown, the generator writes no text, or contexts or answers are longer than its
            positions.
        ValueError: the shapes do not fit each other.

    Source: Lewis et al. 2020, section 2.1.
    """
    _check_variant(variant)
    read = as_generator(generator)
    check_contexts(input_ids_BKS, attention_mask_BKS, doc_scores_BK)
    B, K = doc_scores_BK.shape
    if labels_BT.dim() != 2 or labels_BT.shape[0] != B:
        raise ValueError(f"labels must have the shape (B={B}, T); found {tuple(labels_BT.shape)}")
    refuse_long_answers(read, labels_BT.shape[1])
    labels_NT = labels_BT.repeat_interleave(K, dim=0)
    log_probs_NT, logits_dtype = read.answer_log_probs(
        input_ids_BKS.flatten(0, 1), attention_mask_BKS.flatten(0, 1), labels_NT
    )
    log_probs_BKT = log_probs_NT.unflatten(0, (B, K))
    return _marginal_nll(log_probs_BKT, doc_scores_BK, labels_BT == IGNORE_INDEX, variant, logits_dtype)


def doc_log_probs(doc_scores_BK: Tensor) -> Tensor:
    """log p(z|q) of shape (B, K): log-softmax of the retriever's scores, in float32 at least."""
    return torch.log_softmax(at_least_float32(doc_scores_BK), dim=1)


def marginalize(log_probs_BK: Tensor, log_weights_BK: Tensor) -> Tensor:
    """log Σ_z p(z|q) p(·|q,z): sum over the passages, dimension 1.

    Args:
        log_probs_BK: log p(·|q,z), shape (B, K, ...), −inf allowed: an answer (B, K), its tokens (B, K, T), or next
            tokens (B, K, H, V).
        log_weights_BK: log p(z|q), −inf for an absent passage; shape (B, K), or (B, K, H) if each hypothesis has its
            own weights.

    Returns:
        log p(·|q), shape (B, ...).
    """
    missing = log_probs_BK.dim() - log_weights_BK.dim()
    joint_BK = log_probs_BK + log_weights_BK.reshape(log_weights_BK.shape + (1,) * missing)
    # With one passage there is nothing to sum. This saves RAG-Sequence's beam search four passes over the vocabulary.
    return joint_BK.squeeze(1) if joint_BK.shape[1] == 1 else joint_BK.logsumexp(dim=1)


def check_contexts(input_ids_BKS: Tensor, attention_mask_BKS: Tensor, doc_scores_BK: Tensor) -> None:
    """Raise `ValueError` unless contexts, mask and document scores have shapes (B, K, S), (B, K, S), (B, K)."""
    if (
        input_ids_BKS.dim() != 3
        or attention_mask_BKS.shape != input_ids_BKS.shape
        or doc_scores_BK.shape != input_ids_BKS.shape[:2]
        or 0 in input_ids_BKS.shape
    ):
        raise ValueError(
            "input_ids and attention_mask must have one shape (B, K, S) and doc_scores the shape (B, K), none empty; "
            f"found {tuple(input_ids_BKS.shape)}, {tuple(attention_mask_BKS.shape)}, {tuple(doc_scores_BK.shape)}"
        )


def _check_variant(variant: str) -> None:
    if variant not in get_args(Variant):
        raise ConfigError(f'Unknown RAG variant {variant!r}: expected "sequence" or "token".')


def _nll(
    logits_BKTV: Tensor, doc_scores_BK: Tensor, labels_BT: Tensor, *, variant: Variant, ignore_index: int
) -> Tensor:
    if (
        logits_BKTV.dim() != 4
        or 0 in logits_BKTV.shape
        or doc_scores_BK.shape != logits_BKTV.shape[:2]
        or labels_BT.shape != (logits_BKTV.shape[0], logits_BKTV.shape[2])
    ):
        raise ValueError(
            "logits must have the shape (B, K, T, V), doc_scores (B, K) and labels (B, T), none of them empty; "
            f"found {tuple(logits_BKTV.shape)}, {tuple(doc_scores_BK.shape)}, {tuple(labels_BT.shape)}"
        )
    ignored_BT = labels_BT == ignore_index
    # Ignored positions look up token 0, which always exists; the result is masked.
    labels_BKT = labels_BT.masked_fill(ignored_BT, 0).unsqueeze(1).expand(logits_BKTV.shape[:3])
    log_probs_BKT = token_log_probs(logits_BKTV, labels_BKT)
    return _marginal_nll(log_probs_BKT, doc_scores_BK, ignored_BT, variant, logits_BKTV.dtype)


def _marginal_nll(
    log_probs_BKT: Tensor, doc_scores_BK: Tensor, ignored_BT: Tensor, variant: Variant, logits_dtype: torch.dtype
) -> Tensor:
    """−log p(a|q) of shape (B,) from log p(a_t | q, z, a_<t); ignored positions add nothing."""
    log_probs_BKT = log_probs_BKT.clamp(min=_FLOOR)
    log_docs_BK = doc_log_probs(doc_scores_BK.double())
    if variant == "sequence":
        answer_BK = log_probs_BKT.masked_fill(ignored_BT.unsqueeze(1), 0.0).sum(dim=2)
        log_likelihood_B = marginalize(answer_BK, log_docs_BK)
    else:
        # Masked after the marginalisation: an ignored token must count 0 exactly, not log Σ_z p(z|q) up to rounding.
        log_likelihood_B = marginalize(log_probs_BKT, log_docs_BK).masked_fill(ignored_BT, 0.0).sum(dim=1)
    inputs_dtype = torch.promote_types(logits_dtype, doc_scores_BK.dtype)
    return -log_likelihood_B.to(torch.promote_types(inputs_dtype, torch.float32))
