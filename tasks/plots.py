"""Plots for the MLflow pages. Figures are made without a display and returned, not shown."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.figure import Figure


def recall_against_latency(index_details: Mapping[str, Any]) -> Figure:
    """Index recall@10 over milliseconds a query, one point for each search setting that was measured."""
    figure, axes = _figure("milliseconds per query", "recall@10 against exact search")
    points = index_details["recall_curve"]
    axes.plot([one["milliseconds_per_query"] for one in points], [one["recall_at_10"] for one in points], "o-")
    for one in points:
        label = f"{one['parameter']}={one['value']}" if one["parameter"] else index_details["factory"]
        axes.annotate(label, (one["milliseconds_per_query"], one["recall_at_10"]))
    axes.set_title(str(index_details["factory"]))
    return figure


def training_curves(
    history: Sequence[Mapping[str, float]], dev: Sequence[Mapping[str, float]]
) -> list[tuple[str, Figure]]:
    """Loss over steps (training and dev), and dev EM, F1 and recall over steps."""
    loss, axes = _figure("step", "nats per answer")
    axes.plot([one["step"] for one in history], [one["train_nll"] for one in history], label="train")
    if any("dev_nll" in one for one in dev):
        axes.plot([one["step"] for one in dev], [one["dev_nll"] for one in dev], "o-", label="dev")
    axes.legend()
    figures = [("loss.png", loss)]
    names = [name for name in (dev[0] if dev else {}) if name not in ("step", "dev_nll")]
    if names:
        scores, axes = _figure("step", "dev score")
        for name in names:
            axes.plot([one["step"] for one in dev], [one[name] for one in dev], "o-", label=name)
        axes.set_ylim(0, 1.02)
        axes.legend()
        figures.append(("dev_scores.png", scores))
    return figures


def scores_by_type(scores: Mapping[str, Mapping[str, float]], name: str) -> Figure:
    """One bar for each question type, and one for all questions."""
    figure, axes = _figure("", name)
    kinds = [kind for kind in scores if name in scores[kind]]
    axes.bar(range(len(kinds)), [scores[kind][name] for kind in kinds])
    axes.set_xticks(range(len(kinds)), kinds, rotation=45, ha="right")
    axes.set_ylim(0, 1.02)
    return figure


def recall_curve(scores: Mapping[str, float]) -> Figure:
    """Recall over k, by gold id and by answer string."""
    figure, axes = _figure("k", "recall@k")
    for prefix in ("recall@", "answer_recall@"):
        points = sorted(
            (int(name.removeprefix(prefix)), value) for name, value in scores.items() if name.startswith(prefix)
        )
        if points:
            axes.plot([k for k, _ in points], [value for _, value in points], "o-", label=f"{prefix}k")
    axes.set_ylim(0, 1.02)
    axes.legend()
    return figure


def _figure(x: str, y: str) -> tuple[Figure, Any]:
    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.subplots()
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    axes.grid(alpha=0.3)
    return figure, axes
