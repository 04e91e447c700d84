"""A beam search's settings and its result, and the check of settings and inputs before a search.

Legend: B questions, K passages per question, S context tokens, T answer tokens, H hypotheses in a beam.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from torch import Tensor

from rag_core.errors import ConfigError
from rag_core.generators.kinds import as_generator
from rag_core.generators.limits import refuse_long_search
from rag_core.reading.likelihood import check_contexts

EarlyStopping = bool | Literal["never"]


@dataclass(frozen=True)
class BeamSettings:
    """How a beam is searched.

    Attributes:
        num_beams: H, hypotheses kept. 1 is greedy: the first answer that ends is taken, whatever is set below.
        max_new_tokens: most tokens generated, end token and a forced first token included.
        length_penalty: hypotheses are ranked by log_prob / length ** length_penalty, with the length counted like
            max_new_tokens; 0 ranks by probability.
        early_stopping: when a question is done, after H hypotheses have ended.
            False: the best running hypothesis scores no better, at its present length, than the worst ended one;
            "never": nor could it at the full length (differs from False for a positive length_penalty);
            True: at once.
    """

    num_beams: int
    max_new_tokens: int
    length_penalty: float = 0.0
    early_stopping: EarlyStopping = False


@dataclass(frozen=True)
class Beams:
    """Finished hypotheses, best first; empty places have log_probs and scores −inf."""

    tokens_BHT: Tensor  # int64, generated tokens with the end token; undefined after the length
    lengths_BH: Tensor  # int64, generated tokens, end token included
    log_probs_BH: Tensor
    scores_BH: Tensor  # the beam's ranking: length penalty applied, a forced end token costs nothing
    doc_log_posteriors_BHTK: Tensor

    def select(self, index: Tensor) -> Beams:
        """Return the beams of some questions; `index` is int64 or bool."""
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
        ConfigError: a setting is out of range, the generator writes no text, or it has no positions for max_new_tokens.
        ValueError: shapes do not fit, scores are NaN or +inf, or a question has no passage (all scores −inf).
    """
    reads = as_generator(generator)
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
    if not isinstance(settings.early_stopping, bool) and settings.early_stopping != "never":
        raise ConfigError(f'early_stopping is {settings.early_stopping!r}; it must be true, false or "never".')
    check_contexts(input_ids_BKS, attention_mask_BKS, doc_scores_BK)
    longest = int(attention_mask_BKS.sum(dim=2).amax())
    refuse_long_search(reads, settings.max_new_tokens, context_tokens=longest)
    if not doc_scores_BK.amax(dim=1).isfinite().all():
        raise ValueError("doc_scores must hold a finite score for every question, and neither NaN nor +inf")
