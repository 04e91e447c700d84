"""RAG-Sequence decoding: a beam per passage, then one ranking of all their answers under the mixture.

Candidates that a passage's beam did not hold are scored as a tree: their common beginnings are read once, and every step
reads the next tokens of all of them, for many passages together.

Legend: B questions, K passages per question, S context tokens, H hypotheses in a beam, T answer tokens, C candidates,
N contexts scored together, W beginnings of one length in a context's tree, E edges of the trees, V vocabulary.
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
from rag_core.likelihood import doc_log_probs, marginalize

Mode = Literal["thorough", "fast"]

# Bound of a scoring step's logits: 128 MB in float32.
_CHUNK_LOGITS = 1 << 25


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
    num_docs: int
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
        merged.append(_Candidates(first_context=b * K, num_docs=K, log_probs=known))
    return merged


class _Tree:
    """The answers that one context is asked for, as a tree of their beginnings."""

    def __init__(self, context: int, answers: list[tuple[int, ...]]) -> None:
        self.context, self.answers = context, answers
        # For each length, the beginnings that go on from there, in order, each with its place.
        self.levels: list[dict[tuple[int, ...], int]] = []
        for t in range(max(map(len, answers))):
            going_on = dict.fromkeys(answer[:t] for answer in answers if len(answer) > t)
            self.levels.append({beginning: place for place, beginning in enumerate(going_on)})

    @property
    def width(self) -> int:
        return max(map(len, self.levels))

    def edges(self, t: int) -> list[tuple[int, int]]:
        """The distinct (place, next token) of all answers longer than t."""
        return list(dict.fromkeys((self.levels[t][one[:t]], one[t]) for one in self.answers if len(one) > t))


def _score_missing(decoder: PassageDecoder, candidates: list[_Candidates]) -> None:
    """Fill in log p(a|q,z) for the passages whose beam did not hold the answer."""
    trees: list[tuple[_Tree, _Candidates, int]] = []
    for found in candidates:
        for k in range(found.num_docs):
            missing = [answer for answer, known in found.log_probs.items() if known[k] is None]
            if missing:
                trees.append((_Tree(found.first_context + k, missing), found, k))
    # Trees of like width together, so that few rows are padding.
    trees.sort(key=lambda one: -one[0].width)
    V = decoder.first_logits_NV.shape[1]
    while trees:
        size = max(1, _CHUNK_LOGITS // (trees[0][0].width * V))
        chunk, trees = trees[:size], trees[size:]
        scores = _score_trees(decoder, [tree for tree, *_ in chunk])
        for (_, found, k), of_tree in zip(chunk, scores, strict=True):
            for answer, log_prob in of_tree.items():
                found.log_probs[answer][k] = log_prob


def _score_trees(decoder: PassageDecoder, trees: list[_Tree]) -> list[dict[tuple[int, ...], float]]:
    """log p(a|q,z) of every answer of each tree, under its context."""
    contexts_N = torch.tensor([tree.context for tree in trees], device=decoder.device)
    decoder.restart(contexts_N)
    logits_NWV = decoder.first_logits_NV[contexts_N].unsqueeze(1)
    found_E: list[Tensor] = []
    for t in range(max(len(tree.levels) for tree in trees)):
        if t:
            logits_NWV = decoder.step(*_next_tokens(trees, t, decoder.device))
        edges = [(n, *edge) for n, tree in enumerate(trees) if t < len(tree.levels) for edge in tree.edges(t)]
        n_E, w_E, token_E = torch.tensor(edges, device=decoder.device).unbind(1)
        dtype = torch.promote_types(logits_NWV.dtype, torch.float32)
        found_E.append(torch.log_softmax(logits_NWV, dim=2, dtype=dtype)[n_E, w_E, token_E])
    values = iter(torch.cat(found_E).double().tolist())
    scores = [dict.fromkeys(tree.answers, 0.0) for tree in trees]
    for t in range(max(len(tree.levels) for tree in trees)):
        for tree, of_tree in zip(trees, scores, strict=True):
            if t < len(tree.levels):
                of_edge = {edge: next(values) for edge in tree.edges(t)}
                for answer in tree.answers:
                    if len(answer) > t:
                        of_tree[answer] += of_edge[tree.levels[t][answer[:t]], answer[t]]
    return scores


def _next_tokens(trees: list[_Tree], t: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """For the beginnings of length t: last token and place of the beginning before, (N, W), padded with zeros."""
    levels = [list(tree.levels[t]) if t < len(tree.levels) else [] for tree in trees]
    W = max(map(len, levels))
    tokens = [[one[-1] for one in level] + [0] * (W - len(level)) for level in levels]
    parents = [
        [tree.levels[t - 1][one[:-1]] for one in level] + [0] * (W - len(level))
        for tree, level in zip(trees, levels, strict=True)
    ]
    return torch.tensor(tokens, device=device), torch.tensor(parents, device=device)


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
