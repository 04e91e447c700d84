"""Beam search over (questions, passages): the one search under both RAG decoders.

Every hypothesis is continued with all K passages of its question, and the next-token distributions are averaged with
weights p(z|q). With K passages that is RAG-Token; RAG-Sequence calls it with every (question, passage) pair as a
question of its own, K = 1.

The rules are those of `transformers` (generation/utils.py, `_beam_search`, early_stopping=False): of the best 2·H
continuations, ended ones join the pool of finished hypotheses if they are among the best H, the others fill the next
beam; a question is done once its pool is full and its best running hypothesis, as it stands, is not better than the
worst of the pool. Differences: the beam starts with one hypothesis and grows to H, so that no step works on dead
rows, and questions that are done leave the batch once they are half of it.

Contexts are encoded once. Decoder rows are ordered (question, passage, hypothesis); when hypotheses are re-ordered
only the self-attention cache moves, since all hypotheses of a (question, passage) read the same cross-attention keys
and values. Their price is H copies of those keys and values.
This module knows nothing about answers as text, or about merging the passages' beams.

Legend: B questions, K passages per question, S context tokens, T answer tokens (T = max_new_tokens), V vocabulary,
D hidden size, H hypotheses in a beam, C candidates, A questions still searched, W hypotheses running (W <= H),
R decoder rows (A·K·W), N contexts (B·K).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, EncoderDecoderCache
from transformers.modeling_outputs import BaseModelOutput

from rag_core.errors import ConfigError
from rag_core.likelihood import check_contexts, check_encoder_decoder, marginalize


@dataclass(frozen=True)
class SpecialTokens:
    """Token ids that steer decoding: where answers start, what ends them, what fills them up."""

    start: int
    ends: list[int]
    pad: int

    @classmethod
    def of(cls, generator: Any) -> SpecialTokens:
        """Read generation_config first, then config, then config.decoder (EncoderDecoderModel nests its models').

        Raises:
            ConfigError: a token is set in none of them.
        """
        config = generator.config
        places = (getattr(generator, "generation_config", None), config, getattr(config, "decoder", None))

        def find(name: str) -> Any:
            found = next((value for place in places if (value := getattr(place, name, None)) is not None), None)
            if found is None:
                raise ConfigError(
                    f"The generator ({type(generator).__name__}) has no {name}, neither in its generation_config nor "
                    "in its config; decoding needs it. Set it in the model's folder (generation_config.json)."
                )
            return found

        ends = find("eos_token_id")
        return cls(
            start=find("decoder_start_token_id"),
            ends=[ends] if isinstance(ends, int) else list(ends),
            pad=find("pad_token_id"),
        )

    def never_answered(self) -> list[int]:
        """Tokens that no answer may hold: start and padding, unless they end answers too (BART starts with </s>)."""
        return sorted({self.start, self.pad} - set(self.ends))

    def strip(self, generated_ids: list[int]) -> list[int]:
        """Generated tokens without the end token, if the last is one."""
        return generated_ids[:-1] if generated_ids and generated_ids[-1] in self.ends else generated_ids


@dataclass(frozen=True)
class Beams:
    """Finished hypotheses, best first; places that no hypothesis fills have log_probs −inf."""

    tokens_BHT: Tensor  # int64, generated tokens with the end token; undefined after the length
    lengths_BH: Tensor  # int64, generated tokens, end token included
    log_probs_BH: Tensor
    scores_BH: Tensor  # log_probs / length ** length_penalty
    doc_log_posteriors_BHTK: Tensor

    def select(self, index: Tensor) -> Beams:
        """The beams of some questions; `index` is int64 or bool."""
        return Beams(**{name: value[index] for name, value in vars(self).items()})


class PassageDecoder:
    """The generator's decoder, reading N contexts that were encoded once.

    The cross-attention keys and values of the contexts are computed once, by `start`, and copied for every row that
    reads them afterwards.
    """

    def __init__(self, generator: Any, input_ids_NS: Tensor, attention_mask_NS: Tensor) -> None:
        self.generator = generator
        self.special = SpecialTokens.of(generator)
        self.mask_NS = attention_mask_NS
        self.states_NSD: Tensor = generator.get_encoder()(
            input_ids=input_ids_NS, attention_mask=attention_mask_NS, return_dict=True
        ).last_hidden_state
        self._cross: list[tuple[Tensor, Tensor]] = []
        self.vocab_size = 0  # known after `start`

    def start(self) -> tuple[Tensor, Any]:
        """Logits of the first token for all contexts, shape (N, V), and the cache behind them."""
        cache: Any = EncoderDecoderCache(DynamicCache(), DynamicCache())
        N = len(self.mask_NS)
        start_N1 = torch.full((N, 1), self.special.start, dtype=torch.long, device=self.mask_NS.device)
        logits_N1V = self._forward(start_N1, self.states_NSD, self.mask_NS, cache)
        self._cross = [(layer.keys, layer.values) for layer in cache.cross_attention_cache.layers]
        self.vocab_size = logits_N1V.shape[-1]
        return logits_N1V[:, -1], cache

    def cache_for(self, contexts_R: Tensor) -> Any:
        """A cache without answer tokens for rows that read the given contexts. Call `start` before."""
        rows = [(keys.index_select(0, contexts_R), values.index_select(0, contexts_R)) for keys, values in self._cross]
        return EncoderDecoderCache(DynamicCache(), DynamicCache(rows))

    def logits(self, decoder_input_ids_RT: Tensor, contexts_R: Tensor, cache: Any) -> Tensor:
        """Logits after every decoder input, shape (R, T, V), float32 or float64."""
        # With cross-attention keys and values in the cache, the encoder's states are read for their shape alone.
        shape = (len(contexts_R), *self.states_NSD.shape[1:])
        return self._forward(
            decoder_input_ids_RT, self.states_NSD.new_zeros(()).expand(shape), self.mask_NS[contexts_R], cache
        )

    def _forward(self, decoder_input_ids_RT: Tensor, states_RSD: Tensor, mask_RS: Tensor, cache: Any) -> Tensor:
        logits_RTV: Tensor = self.generator(
            encoder_outputs=BaseModelOutput(last_hidden_state=states_RSD),
            attention_mask=mask_RS,
            decoder_input_ids=decoder_input_ids_RT,
            past_key_values=cache,
            use_cache=True,
        ).logits
        return logits_RTV if logits_RTV.dtype == torch.float64 else logits_RTV.float()


def check_decoding(
    generator: Any,
    input_ids_BKS: Tensor,
    attention_mask_BKS: Tensor,
    doc_scores_BK: Tensor,
    *,
    num_beams: int,
    max_new_tokens: int,
    num_return_sequences: int,
) -> None:
    """Refuse settings and inputs that cannot be decoded.

    Raises:
        ConfigError: a setting is out of range, or the generator is not an encoder-decoder.
        ValueError: shapes do not fit, scores are NaN or +inf, or a question has no passage (all scores −inf).
    """
    check_encoder_decoder(generator)
    for name, value in (
        ("num_beams", num_beams),
        ("max_new_tokens", max_new_tokens),
        ("num_return_sequences", num_return_sequences),
    ):
        if value < 1:
            raise ConfigError(f"{name} is {value}; it must be 1 or more.")
    if num_return_sequences > num_beams:
        raise ConfigError(
            f"num_return_sequences is {num_return_sequences} and num_beams {num_beams}: a beam cannot return more "
            "answers than it holds. Raise num_beams or ask for fewer answers."
        )
    check_contexts(input_ids_BKS, attention_mask_BKS, doc_scores_BK)
    if not doc_scores_BK.amax(dim=1).isfinite().all():
        raise ValueError("doc_scores must hold a finite score for every question, and neither NaN nor +inf")


@contextmanager
def decoding_mode(generator: Any) -> Iterator[None]:
    """Evaluation mode without autograd; afterwards every module is back in the mode it was in."""
    was_training = [(module, module.training) for module in generator.modules()]
    generator.eval()
    try:
        with torch.inference_mode():
            yield
    finally:
        for module, training in was_training:
            module.training = training


def beam_search(
    decoder: PassageDecoder,
    doc_log_probs_BK: Tensor,
    *,
    num_beams: int,
    max_new_tokens: int,
    length_penalty: float,
) -> Beams:
    """The best answers found for each question under the mixture of its passages.

    Args:
        decoder: holds B·K contexts, passages of a question next to each other.
        doc_log_probs_BK: log p(z|q), floating point; −inf for an absent passage.
        num_beams: H, hypotheses kept per question.
        max_new_tokens: T, generated tokens at most, end token included.
        length_penalty: hypotheses are ranked by log_prob / length ** length_penalty.

    Returns:
        Beams of B questions. Log-probabilities are the model's own: tokens that no answer may hold are left out
        without renormalising.
    """
    B, K = doc_log_probs_BK.shape
    H, T, special, device = num_beams, max_new_tokens, decoder.special, doc_log_probs_BK.device
    ends = torch.tensor(special.ends, device=device)
    never = torch.tensor(special.never_answered(), dtype=torch.long, device=device)
    candidates_max = (1 + len(special.ends)) * H

    logits_RV, cache = decoder.start()
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
        # 1. The mixture's next-token distribution (paper, section 2.5: the transition probability p'θ), continuing
        #    each hypothesis. What does not depend on the token (p(z|q), the softmax's normaliser, the hypothesis so
        #    far) is one weight, so that no pass over the vocabulary is spent on it.
        logits_AKWV = logits_RV.view(A, K, W, V)
        weights_AKW = log_docs_AK.unsqueeze(2) + running_AW.unsqueeze(1) - logits_AKWV.logsumexp(dim=3)
        scores_AWV = marginalize(logits_AKWV, weights_AKW)
        scores_AWV.index_fill_(2, never, float("-inf"))

        # 2. The best continuations of all hypotheses of a question together.
        C = min(candidates_max, W * V)
        cand_log_probs_AC, flat_AC = scores_AWV.flatten(1).topk(C, dim=1)
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
        ended_AC = torch.isin(token_AC, ends) if t + 1 < T else torch.ones_like(token_AC, dtype=torch.bool)
        joins_AC = ended_AC & searching_A.unsqueeze(1)
        joins_AC[:, H:] = False
        ended_log_probs_AC = torch.where(joins_AC, cand_log_probs_AC, neg_inf)
        ended_scores_AC = ended_log_probs_AC / (t + 1) ** length_penalty
        scores_AH, kept_AH = torch.cat((pool.scores_BH, ended_scores_AC), dim=1).topk(H, dim=1)
        pool = Beams(
            tokens_BHT=torch.cat((pool.tokens_BHT, cand_tokens_ACT), dim=1)[rows_A1, kept_AH],
            lengths_BH=torch.cat((pool.lengths_BH, torch.full_like(token_AC, t + 1)), dim=1)[rows_A1, kept_AH],
            log_probs_BH=torch.cat((pool.log_probs_BH, ended_log_probs_AC), dim=1)[rows_A1, kept_AH],
            scores_BH=scores_AH,
            doc_log_posteriors_BHTK=torch.cat((pool.doc_log_posteriors_BHTK, cand_posteriors_ACTK), dim=1)[
                rows_A1, kept_AH
            ],
        )
        if t + 1 == T:
            break

        # 4. The others fill the next beam.
        running_AW, next_AW = cand_log_probs_AC.masked_fill(ended_AC, neg_inf).topk(min(H, C), dim=1)
        parent_AW = beam_AC[rows_A1, next_AW]
        tokens_AWT = cand_tokens_ACT[rows_A1, next_AW]
        posteriors_AWTK = cand_posteriors_ACTK[rows_A1, next_AW]

        # 5. Done: no hypothesis runs, or the pool is full and the best running one does not beat its worst.
        searching_A &= running_AW[:, 0] / (t + 1) ** length_penalty > pool.scores_BH[:, -1]
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
        parents_AKW = parent_AW.unsqueeze(1).expand(-1, K, -1)
        if not (new_W == W == 1 and new_A == A):
            cache.self_attention_cache.reorder_cache(old_rows_AKW.gather(2, parents_AKW).flatten())
        if (new_A, new_W) != (A, W):
            # Any row of the same (question, passage) will do: they are equal. The beam only ever grows.
            cache.cross_attention_cache.reorder_cache(old_rows_AKW[:, :, :1].expand(-1, -1, new_W).flatten())
        last_R1 = tokens_AWT[:, :, t].unsqueeze(1).expand(-1, K, -1).reshape(-1, 1)
        contexts_R = contexts_AK.unsqueeze(2).expand(-1, -1, new_W).flatten()
        logits_RV = decoder.logits(last_R1, contexts_R, cache)[:, -1]

    done.append((questions_A, pool))
    order_B = torch.cat([questions for questions, _ in done]).argsort()
    merged = {name: torch.cat([getattr(beams, name) for _, beams in done])[order_B] for name in vars(pool)}
    return Beams(**merged)
