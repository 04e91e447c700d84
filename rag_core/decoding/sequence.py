"""RAG-Sequence decoding: one beam per passage, then one ranking of all their answers under the mixture.

Legend: B questions, K passages per question, S context tokens, H hypotheses in a beam, T answer tokens, C candidates.
"""

from __future__ import annotations

from typing import Any, Literal, get_args

import numpy as np
import torch
from torch import Tensor

from rag_core.decoding.beam_search import beam_search
from rag_core.decoding.beams import Beams, BeamSettings, EarlyStopping, check_decoding
from rag_core.decoding.candidate_scoring import CandidateScores, score_candidates
from rag_core.decoding.hypothesis import Hypothesis
from rag_core.errors import ConfigError
from rag_core.generators.decoding_mode import decoding_mode
from rag_core.generators.generation_tokens import GenerationTokens
from rag_core.generators.kinds import as_generator
from rag_core.reading.likelihood import doc_log_probs, marginalize

Mode = Literal["thorough", "fast"]


def decode_rag_sequence(
    generator: Any,
    input_ids_BKS: Tensor,
    attention_mask_BKS: Tensor,
    doc_scores_BK: Tensor,
    *,
    num_beams: int,
    max_new_tokens: int,
    mode: Mode = "thorough",
    length_penalty: float = 0.0,
    early_stopping: EarlyStopping = False,
    num_return_sequences: int = 1,
    use_cache: bool = True,
) -> list[list[Hypothesis]]:
    """Answers that the passages' beams find, ranked by p(a|q) = Σ_z p(z|q) Π_t p(a_t | q, z, a_<t), best first.

    Args:
        generator: a transformers encoder-decoder or causal language model; decoded in evaluation mode, left in the
            mode it was in.
        input_ids_BKS: int64 token ids of the contexts (question and passage), padded on either side.
        attention_mask_BKS: 1 for real tokens, 0 for padding; at least one real token in each context.
        doc_scores_BK: the retriever's scores before the softmax; −inf marks an absent passage.
        num_beams, max_new_tokens, length_penalty, early_stopping: the beam of each (question, passage), as in
            `BeamSettings`. The answers that the beams find are ranked by p(a|q), whatever the length penalty.
        mode: "thorough" scores every answer under every passage, with extra forward passes of the decoder where a
            passage's beam did not hold it; "fast" counts those as zero.
        num_return_sequences: answers per question at most, up to num_beams.
        use_cache: False runs the decoder over the whole answer at every step: slower, with the same result.

    Returns:
        For each question its distinct answers; `Hypothesis.doc_log_posterior` has the shape (K,).

    Raises:
        ConfigError: the mode is unknown, a setting is out of range, or the generator writes no text or lacks a
            special token.
        ValueError: shapes do not fit, or a question has no finite document score.

    Source: Lewis et al. 2020 (arXiv 2005.11401), section 2.5, "RAG-Sequence", Thorough and Fast Decoding.
    """
    if mode not in get_args(Mode):
        raise ConfigError(f'Unknown decoding mode {mode!r}: expected "thorough" or "fast".')
    settings = BeamSettings(num_beams, max_new_tokens, length_penalty, early_stopping)
    check_decoding(generator, input_ids_BKS, attention_mask_BKS, doc_scores_BK, settings, num_return_sequences)
    B, K = doc_scores_BK.shape
    with decoding_mode(generator):
        contexts = input_ids_BKS.flatten(0, 1), attention_mask_BKS.flatten(0, 1)
        decoder = as_generator(generator).passage_decoder(*contexts, use_cache=use_cache)
        # Search each (question, passage) pair as a question with one passage of weight 1.
        beams = beam_search(decoder, torch.zeros(B * K, 1, device=doc_scores_BK.device), settings)
        log_docs_BK = doc_log_probs(doc_scores_BK.double()).cpu().numpy()
        candidates = _merge(beams, log_docs_BK)
        # Several end tokens may end the same answer, so distinct answers may need that many times more sequences.
        limit = num_return_sequences * len(decoder.tokens.ends)
        if mode == "thorough":
            score_candidates(decoder, candidates, limit)
        return [
            _rank(scores, log_docs_K, decoder.tokens, num_return_sequences, beams.log_probs_BH.dtype)
            for scores, log_docs_K in zip(candidates, torch.from_numpy(log_docs_BK), strict=True)
        ]


def _merge(beams: Beams, log_docs_BK: np.ndarray) -> list[CandidateScores]:
    tokens, lengths, log_probs = beams.tokens_BHT.tolist(), beams.lengths_BH.tolist(), beams.log_probs_BH.tolist()
    merged = []
    for b, log_docs_K in enumerate(log_docs_BK):
        K = len(log_docs_K)
        known: dict[tuple[int, ...], list[float | None]] = {}
        for k in range(K):
            n = b * K + k
            for sequence, length, log_prob in zip(tokens[n], lengths[n], log_probs[n], strict=True):
                if log_prob > float("-inf"):
                    known.setdefault(tuple(sequence[:length]), [None] * K)[k] = log_prob
        merged.append(CandidateScores(b * K, known, log_docs_K))
    return merged


def _rank(
    scores: CandidateScores, log_docs_K: Tensor, special: GenerationTokens, limit: int, dtype: torch.dtype
) -> list[Hypothesis]:
    absent = float("-inf")
    log_probs_CK = torch.from_numpy(np.where(scores.complete_CK, scores.log_probs_CK, absent))
    log_docs_CK = log_docs_K.expand_as(log_probs_CK)
    mixture_C = marginalize(log_probs_CK, log_docs_CK)
    posterior_CK = log_docs_CK + log_probs_CK - mixture_C.unsqueeze(1)
    order = mixture_C.argsort(descending=True, stable=True).tolist()
    # Keyed by the answer: two end tokens may end the same answer. The more probable sequence comes first and is kept.
    best: dict[tuple[int, ...], Hypothesis] = {}
    for c in order:
        generated = list(scores.answers[c])
        token_ids = special.strip(generated)
        log_prob = float(mixture_C[c])
        if scores.alive_C[c] and log_prob > absent and tuple(token_ids) not in best and len(best) < limit:
            best[tuple(token_ids)] = Hypothesis(
                token_ids, log_prob, log_prob, special.ended(generated), posterior_CK[c].to(dtype, copy=True)
            )
    return list(best.values())
