"""log p(a|q,z) of RAG-Sequence's candidates under the passages whose beam did not hold them.

A passage's candidates are scored as a tree of prefixes: a prefix that they share is read once, and every decoder step
reads the next tokens of all candidates, for many passages together.

A candidate is dropped once it cannot be among the requested best. p(prefix|q,z) bounds p(a|q,z) from above. The
passages whose score is complete bound p(a|q) from below, and the best lower bounds of a question are the threshold. So
the result is exactly that of scoring everything.

Legend: K passages per question, C candidates of a question, N contexts scored together, W prefixes of one length in a
context's tree, E next tokens to look up, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from rag_core.generators.generator import PassageDecoder

# Most logits of a step: 128 MB in float32.
_CHUNK_LOGITS = 1 << 25
# Tolerance of a bound in nats, since log-probabilities are sums of rounded numbers.
_MARGIN = 1e-2

Answer = tuple[int, ...]


class CandidateScores:
    """The candidates of a question: the distinct generated sequences, end token included.

    Args:
        first_context: number of the question's first context in the decoder.
        known: for each sequence, log p(a|q,z) by passage; None where it is not known yet.
        log_docs_K: log p(z|q), float64.

    Attributes:
        log_probs_CK: log p(a|q,z); where `complete_CK` is false, that of the prefix read so far.
        alive_C: false for candidates that cannot be among the requested best.
    """

    def __init__(self, first_context: int, known: dict[Answer, list[float | None]], log_docs_K: np.ndarray) -> None:
        self.first_context, self.answers, self._log_docs_K = first_context, list(known), log_docs_K
        self.complete_CK = np.array([[log_prob is not None for log_prob in row] for row in known.values()])
        self.log_probs_CK = np.array([[log_prob or 0.0 for log_prob in row] for row in known.values()])
        self.alive_C = np.ones(len(known), dtype=bool)

    def drop_hopeless(self, limit: int) -> None:
        """Mark candidates that cannot be among the `limit` most probable ones as dead."""
        if self.alive_C.sum() <= limit:
            return
        terms_CK = self._log_docs_K + self.log_probs_CK
        upper_C = np.logaddexp.reduce(terms_CK, axis=1)
        lower_C = np.logaddexp.reduce(np.where(self.complete_CK, terms_CK, -np.inf), axis=1)
        threshold = np.sort(lower_C[self.alive_C])[-limit]
        self.alive_C &= upper_C >= threshold - _MARGIN

    def unread(self, k: int, t: int) -> list[int]:
        """Numbers of the living candidates whose token t has no score under passage k yet."""
        open_C = self.alive_C & ~self.complete_CK[:, k]
        return [int(c) for c in np.flatnonzero(open_C) if len(self.answers[c]) > t]

    def add(self, c: int, k: int, log_prob: float, t: int) -> None:
        """Add log p of token t of candidate c under passage k."""
        self.log_probs_CK[c, k] += log_prob
        self.complete_CK[c, k] = t + 1 == len(self.answers[c])


def score_candidates(decoder: PassageDecoder, questions: Sequence[CandidateScores], limit: int) -> None:
    """Complete log p(a|q,z) of each question's `limit` most probable candidates, and drop the others on the way."""
    for question in questions:
        question.drop_hopeless(limit)
    V = decoder.first_logits_NV.shape[1]
    # Score questions of similar size together, so that few rows are padding.
    waiting = sorted(questions, key=lambda question: -int(question.alive_C.sum()))
    while waiting:
        size = int(waiting[0].alive_C.sum()) * waiting[0].complete_CK.shape[1] * V
        chunk, waiting = waiting[: max(1, _CHUNK_LOGITS // size)], waiting[max(1, _CHUNK_LOGITS // size) :]
        _score_chunk(decoder, chunk, limit)


def _score_chunk(decoder: PassageDecoder, questions: Sequence[CandidateScores], limit: int) -> None:
    trees = [
        (question, k) for question in questions for k in range(question.complete_CK.shape[1]) if question.unread(k, 0)
    ]
    if not trees:
        return
    contexts_N = torch.tensor([question.first_context + k for question, k in trees], device=decoder.device)
    decoder.restart(contexts_N)
    logits_NWV = decoder.first_logits_NV[contexts_N].unsqueeze(1)
    places: list[dict[Answer, int]] = [{(): 0} for _ in trees]  # in each tree: prefix → its place among the W
    t = 0
    while True:
        _read_tokens(logits_NWV, trees, places, t)
        for question in questions:
            question.drop_hopeless(limit)
        t += 1
        prefixes = [
            list(dict.fromkeys(question.answers[c][:t] for c in question.unread(k, t))) for question, k in trees
        ]
        if not any(prefixes):
            return
        parents = [[before[prefix[:-1]] for prefix in level] for before, level in zip(places, prefixes, strict=True)]
        left = [n for n, level in enumerate(prefixes) if level]
        if 4 * len(left) <= 3 * len(trees):
            decoder.select(torch.tensor(left, device=decoder.device))
            trees = [trees[n] for n in left]
            prefixes, parents = [prefixes[n] for n in left], [parents[n] for n in left]
        places = [{prefix: place for place, prefix in enumerate(level)} for level in prefixes]
        tokens = [[prefix[-1] for prefix in level] for level in prefixes]
        logits_NWV = decoder.step(_padded(tokens, decoder.device), _padded(parents, decoder.device))


def _read_tokens(
    logits_NWV: Tensor, trees: Sequence[tuple[CandidateScores, int]], places: Sequence[dict[Answer, int]], t: int
) -> None:
    """Add the log-probability of token t to every candidate of the trees that has one."""
    lookups = [
        (n, places[n][question.answers[c][:t]], question.answers[c][t], question, c, k)
        for n, (question, k) in enumerate(trees)
        for c in question.unread(k, t)
    ]
    at_E3 = torch.tensor([lookup[:3] for lookup in lookups], device=logits_NWV.device)
    n_E, w_E, token_E = at_E3.unbind(1)
    dtype = torch.promote_types(logits_NWV.dtype, torch.float32)
    log_probs_E = torch.log_softmax(logits_NWV, dim=2, dtype=dtype)[n_E, w_E, token_E]
    for (*_, question, c, k), log_prob in zip(lookups, log_probs_E.tolist(), strict=True):
        question.add(c, k, log_prob, t)


def _padded(rows: Sequence[Sequence[int]], device: torch.device) -> Tensor:
    longest = max(map(len, rows))
    return torch.tensor([[*row, *[0] * (longest - len(row))] for row in rows], device=device)
