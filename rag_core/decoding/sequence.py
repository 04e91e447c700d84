"""RAG-Sequence decoding: a beam per passage, then one ranking of all their answers under the mixture.

Legend: B questions, K passages per question, S context tokens, H hypotheses in a beam, T answer tokens,
P (answer, context) pairs scored together.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from rag_core.decoding.beam_search import Beams, BeamSettings, EarlyStopping, beam_search, check_decoding
from rag_core.decoding.hypothesis import Hypothesis
from rag_core.decoding.passage_decoder import PassageDecoder, decoding_mode
from rag_core.errors import ConfigError
from rag_core.generation_tokens import GenerationTokens
from rag_core.likelihood import doc_log_probs, marginalize, token_log_probs

Mode = Literal["thorough", "fast"]

# Bounds of a scoring pass: logits (64 MB in float32), and rows, each with its copy of the cross-attention cache.
_CHUNK_LOGITS = 1 << 24
_CHUNK_PAIRS = 64


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
        generator: a transformers encoder-decoder model; decoded in evaluation mode, left in the mode it was in.
        input_ids_BKS: int64 token ids of the contexts (question and passage), padded.
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
        ConfigError: unknown mode, a setting out of range, a generator that is no encoder-decoder or lacks a special
            token.
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
        decoder = PassageDecoder(generator, *contexts, use_cache=use_cache)
        # Each (question, passage) is a question whose one passage has all the mass.
        beams = beam_search(decoder, torch.zeros(B * K, 1, device=doc_scores_BK.device), settings)
        candidates = _merge(beams, B, K)
        if mode == "thorough":
            _score_missing(decoder, candidates)
        log_docs_BK = doc_log_probs(doc_scores_BK).to(beams.log_probs_BH.dtype).cpu()
        return [
            _rank(found, log_docs_BK[b], decoder.tokens, num_return_sequences) for b, found in enumerate(candidates)
        ]


@dataclass
class _Candidates:
    """The distinct generated sequences of a question, end token included, and log p(a|q,z) where it is known."""

    first_context: int
    log_probs: dict[tuple[int, ...], list[float | None]]


def _merge(beams: Beams, B: int, K: int) -> list[_Candidates]:
    tokens, lengths, log_probs = beams.tokens_BHT.tolist(), beams.lengths_BH.tolist(), beams.log_probs_BH.tolist()
    merged = []
    for b in range(B):
        known: dict[tuple[int, ...], list[float | None]] = {}
        for k in range(K):
            n = b * K + k
            for sequence, length, log_prob in zip(tokens[n], lengths[n], log_probs[n], strict=True):
                if log_prob > float("-inf"):
                    known.setdefault(tuple(sequence[:length]), [None] * K)[k] = log_prob
        merged.append(_Candidates(first_context=b * K, log_probs=known))
    return merged


def _score_missing(decoder: PassageDecoder, candidates: list[_Candidates]) -> None:
    """Fill in log p(a|q,z) for the passages whose beam did not hold the answer."""
    missing = [
        (answer, known, k, found.first_context + k)
        for found in candidates
        for answer, known in found.log_probs.items()
        for k in range(len(known))
        if known[k] is None
    ]
    # Answers of like length together, so that little padding is computed.
    missing.sort(key=lambda pair: len(pair[0]))
    device, pad = decoder.mask_NS.device, decoder.tokens.pad
    V = decoder.vocab_size
    while missing:
        T = len(missing[-1][0])
        size = max(1, min(_CHUNK_PAIRS, _CHUNK_LOGITS // (T * V)))
        chunk, missing = missing[-size:], missing[:-size]
        labels_PT = torch.tensor([answer + (pad,) * (T - len(answer)) for answer, *_ in chunk], device=device)
        lengths_P1 = torch.tensor([[len(answer)] for answer, *_ in chunk], device=device)
        contexts_P = torch.tensor([context for *_, context in chunk], device=device)
        logits_PTV = decoder.score(labels_PT, contexts_P)
        beyond_PT = torch.arange(T, device=device) >= lengths_P1
        scores_P = token_log_probs(logits_PTV, labels_PT).masked_fill(beyond_PT, 0.0).sum(dim=1)
        for (_, known, k, _), log_prob in zip(chunk, scores_P.tolist(), strict=True):
            known[k] = log_prob


def _rank(candidates: _Candidates, log_docs_K: Tensor, special: GenerationTokens, limit: int) -> list[Hypothesis]:
    sequences = list(candidates.log_probs)
    absent = float("-inf")
    log_probs_CK = log_docs_K.new_tensor(
        [[absent if log_prob is None else log_prob for log_prob in candidates.log_probs[s]] for s in sequences]
    ).view(len(sequences), len(log_docs_K))
    log_docs_CK = log_docs_K.expand_as(log_probs_CK)
    mixture_C = marginalize(log_probs_CK, log_docs_CK)
    posterior_CK = log_docs_CK + log_probs_CK - mixture_C.unsqueeze(1)
    order = mixture_C.argsort(descending=True, stable=True).tolist()
    # Keyed by the answer: two end tokens may end the same one, and the better comes first.
    best: dict[tuple[int, ...], Hypothesis] = {}
    for c in order:
        generated = list(sequences[c])
        token_ids = special.strip(generated)
        log_prob = float(mixture_C[c])
        if log_prob > absent and tuple(token_ids) not in best and len(best) < limit:
            best[tuple(token_ids)] = Hypothesis(
                token_ids, log_prob, log_prob, special.ended(generated), posterior_CK[c].clone()
            )
    return list(best.values())
