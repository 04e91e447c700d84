"""Beam search over (questions, passages): the one search under both RAG decoders.

Every hypothesis is continued with all K passages of its question, and the next-token distributions are averaged with
weights p(z|q). With K passages that is RAG-Token; RAG-Sequence calls it with every (question, passage) pair as a
question of its own, K = 1.

The rules are those of `transformers` (generation/utils.py, `_beam_search`): of the best 2·H continuations, ended ones
join the pool of finished hypotheses if they are among the best H, the others fill the next beam; `early_stopping` says
when a question is done. Differences: the beam starts with one hypothesis and grows to H, so that no step works on dead
rows, and questions that are done leave the batch once they are a quarter of it. A hypothesis that cannot end better than the answers that are wanted
is not continued, and a question without others is done: those answers are the same, and often found in half the steps.

The vocabulary is large, so a step passes over it as rarely as it can: the mixture is summed as probabilities, not as
logarithms, to choose the candidates; what is kept of the few chosen ones is computed anew from their logits, exactly.
Tokens e^−87 times less probable than likely (float32) tie in that choice, and are exact all the same once chosen.
This module knows nothing about answers as text, or about merging the passages' beams.

Legend: B questions, K passages per question, S context tokens, T answer tokens (the prompt left out), V vocabulary,
H hypotheses in a beam, C candidates, A questions still searched, W hypotheses running (W <= H), N contexts of those
questions (A·K), F continuations of a question (W·V), G blocks of those.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from rag_core.decoding.passage_decoder import PassageDecoder
from rag_core.errors import ConfigError, NotFiniteError
from rag_core.reading.generator_limits import refuse_long_search
from rag_core.reading.likelihood import check_contexts, check_encoder_decoder

EarlyStopping = bool | Literal["never"]

# Continuations are searched for their best in blocks of so many: one pass finds the blocks' maxima.
_BLOCK = 256


@dataclass(frozen=True)
class BeamSettings:
    """How a beam is searched.

    Attributes:
        num_beams: H, hypotheses kept; 1 is greedy: the first answer that ends is taken, whatever is set below.
        max_new_tokens: generated tokens at most, end token and a forced first token included.
        length_penalty: hypotheses are ranked by log_prob / length ** length_penalty, the length counted like
            max_new_tokens; 0 ranks by probability.
        early_stopping: a question is done once H hypotheses have ended and
            False: the best running one, as it stands, is not better than the worst of them;
            "never": nor could it be at the full length (differs from False for a positive length_penalty);
            True: at once.
    """

    num_beams: int
    max_new_tokens: int
    length_penalty: float = 0.0
    early_stopping: EarlyStopping = False


@dataclass(frozen=True)
class Beams:
    """Finished hypotheses, best first; places that no hypothesis fills have log_probs and scores −inf."""

    tokens_BHT: Tensor  # int64, generated tokens with the end token; undefined after the length
    lengths_BH: Tensor  # int64, generated tokens, end token included
    log_probs_BH: Tensor
    scores_BH: Tensor  # what the beam ranks by: a forced end costs nothing, and the length penalty is applied
    doc_log_posteriors_BHTK: Tensor

    def select(self, index: Tensor) -> Beams:
        """The beams of some questions; `index` is int64 or bool."""
        return Beams(**{name: value[index] for name, value in vars(self).items()})


def check_decoding(
    generator: Any,
    input_ids_BKS: Tensor,
    attention_mask_BKS: Tensor,
    doc_scores_BK: Tensor,
    settings: BeamSettings,
    num_return_sequences: int,
) -> None:
    """Refuse settings and inputs that cannot be decoded.

    Raises:
        ConfigError: a setting is out of range, the generator is not an encoder-decoder, or it has no positions for
            max_new_tokens.
        ValueError: shapes do not fit, scores are NaN or +inf, or a question has no passage (all scores −inf).
    """
    check_encoder_decoder(generator)
    for name, value in (
        ("num_beams", settings.num_beams),
        ("max_new_tokens", settings.max_new_tokens),
        ("num_return_sequences", num_return_sequences),
    ):
        if value < 1:
            raise ConfigError(f"{name} is {value}; it must be 1 or more.")
    if num_return_sequences > settings.num_beams:
        raise ConfigError(
            f"num_return_sequences is {num_return_sequences} and num_beams {settings.num_beams}: a beam cannot return "
            "more answers than it holds. Raise num_beams or ask for fewer answers."
        )
    refuse_long_search(generator, settings.max_new_tokens)
    if not isinstance(settings.early_stopping, bool) and settings.early_stopping != "never":
        raise ConfigError(f'early_stopping is {settings.early_stopping!r}; it must be true, false or "never".')
    check_contexts(input_ids_BKS, attention_mask_BKS, doc_scores_BK)
    if not doc_scores_BK.amax(dim=1).isfinite().all():
        raise ValueError("doc_scores must hold a finite score for every question, and neither NaN nor +inf")


def beam_search(
    decoder: PassageDecoder, doc_log_probs_BK: Tensor, settings: BeamSettings, wanted: int | None = None
) -> Beams:
    """The best answers found for each question under the mixture of its passages.

    Args:
        decoder: holds B·K contexts, passages of a question next to each other, at the prompt.
        doc_log_probs_BK: log p(z|q), floating point; −inf for an absent passage.
        settings: how to search.
        wanted: so many of the best are exact, the others may be missing; default: all H.

    Returns:
        Beams of B questions. Log-probabilities are the model's own: tokens that must not be generated are left out
        without renormalising.

    Raises:
        NotFiniteError: the generator's logits at the prompt are NaN.
    """
    B, K = doc_log_probs_BK.shape
    tokens, H, device = decoder.tokens, settings.num_beams, doc_log_probs_BK.device
    forced, penalty = tokens.forced_first, settings.length_penalty
    T = settings.max_new_tokens - forced
    ends = torch.tensor(tokens.ends, device=device)
    suppressed = torch.tensor(sorted(set(tokens.suppressed)), dtype=torch.long, device=device)
    suppressed_first = torch.tensor(sorted({*tokens.suppressed, *tokens.suppressed_first}), device=device).long()
    candidates_max = (1 + len(tokens.ends)) * H
    wanted = min(wanted or H, H)
    # Other rules stop a search by how many answers have ended, poor ones included.
    prune = settings.early_stopping == "never" or (settings.early_stopping is False and penalty <= 0)

    logits_AKWV = decoder.first_logits_NV.view(B, K, 1, -1)
    V = logits_AKWV.shape[-1]
    if logits_AKWV.isnan().any():
        raise NotFiniteError.of("the generator's logits", "They are NaN at the first token of an answer.")
    dtype = torch.promote_types(logits_AKWV.dtype, torch.float32)
    neg_inf = torch.tensor(float("-inf"), dtype=dtype, device=device)

    # The state of the questions still searched. `running` has an entry per hypothesis of the beam, `pool` per
    # finished one; `questions_A` says whom the rows belong to.
    log_docs_AK = doc_log_probs_BK.to(dtype)
    questions_A = torch.arange(B, device=device)
    searching_A = torch.ones(B, dtype=torch.bool, device=device)
    running_AW = torch.zeros(B, 1, dtype=dtype, device=device)
    tokens_AWT = torch.zeros(B, 1, T, dtype=torch.long, device=device)
    posteriors_AWTK = torch.zeros(B, 1, T, K, dtype=dtype, device=device)
    pool = Beams(
        tokens_BHT=tokens_AWT.repeat(1, H, 1),
        lengths_BH=torch.zeros(B, H, dtype=torch.long, device=device),
        log_probs_BH=neg_inf.repeat(B, H),
        scores_BH=neg_inf.repeat(B, H),
        doc_log_posteriors_BHTK=posteriors_AWTK.repeat(1, H, 1, 1),
    )
    done: list[tuple[Tensor, Beams]] = []

    for t in range(T):
        A, W = running_AW.shape
        last, length = t + 1 == T, t + 1 + forced
        # 1. The best continuations of all hypotheses of a question together.
        next_AWV, normalisers_AKW = _next_log_probs(logits_AKWV, log_docs_AK)
        if last and tokens.forced_end is not None:
            ranked_AWV = neg_inf.repeat(A, W, V)
            ranked_AWV[:, :, tokens.forced_end] = running_AW
        else:
            ranked_AWV = next_AWV.add_(running_AW.unsqueeze(2))
            ranked_AWV.index_fill_(2, suppressed_first if t == 0 else suppressed, float("-inf"))
        C = min(candidates_max, W * V)
        ranks_AC, flat_AC = _best_of(ranked_AWV.flatten(1), C)
        beam_AC, token_AC = flat_AC // V, flat_AC % V
        # What each passage says of a candidate (the terms of the paper's p'θ, section 2.5), and their sum.
        rows_A1 = torch.arange(A, device=device).unsqueeze(1)
        at_token_ACK = logits_AKWV[rows_A1, :, beam_AC, token_AC].to(dtype)
        joint_ACK = at_token_ACK - normalisers_AKW[rows_A1, :, beam_AC] + log_docs_AK.unsqueeze(1)
        mixture_AC = joint_ACK.logsumexp(dim=2)
        cand_log_probs_AC = running_AW[rows_A1, beam_AC] + mixture_AC
        if not (last and tokens.forced_end is not None):
            order_AC = cand_log_probs_AC.where(ranks_AC > neg_inf, neg_inf).argsort(dim=1, descending=True, stable=True)
            joint_ACK, mixture_AC = joint_ACK[rows_A1, order_AC], mixture_AC[rows_A1, order_AC]
            cand_log_probs_AC, beam_AC = cand_log_probs_AC[rows_A1, order_AC], beam_AC[rows_A1, order_AC]
            token_AC, allowed_AC = token_AC[rows_A1, order_AC], ranks_AC[rows_A1, order_AC] > neg_inf
            ranks_AC = cand_log_probs_AC.where(allowed_AC, neg_inf)
        cand_tokens_ACT = tokens_AWT[rows_A1, beam_AC]
        cand_tokens_ACT[:, :, t] = token_AC
        cand_posteriors_ACTK = posteriors_AWTK[rows_A1, beam_AC]
        # Bayes' rule: this passage's share of the token's probability.
        cand_posteriors_ACTK[:, :, t] = joint_ACK - mixture_AC.unsqueeze(2)

        # 2. Ended ones compete for the pool, if among the best H. At the last step every one has ended.
        ended_AC = torch.ones_like(token_AC, dtype=torch.bool) if last else torch.isin(token_AC, ends)
        joins_AC = ended_AC & searching_A.unsqueeze(1)
        joins_AC[:, H:] = False
        ended_scores_AC = torch.where(joins_AC, ranks_AC, neg_inf) / length**penalty
        scores_AH, kept_AH = torch.cat((pool.scores_BH, ended_scores_AC), dim=1).topk(H, dim=1)
        pool = Beams(
            tokens_BHT=torch.cat((pool.tokens_BHT, cand_tokens_ACT), dim=1)[rows_A1, kept_AH],
            lengths_BH=torch.cat((pool.lengths_BH, torch.full_like(token_AC, t + 1)), dim=1)[rows_A1, kept_AH],
            log_probs_BH=torch.cat((pool.log_probs_BH, cand_log_probs_AC), dim=1)[rows_A1, kept_AH].where(
                scores_AH > neg_inf, neg_inf
            ),
            scores_BH=scores_AH,
            doc_log_posteriors_BHTK=torch.cat((pool.doc_log_posteriors_BHTK, cand_posteriors_ACTK), dim=1)[
                rows_A1, kept_AH
            ],
        )
        if last:
            break

        # 3. The others fill the next beam.
        running_AW, next_AW = ranks_AC.masked_fill(ended_AC, neg_inf).topk(min(H, C), dim=1)
        parent_AW = beam_AC[rows_A1, next_AW]
        tokens_AWT = cand_tokens_ACT[rows_A1, next_AW]
        posteriors_AWTK = cand_posteriors_ACTK[rows_A1, next_AW]

        # 4. Done: no hypothesis runs, or the pool is full and, as `early_stopping` judges it, good enough.
        if settings.early_stopping is True or H == 1:
            searching_A &= pool.scores_BH[:, -1] == neg_inf
        at_length = settings.max_new_tokens if settings.early_stopping == "never" and penalty > 0 else length
        searching_A &= running_AW[:, 0] / at_length**penalty > pool.scores_BH[:, -1]
        # A longer answer is not more probable: what it can still score at most, against the last that is wanted.
        bound_AW = running_AW / (settings.max_new_tokens if penalty > 0 else length) ** penalty
        hopeful_AW = (bound_AW >= pool.scores_BH[:, wanted - 1 : wanted]) & (running_AW > neg_inf)
        searching_A &= hopeful_AW[:, 0]
        most = (hopeful_AW & searching_A.unsqueeze(1)).sum(1).amax()
        left, width = torch.stack((searching_A.sum(), most)).tolist()  # the step's one wait for the device
        if left == 0:
            break
        if prune:
            running_AW, parent_AW = running_AW[:, :width], parent_AW[:, :width]
            tokens_AWT, posteriors_AWTK = tokens_AWT[:, :width], posteriors_AWTK[:, :width]
        if 4 * left <= 3 * A:
            done.append((questions_A[~searching_A], pool.select(~searching_A)))
            keep = searching_A.nonzero().squeeze(1)
            pool = pool.select(keep)
            running_AW, tokens_AWT, posteriors_AWTK = running_AW[keep], tokens_AWT[keep], posteriors_AWTK[keep]
            log_docs_AK, questions_A, parent_AW = log_docs_AK[keep], questions_A[keep], parent_AW[keep]
            searching_A = searching_A[keep]
            decoder.select((keep.unsqueeze(1) * K + torch.arange(K, device=device)).flatten())

        # 5. One decoder step: all passages of a question continue the same hypotheses.
        tokens_NW = tokens_AWT[:, :, t].repeat_interleave(K, dim=0)
        logits_AKWV = decoder.step(tokens_NW, parent_AW.repeat_interleave(K, dim=0)).unflatten(0, (-1, K))

    done.append((questions_A, pool))
    order_B = torch.cat([questions for questions, _ in done]).argsort()
    merged = {name: torch.cat([getattr(beams, name) for _, beams in done])[order_B] for name in vars(pool)}
    return Beams(**merged)


def _next_log_probs(logits_AKWV: Tensor, log_docs_AK: Tensor) -> tuple[Tensor, Tensor]:
    """log Σ_z p(z|q) p(·|q,z,a_<t), shape (A, W, V), in a buffer of its own, and the logits' logsumexp, (A, K, W).

    Float32 at least. What is less probable than the type's smallest number counts as that.
    """
    K, dtype = log_docs_AK.shape[1], log_docs_AK.dtype
    top_AKW = logits_AKWV.amax(dim=3).to(dtype)
    if K == 1:
        log_probs_AWV = torch.log_softmax(logits_AKWV.squeeze(1), dim=2, dtype=dtype)
        normalisers_AKW = top_AKW - log_probs_AWV.amax(dim=2).unsqueeze(1)
        return log_probs_AWV.add_(log_docs_AK.unsqueeze(2)), normalisers_AKW
    docs_AK11 = log_docs_AK.exp()[:, :, None, None]
    mixture_AWV, most_AKW = logits_AKWV.new_zeros(()), torch.empty_like(top_AKW)
    for k in range(K):  # one passage at a time: what is made of its logits stays in the cache
        probs_AWV = torch.softmax(logits_AKWV[:, k], dim=2, dtype=dtype)
        most_AKW[:, k] = probs_AWV.amax(dim=2)
        mixture_AWV = mixture_AWV.addcmul_(probs_AWV, docs_AK11[:, k]) if k else probs_AWV.mul_(docs_AK11[:, k])
    return mixture_AWV.clamp_(min=torch.finfo(dtype).tiny).log_(), top_AKW - most_AKW.log_()


def _best_of(ranked_AF: Tensor, C: int) -> tuple[Tensor, Tensor]:
    """`topk`, exactly, in one pass: the best C are in the C blocks with the greatest maxima, or in what is left over."""
    A, F = ranked_AF.shape
    G = F // _BLOCK
    if G <= 2 * C:
        return ranked_AF.topk(C, dim=1)
    blocks_AGb = ranked_AF[:, : G * _BLOCK].view(A, G, _BLOCK)
    best_AC = blocks_AGb.amax(dim=2).topk(C, dim=1).indices
    rows_A1 = torch.arange(A, device=best_AC.device).unsqueeze(1)
    rest_Ar = torch.arange(G * _BLOCK, F, device=best_AC.device).expand(A, -1)
    places_ACb = best_AC.unsqueeze(2) * _BLOCK + torch.arange(_BLOCK, device=best_AC.device)
    places_AP = torch.cat((places_ACb.flatten(1), rest_Ar), dim=1)
    values_AP = torch.cat((blocks_AGb[rows_A1, best_AC].flatten(1), ranked_AF[:, G * _BLOCK :]), dim=1)
    values_AC, found_AC = values_AP.topk(C, dim=1)
    return values_AC, places_AP.gather(1, found_AC)
