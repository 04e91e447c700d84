"""Beam search over (questions, passages): the one search under both RAG decoders.

Every hypothesis is continued under all K passages of its question, and the next-token distributions are averaged with
weights p(z|q). With K passages that is RAG-Token. RAG-Sequence makes every (question, passage) pair a question of its
own, with K = 1.

The rules are those of `transformers` (generation/utils.py, `_beam_search`). Of the best 2·H continuations, ended ones
join the pool of finished hypotheses if they are among the best H; the others fill the next beam. `early_stopping`
decides when a question is done. This search differs in three ways:

- The beam starts with one hypothesis and grows to H, so that no step works on dead rows.
- Questions that are done leave the batch once they make up a quarter of it.
- Where the rules allow it (`_Search.prune`), a hypothesis that cannot end better than the `wanted` best answers is not
  continued. A question without other hypotheses is done. Those answers stay the same, often in half the steps.

The vocabulary is large, so a step passes over it as rarely as possible (`mixture.py`). Candidates are chosen by a
mixture that is summed as probabilities, not as logarithms. The values of the few chosen ones are then computed exactly,
from their logits. Tokens less probable than e^−87 (float32) tie in that choice, but have exact values once chosen.

This module knows nothing about answers as text, or about merging the passages' beams.

Legend: B questions, K passages per question, S context tokens, T answer tokens (the prompt left out), V vocabulary,
H hypotheses in a beam, C candidates, A questions still searched, W hypotheses running (W <= H), N contexts of those
questions (A·K).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from rag_core.decoding.beams import Beams, BeamSettings
from rag_core.decoding.mixture import best_of, next_log_probs
from rag_core.errors import NotFiniteError
from rag_core.generators.generator import PassageDecoder


def beam_search(
    decoder: PassageDecoder, doc_log_probs_BK: Tensor, settings: BeamSettings, wanted: int | None = None
) -> Beams:
    """Find the best answers of each question under the mixture of its passages.

    Args:
        decoder: holds B·K contexts, a question's passages next to each other, and has read the prompt only.
        doc_log_probs_BK: log p(z|q), floating point; −inf for an absent passage.
        settings: how to search.
        wanted: how many of the best answers must be exact; the others may be missing. Default: all H.

    Returns:
        Beams of B questions. Log-probabilities are the model's own: suppressed tokens are left out without
        renormalising.

    Raises:
        NotFiniteError: the generator's logits at the prompt are NaN.
    """
    search = _Search(decoder, doc_log_probs_BK, settings, wanted)
    logits_AKWV = search.first_logits()
    for t in range(search.T):
        candidates = search.best_continuations(t, logits_AKWV)
        ended_AC = search.finish_ended(t, candidates)
        if search.is_last(t):
            break
        parent_AW = search.fill_beam(candidates, ended_AC)
        left, width = search.count_hopeful(t)
        if left == 0:
            break
        parent_AW = search.drop_done(parent_AW, left, width)
        logits_AKWV = search.continue_all(t, parent_AW)
    return search.result()


@dataclass(frozen=True)
class _Candidates:
    """The best continuations of each question's hypotheses, best first."""

    beam_AC: Tensor  # int64, the hypothesis that is continued
    token_AC: Tensor  # int64
    ranks_AC: Tensor  # log-probabilities by which candidates compete; −inf: must not be generated
    log_probs_AC: Tensor
    tokens_ACT: Tensor
    posteriors_ACTK: Tensor  # log p(z | q, answer so far): each passage's share of a token's probability


class _Search:
    """The rules of one search, and the state of the questions that are still searched.

    `running`, `tokens` and `posteriors` have one entry per hypothesis of the beam, `pool` has one per finished
    hypothesis. `questions_A` maps rows to question numbers.
    """

    def __init__(
        self, decoder: PassageDecoder, doc_log_probs_BK: Tensor, settings: BeamSettings, wanted: int | None
    ) -> None:
        B, K = doc_log_probs_BK.shape
        tokens, H, device = decoder.tokens, settings.num_beams, doc_log_probs_BK.device
        self.decoder, self.settings, self.generation = decoder, settings, tokens
        self.H, self.K, self.T = H, K, settings.max_new_tokens - tokens.forced_first
        self.ends = torch.tensor(tokens.ends, device=device)
        self.suppressed = torch.tensor(sorted(set(tokens.suppressed)), dtype=torch.long, device=device)
        self.suppressed_first = torch.tensor(
            sorted({*tokens.suppressed, *tokens.suppressed_first}), device=device
        ).long()
        self.candidates_max = (1 + len(tokens.ends)) * H
        self.wanted = min(wanted or H, H)
        # Under the other rules, poor answers count as well: a search stops once enough answers have ended.
        early, penalty = settings.early_stopping, settings.length_penalty
        self.prune = early == "never" or (early is False and penalty <= 0)

        dtype = torch.promote_types(decoder.first_logits_NV.dtype, torch.float32)
        self.neg_inf = torch.tensor(float("-inf"), dtype=dtype, device=device)
        self.log_docs_AK = doc_log_probs_BK.to(dtype)
        self.questions_A = torch.arange(B, device=device)
        self.searching_A = torch.ones(B, dtype=torch.bool, device=device)
        self.running_AW = torch.zeros(B, 1, dtype=dtype, device=device)
        self.tokens_AWT = torch.zeros(B, 1, self.T, dtype=torch.long, device=device)
        self.posteriors_AWTK = torch.zeros(B, 1, self.T, K, dtype=dtype, device=device)
        self.pool = Beams(
            tokens_BHT=self.tokens_AWT.repeat(1, H, 1),
            lengths_BH=torch.zeros(B, H, dtype=torch.long, device=device),
            log_probs_BH=self.neg_inf.repeat(B, H),
            scores_BH=self.neg_inf.repeat(B, H),
            doc_log_posteriors_BHTK=self.posteriors_AWTK.repeat(1, H, 1, 1),
        )
        self.done: list[tuple[Tensor, Beams]] = []

    def is_last(self, t: int) -> bool:
        """Whether position t is the last."""
        return t + 1 == self.T

    def length(self, t: int) -> int:
        """Length of an answer that ends at position t, a forced first token included."""
        return t + 1 + self.generation.forced_first

    def first_logits(self) -> Tensor:
        """Return the logits at the prompt, shape (A, K, 1, V); NotFiniteError if they are NaN."""
        logits_AKWV = self.decoder.first_logits_NV.view(*self.log_docs_AK.shape, 1, -1)
        if logits_AKWV.isnan().any():
            raise NotFiniteError.of("the generator's logits", "They are NaN at the first token of an answer.")
        return logits_AKWV

    def best_continuations(self, t: int, logits_AKWV: Tensor) -> _Candidates:
        """Step 1: find each question's best continuations, over all its hypotheses together."""
        next_AWV, normalisers_AKW = next_log_probs(logits_AKWV, self.log_docs_AK)
        A, W, V = next_AWV.shape
        forced_end = self.generation.forced_end if self.is_last(t) else None
        if forced_end is not None:
            ranked_AWV = self.neg_inf.repeat(A, W, V)
            ranked_AWV[:, :, forced_end] = self.running_AW
        else:
            ranked_AWV = next_AWV.add_(self.running_AW.unsqueeze(2))
            ranked_AWV.index_fill_(2, self.suppressed_first if t == 0 else self.suppressed, float("-inf"))
        ranks_AC, flat_AC = best_of(ranked_AWV.flatten(1), min(self.candidates_max, W * V))
        beam_AC, token_AC = flat_AC // V, flat_AC % V
        # log p(z|q) p(token|q,z) of every passage (the terms of the paper's p'θ, section 2.5), and the sum.
        rows_A1 = self._rows()
        at_token_ACK = logits_AKWV[rows_A1, :, beam_AC, token_AC].to(self.neg_inf.dtype)
        joint_ACK = at_token_ACK - normalisers_AKW[rows_A1, :, beam_AC] + self.log_docs_AK.unsqueeze(1)
        mixture_AC = joint_ACK.logsumexp(dim=2)
        log_probs_AC = self.running_AW[rows_A1, beam_AC] + mixture_AC
        if forced_end is None:
            allowed_AC = ranks_AC > self.neg_inf
            order_AC = log_probs_AC.where(allowed_AC, self.neg_inf).argsort(dim=1, descending=True, stable=True)
            joint_ACK, mixture_AC = joint_ACK[rows_A1, order_AC], mixture_AC[rows_A1, order_AC]
            log_probs_AC, beam_AC = log_probs_AC[rows_A1, order_AC], beam_AC[rows_A1, order_AC]
            token_AC, allowed_AC = token_AC[rows_A1, order_AC], allowed_AC[rows_A1, order_AC]
            ranks_AC = log_probs_AC.where(allowed_AC, self.neg_inf)
        tokens_ACT = self.tokens_AWT[rows_A1, beam_AC]
        tokens_ACT[:, :, t] = token_AC
        posteriors_ACTK = self.posteriors_AWTK[rows_A1, beam_AC]
        # Bayes' rule: each passage's share of the token's probability.
        posteriors_ACTK[:, :, t] = joint_ACK - mixture_AC.unsqueeze(2)
        return _Candidates(beam_AC, token_AC, ranks_AC, log_probs_AC, tokens_ACT, posteriors_ACTK)

    def finish_ended(self, t: int, candidates: _Candidates) -> Tensor:
        """Step 2: ended candidates among the best H compete for the pool. Returns which ended: at the last t, all."""
        token_AC, pool, neg_inf = candidates.token_AC, self.pool, self.neg_inf
        ended_AC = torch.ones_like(token_AC, dtype=torch.bool) if self.is_last(t) else torch.isin(token_AC, self.ends)
        joins_AC = ended_AC & self.searching_A.unsqueeze(1)
        joins_AC[:, self.H :] = False
        ended_scores_AC = torch.where(joins_AC, candidates.ranks_AC, neg_inf)
        ended_scores_AC = ended_scores_AC / self.length(t) ** self.settings.length_penalty
        scores_AH, kept_AH = torch.cat((pool.scores_BH, ended_scores_AC), dim=1).topk(self.H, dim=1)

        def kept(finished: Tensor, new: Tensor) -> Tensor:
            return torch.cat((finished, new), dim=1)[self._rows(), kept_AH]

        self.pool = Beams(
            tokens_BHT=kept(pool.tokens_BHT, candidates.tokens_ACT),
            lengths_BH=kept(pool.lengths_BH, torch.full_like(token_AC, t + 1)),
            log_probs_BH=kept(pool.log_probs_BH, candidates.log_probs_AC).where(scores_AH > neg_inf, neg_inf),
            scores_BH=scores_AH,
            doc_log_posteriors_BHTK=kept(pool.doc_log_posteriors_BHTK, candidates.posteriors_ACTK),
        )
        return ended_AC

    def fill_beam(self, candidates: _Candidates, ended_AC: Tensor) -> Tensor:
        """Step 3: the best candidates that have not ended fill the next beam. Returns their parents, parent_AW."""
        ranks_AC = candidates.ranks_AC.masked_fill(ended_AC, self.neg_inf)
        self.running_AW, next_AW = ranks_AC.topk(min(self.H, ranks_AC.shape[1]), dim=1)
        rows_A1 = self._rows()
        self.tokens_AWT = candidates.tokens_ACT[rows_A1, next_AW]
        self.posteriors_AWTK = candidates.posteriors_ACTK[rows_A1, next_AW]
        return candidates.beam_AC[rows_A1, next_AW]

    def count_hopeful(self, t: int) -> tuple[int, int]:
        """Step 4: decide which questions are done. Returns how many are left, and the most hypotheses that one needs.

        A question is done if it has no running hypothesis, or if its pool is full and good enough under
        `early_stopping`.
        """
        settings, penalty, length = self.settings, self.settings.length_penalty, self.length(t)
        running_AW, scores_AH = self.running_AW, self.pool.scores_BH
        if settings.early_stopping is True or self.H == 1:
            self.searching_A &= scores_AH[:, -1] == self.neg_inf
        at_length = settings.max_new_tokens if settings.early_stopping == "never" and penalty > 0 else length
        self.searching_A &= running_AW[:, 0] / at_length**penalty > scores_AH[:, -1]
        # A longer answer is never more probable. So this bounds its score; compare it with the last wanted answer's.
        bound_AW = running_AW / (settings.max_new_tokens if penalty > 0 else length) ** penalty
        hopeful_AW = (bound_AW >= scores_AH[:, self.wanted - 1 : self.wanted]) & (running_AW > self.neg_inf)
        self.searching_A &= hopeful_AW[:, 0]
        most = (hopeful_AW & self.searching_A.unsqueeze(1)).sum(1).amax()
        left, width = torch.stack((self.searching_A.sum(), most)).tolist()  # the step's one wait for the device
        return left, width

    def drop_done(self, parent_AW: Tensor, left: int, width: int) -> Tensor:
        """Drop hopeless hypotheses, and done questions once they are a quarter. Returns the kept ones' parents."""
        if self.prune:
            self.running_AW, parent_AW = self.running_AW[:, :width], parent_AW[:, :width]
            self.tokens_AWT, self.posteriors_AWTK = self.tokens_AWT[:, :width], self.posteriors_AWTK[:, :width]
        if 4 * left > 3 * len(self.questions_A):
            return parent_AW
        self.done.append((self.questions_A[~self.searching_A], self.pool.select(~self.searching_A)))
        keep = self.searching_A.nonzero().squeeze(1)
        self.pool = self.pool.select(keep)
        self.running_AW, self.tokens_AWT = self.running_AW[keep], self.tokens_AWT[keep]
        self.posteriors_AWTK, self.log_docs_AK = self.posteriors_AWTK[keep], self.log_docs_AK[keep]
        self.questions_A, self.searching_A = self.questions_A[keep], self.searching_A[keep]
        self.decoder.select((keep.unsqueeze(1) * self.K + torch.arange(self.K, device=keep.device)).flatten())
        return parent_AW[keep]

    def continue_all(self, t: int, parent_AW: Tensor) -> Tensor:
        """Step 5: one decoder step; all passages of a question continue the same hypotheses. Returns logits_AKWV."""
        K = self.K
        tokens_NW = self.tokens_AWT[:, :, t].repeat_interleave(K, dim=0)
        return self.decoder.step(tokens_NW, parent_AW.repeat_interleave(K, dim=0)).unflatten(0, (-1, K))

    def result(self) -> Beams:
        """Return the pools of all questions, in the order of the input."""
        done = [*self.done, (self.questions_A, self.pool)]
        order_B = torch.cat([questions for questions, _ in done]).argsort()
        merged = {name: torch.cat([getattr(beams, name) for _, beams in done])[order_B] for name in vars(self.pool)}
        return Beams(**merged)

    def _rows(self) -> Tensor:
        """Row indices, shape (A, 1), to index together with candidates' indices."""
        return torch.arange(len(self.questions_A), device=self.questions_A.device).unsqueeze(1)
