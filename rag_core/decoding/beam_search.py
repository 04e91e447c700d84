"""Beam search over (questions, passages): the one search under both RAG decoders.

Every hypothesis is continued with all K passages of its question, and the next-token distributions are averaged with
weights p(z|q). With K passages that is RAG-Token; RAG-Sequence calls it with every (question, passage) pair as a
question of its own, K = 1.

The rules are those of `transformers` (generation/utils.py, `_beam_search`): of the best 2·H continuations, ended ones
join the pool of finished hypotheses if they are among the best H, the others fill the next beam; `early_stopping` says
when a question is done. Differences: the beam starts with one hypothesis and grows to H, so that no step works on dead
rows, and questions that are done leave the batch once they are half of it.

Contexts are encoded once. Decoder rows are ordered (question, passage, hypothesis); when hypotheses are re-ordered
only the self-attention cache moves, since all hypotheses of a (question, passage) read the same cross-attention keys
and values. Their price is H copies of those keys and values.
This module knows nothing about answers as text, or about merging the passages' beams.

Legend: B questions, K passages per question, S context tokens, T answer tokens (the prompt left out), V vocabulary,
H hypotheses in a beam, C candidates, A questions still searched, W hypotheses running (W <= H), R decoder rows (A·K·W).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from rag_core.decoding.passage_decoder import PassageDecoder
from rag_core.errors import ConfigError
from rag_core.generation_tokens import GenerationTokens
from rag_core.likelihood import check_contexts, check_encoder_decoder, marginalize

EarlyStopping = bool | Literal["never"]


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
        ConfigError: a setting is out of range, or the generator is not an encoder-decoder.
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
    if settings.max_new_tokens <= GenerationTokens.of(generator).forced_first:
        raise ConfigError("max_new_tokens is 1, which the generator's forced first token takes up; raise it.")
    if not isinstance(settings.early_stopping, bool) and settings.early_stopping != "never":
        raise ConfigError(f'early_stopping is {settings.early_stopping!r}; it must be true, false or "never".')
    check_contexts(input_ids_BKS, attention_mask_BKS, doc_scores_BK)
    if not doc_scores_BK.amax(dim=1).isfinite().all():
        raise ValueError("doc_scores must hold a finite score for every question, and neither NaN nor +inf")


def beam_search(decoder: PassageDecoder, doc_log_probs_BK: Tensor, settings: BeamSettings) -> Beams:
    """The best answers found for each question under the mixture of its passages.

    Args:
        decoder: holds B·K contexts, passages of a question next to each other.
        doc_log_probs_BK: log p(z|q), floating point; −inf for an absent passage.
        settings: how to search.

    Returns:
        Beams of B questions. Log-probabilities are the model's own: tokens that must not be generated are left out
        without renormalising.
    """
    B, K = doc_log_probs_BK.shape
    tokens, H, device = decoder.tokens, settings.num_beams, doc_log_probs_BK.device
    forced, penalty = tokens.forced_first, settings.length_penalty
    T = settings.max_new_tokens - forced
    ends = torch.tensor(tokens.ends, device=device)
    suppressed = torch.tensor(sorted(set(tokens.suppressed)), dtype=torch.long, device=device)
    suppressed_first = torch.tensor(tokens.suppressed_first, dtype=torch.long, device=device)
    candidates_max = (1 + len(tokens.ends)) * H

    logits_RV = decoder.start()
    V = logits_RV.shape[-1]
    neg_inf = logits_RV.new_tensor(float("-inf"))

    # The state of the questions still searched. `running` has an entry per hypothesis of the beam, `pool` per
    # finished one; `contexts_AK` and `questions_A` say whom the rows belong to.
    log_docs_AK = doc_log_probs_BK.to(logits_RV.dtype)
    contexts_AK = torch.arange(B * K, device=device).view(B, K)
    questions_A = torch.arange(B, device=device)
    searching_A = torch.ones(B, dtype=torch.bool, device=device)
    running_AW = logits_RV.new_zeros(B, 1)
    tokens_AWT = torch.zeros(B, 1, T, dtype=torch.long, device=device)
    posteriors_AWTK = logits_RV.new_zeros(B, 1, T, K)
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
        # 1. The mixture's next-token distribution (paper, section 2.5: the transition probability p'θ), continuing
        #    each hypothesis. What does not depend on the token (p(z|q), the softmax's normaliser, the hypothesis so
        #    far) is one weight, so that no pass over the vocabulary is spent on it.
        logits_AKWV = logits_RV.view(A, K, W, V)
        weights_AKW = log_docs_AK.unsqueeze(2) + running_AW.unsqueeze(1) - logits_AKWV.logsumexp(dim=3)
        log_probs_AWV = marginalize(logits_AKWV, weights_AKW)
        if last and tokens.forced_end is not None:
            ranked_AWV = neg_inf.repeat(A, W, V)
            ranked_AWV[:, :, tokens.forced_end] = running_AW
        else:
            ranked_AWV = log_probs_AWV.index_fill_(2, suppressed, float("-inf"))
            if t == 0:
                ranked_AWV.index_fill_(2, suppressed_first, float("-inf"))

        # 2. The best continuations of all hypotheses of a question together.
        C = min(candidates_max, W * V)
        ranks_AC, flat_AC = ranked_AWV.flatten(1).topk(C, dim=1)
        cand_log_probs_AC = log_probs_AWV.flatten(1).gather(1, flat_AC)
        beam_AC, token_AC = flat_AC // V, flat_AC % V
        rows_A1 = torch.arange(A, device=device).unsqueeze(1)
        cand_tokens_ACT = tokens_AWT[rows_A1, beam_AC]
        cand_tokens_ACT[:, :, t] = token_AC
        cand_posteriors_ACTK = posteriors_AWTK[rows_A1, beam_AC]
        # Bayes' rule: this passage's share of the candidate's probability.
        cand_posteriors_ACTK[:, :, t] = (
            logits_AKWV[rows_A1, :, beam_AC, token_AC]
            + weights_AKW[rows_A1, :, beam_AC]
            - cand_log_probs_AC.unsqueeze(2)
        )

        # 3. Ended ones compete for the pool, if among the best H. At the last step every one has ended.
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

        # 4. The others fill the next beam.
        running_AW, next_AW = cand_log_probs_AC.masked_fill(ended_AC, neg_inf).topk(min(H, C), dim=1)
        parent_AW = beam_AC[rows_A1, next_AW]
        tokens_AWT = cand_tokens_ACT[rows_A1, next_AW]
        posteriors_AWTK = cand_posteriors_ACTK[rows_A1, next_AW]

        # 5. Done: no hypothesis runs, or the pool is full and, as `early_stopping` judges it, good enough.
        if settings.early_stopping is True or H == 1:
            searching_A &= pool.scores_BH[:, -1] == neg_inf
        at_length = settings.max_new_tokens if settings.early_stopping == "never" and penalty > 0 else length
        searching_A &= running_AW[:, 0] / at_length**penalty > pool.scores_BH[:, -1]
        left = int(searching_A.sum())  # the step's one wait for the device
        if left == 0:
            break
        old_rows_AKW = torch.arange(A * K * W, device=device).view(A, K, W)
        if 2 * left <= A:
            done.append((questions_A[~searching_A], pool.select(~searching_A)))
            keep = searching_A.nonzero().squeeze(1)
            pool = pool.select(keep)
            running_AW, tokens_AWT, posteriors_AWTK = running_AW[keep], tokens_AWT[keep], posteriors_AWTK[keep]
            log_docs_AK, contexts_AK, questions_A = log_docs_AK[keep], contexts_AK[keep], questions_A[keep]
            parent_AW, old_rows_AKW, searching_A = parent_AW[keep], old_rows_AKW[keep], searching_A[keep]

        # 6. One decoder step for all rows.
        new_A, new_W = running_AW.shape
        same_rows = (new_A, new_W) == (A, W)
        parents_R = old_rows_AKW.gather(2, parent_AW.unsqueeze(1).expand(-1, K, -1)).flatten()
        logits_RV = decoder.step(
            tokens_AWT[:, :, : t + 1].unsqueeze(1).expand(-1, K, -1, -1).flatten(0, 2),
            contexts_AK.unsqueeze(2).expand(-1, -1, new_W).flatten(),
            # A lone hypothesis of each question continues itself.
            None if same_rows and W == 1 else parents_R,
            same_contexts=same_rows,
        )

    done.append((questions_A, pool))
    order_B = torch.cat([questions for questions, _ in done]).argsort()
    merged = {name: torch.cat([getattr(beams, name) for _, beams in done])[order_B] for name in vars(pool)}
    return Beams(**merged)
