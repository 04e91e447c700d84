"""Scores as table cells: for the terminal, Prefect's pages and `summary.md`."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from rag_core.evaluation.metrics import Match
from rag_core.evaluation.scores import Evaluation, MeanScores
from tasks.markdown import table, text_cell

MATCH_NAMES: dict[Match, str] = {"words": "words (the published rule)", "characters": "characters"}
ALL = "all questions"
NONE = "–"
# Nobody reads a page with more types than that; scores.json has all of them.
MOST_TYPES = 50


def score_names(groups: Iterable[MeanScores]) -> list[str]:
    """Names of all scores that at least one group has, in order of appearance."""
    return list(dict.fromkeys(name for scores in groups for name in scores.means))


def score_cell(scores: MeanScores, name: str) -> str:
    """A score in percent, followed by its number of questions if that is smaller than the group's."""
    if name not in scores.means:
        return NONE
    count = scores.counts[name]
    return f"{100 * scores.means[name]:.1f}%" + (f" ({count:,})" if count != scores.count else "")


def scores_markdown(scores: MeanScores) -> dict[str, str]:
    """The scores of all questions and the numbers of questions, as rows of two cells."""
    rows = {name: score_cell(scores, name) for name in scores.means}
    return rows | {"questions": f"{scores.count:,}", "unanswerable questions, left out": f"{scores.unanswerable:,}"}


def types_markdown(evaluation: Evaluation) -> str:
    """A table with one row per question type; "" without types. Of more than MOST_TYPES it shows the largest."""
    if not evaluation.by_type:
        return ""
    groups = {ALL: evaluation.overall}
    largest = sorted(evaluation.by_type, key=lambda kind: -evaluation.by_type[kind].count)[:MOST_TYPES]
    named = [(kind, evaluation.by_type[kind]) for kind in sorted(largest)]
    names = score_names([*groups.values(), *evaluation.by_type.values()])
    rows = [_row(label, scores, names) for label, scores in [*groups.items(), *named]]
    note = (
        f"\n\nThe {len(named)} types with the most questions, of {len(evaluation.by_type)}."
        if len(named) < len(evaluation.by_type)
        else ""
    )
    return table(["type", "questions", "left out", *names], rows) + note


def _row(label: str, scores: MeanScores, names: Sequence[str]) -> list[str]:
    cells = [score_cell(scores, name) for name in names]
    return [text_cell(label), f"{scores.count:,}", f"{scores.unanswerable:,}", *cells]


def systems_markdown(scores: Mapping[str, Evaluation]) -> str:
    """A table with one row per system and one column per score of all test questions, and how answers were compared."""
    overall = {system: evaluation.overall for system, evaluation in scores.items()}
    names = score_names(overall.values())
    rows = [_row(system, group, names) for system, group in overall.items()]
    compared = {MATCH_NAMES[evaluation.match] for evaluation in scores.values()}
    return (
        table(["system", "questions", "left out", *names], rows)
        + f"\n\nAnswers compared by {', '.join(sorted(compared))}."
    )
