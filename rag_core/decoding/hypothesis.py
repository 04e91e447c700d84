"""`Hypothesis`, the result of decoding.

Legend: K passages per question, T answer tokens.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True, eq=False)
class Hypothesis:
    """An answer, its probability, and the passages' posterior.

    Attributes:
        token_ids: the answer's T tokens, without start, forced first, end and padding tokens.
        log_prob: log p(a|q) in nats under the mixture of passages, end token included if the answer has one.
        score: answers are ranked by it. RAG-Sequence: log_prob. RAG-Token: log_prob / length ** length_penalty,
            where an end token that was forced at max_new_tokens costs nothing.
        ended: the answer has an end token; False if max_new_tokens cut it off.
        doc_log_posterior: floating point, on the CPU. RAG-Sequence: log p(z|q,a), shape (K,); −inf in fast mode
            for passages whose beam did not hold the answer. RAG-Token: log p(z|q,a_<=t), updated by
            token t alone, that is log p(z|q) + log p(a_t|q,z,a_<t) − log p(a_t|q,a_<t), shape (T, K).
    """

    token_ids: list[int]
    log_prob: float
    score: float
    ended: bool
    doc_log_posterior: Tensor
