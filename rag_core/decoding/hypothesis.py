"""What decoding returns.

Legend: K passages per question, T answer tokens.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True, eq=False)
class Hypothesis:
    """An answer, its probability, and what it says about the passages.

    Attributes:
        token_ids: the answer's T tokens, without start, end and padding tokens.
        log_prob: log p(a|q) in nats under the mixture of passages, end token included. An answer that
            max_new_tokens cut off has no end token, and this is the log-probability of its tokens.
        doc_log_posterior: floating point, on the CPU. RAG-Sequence: log p(z|q,a), shape (K,); −inf in fast mode
            for passages whose beam did not hold the answer. RAG-Token: log p(z|q,a_<=t) as token t alone tells it,
            that is log p(z|q) + log p(a_t|q,z,a_<t) − log p(a_t|q,a_<t), shape (T, K).
    """

    token_ids: list[int]
    log_prob: float
    doc_log_posterior: Tensor
