"""Means of questions' scores: over all questions, by question type, and over several workers.

A mean is over the questions that have the score, and carries their number. Scores are fractions between 0 and 1, keyed
by name (`em`, `recall@5`). `evaluation.py` computes a question's scores.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from pydantic import BaseModel, Field

from rag_core.evaluation.metrics import Match

Scores = dict[str, float]


class MeanScores(BaseModel):
    """Means over some questions.

    `means` and `counts` have the same keys: a mean, and the number of questions it is over. `count` is the number of
    questions that can be scored, `unanswerable` the number of the others.
    """

    means: Scores = Field(default_factory=dict)
    counts: dict[str, int] = Field(default_factory=dict)
    count: int = 0
    unanswerable: int = 0

    @classmethod
    def of(cls, scored: Sequence[Mapping[str, float] | None]) -> MeanScores:
        """Compute the means of questions' scores; None stands for an unanswerable question."""
        answerable = [scores for scores in scored if scores is not None]
        counts = Counter(name for scores in answerable for name in scores)
        return cls(
            means=mean_scores(answerable),
            counts=dict(counts),
            count=len(answerable),
            unanswerable=len(scored) - len(answerable),
        )

    def as_json(self) -> dict[str, Any]:
        """Return the means by name, then the numbers of questions."""
        return {**self.means, "count": self.count, "unanswerable": self.unanswerable, "counts": self.counts}


class Evaluation(BaseModel):
    """Scores over all questions and by question type; any string is a type. `match` is how answers were compared."""

    match: Match = "words"
    overall: MeanScores
    by_type: dict[str, MeanScores] = Field(default_factory=dict)

    def as_json(self) -> dict[str, Any]:
        """Return the content of `rag evaluate --json`, `rag retrieve --json` and `scores.json`."""
        types = {name: scores.as_json() for name, scores in self.by_type.items()}
        return {**self.overall.as_json(), "match": self.match, "by_type": types}


def by_type(scored: Sequence[tuple[str | None, Mapping[str, float] | None]], match: Match = "words") -> Evaluation:
    """Compute means over all questions and over those of each type, from each question's type and scores."""
    groups: dict[str, list[Mapping[str, float] | None]] = {}
    for kind, scores in scored:
        if kind is not None:
            groups.setdefault(kind, []).append(scores)
    return Evaluation(
        match=match,
        overall=MeanScores.of([scores for _, scores in scored]),
        by_type={name: MeanScores.of(groups[name]) for name in sorted(groups)},
    )


def mean_scores(scored: Sequence[Mapping[str, float]]) -> Scores:
    """Mean of every score over the questions that have it."""
    return means_of(sums_and_counts(scored, dict.fromkeys(name for scores in scored for name in scores)))


def sums_and_counts(scored: Sequence[Mapping[str, float]], names: Collection[str]) -> Scores:
    """For each name, the sum of the score and the number of questions that have it; workers can add these up.

    Every worker passes the same names, whether or not one of its questions has the score.
    """
    sums: Scores = {}
    for name in names:
        values = [scores[name] for scores in scored if name in scores]
        sums |= {f"sum of {name}": float(sum(values)), f"count of {name}": float(len(values))}
    return sums


def means_of(sums: Mapping[str, float]) -> Scores:
    """Compute means from the result of `sums_and_counts`, added up or not; leave out scores that no question has."""
    names = [key.removeprefix("sum of ") for key in sums if key.startswith("sum of ")]
    return {name: sums[f"sum of {name}"] / sums[f"count of {name}"] for name in names if sums[f"count of {name}"]}
