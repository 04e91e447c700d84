"""Plots for the MLflow pages. Functions return figures, drawn without a display."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib import font_manager
from matplotlib.figure import Figure

from rag_core.evaluation.scores import Evaluation, MeanScores
from tasks.terminal import shortened

# More bars could not be distinguished; longer labels would leave no room for them.
MOST_BARS, MOST_LETTERS = 40, 40
# Fonts that systems install for Chinese, Japanese, Korean, Thai and other scripts.
OTHER_FONTS = (
    "Noto Sans CJK SC", "Noto Sans CJK JP", "Noto Sans CJK KR", "Noto Sans SC", "Noto Sans JP", "Noto Sans KR",
    "Source Han Sans SC", "WenQuanYi Micro Hei", "WenQuanYi Zen Hei", "Droid Sans Fallback", "PingFang SC",
    "Hiragino Sans", "Apple SD Gothic Neo", "NanumGothic", "IPAGothic", "Noto Sans Thai", "Loma", "Arial Unicode MS",
)  # fmt: skip


def recall_against_latency(index_details: Mapping[str, Any]) -> Figure:
    """Index recall@10 over milliseconds per query: one point for each search setting that was measured."""
    figure, axes = _figure("milliseconds per query", "recall@10 against exact search")
    points = index_details["recall_curve"]
    axes.plot([point["milliseconds_per_query"] for point in points], [point["recall_at_10"] for point in points], "o-")
    for point in points:
        label = f"{point['parameter']}={point['value']}" if point["parameter"] else index_details["factory"]
        axes.annotate(label, (point["milliseconds_per_query"], point["recall_at_10"]))
    axes.set_title(str(index_details["factory"]))
    return figure


def training_curves(
    history: Sequence[Mapping[str, float]], dev: Sequence[Mapping[str, float]]
) -> list[tuple[str, Figure]]:
    """Named figures: loss over steps (training and dev), and dev EM, F1 and recall over steps if there are scores."""
    loss, axes = _figure("step", "nats per answer")
    axes.plot([point["step"] for point in history], [point["train_nll"] for point in history], label="train")
    if any("dev_nll" in point for point in dev):
        points = [point for point in dev if "dev_nll" in point]
        axes.plot([point["step"] for point in points], [point["dev_nll"] for point in points], "o-", label="dev")
    axes.legend()
    figures = [("loss.png", loss)]
    # The first points of a generator's curve have no scores yet.
    names = dict.fromkeys(name for point in dev for name in point if name not in ("step", "dev_nll"))
    if names:
        scores, axes = _figure("step", "dev score")
        for name in names:
            points = [point for point in dev if name in point]
            axes.plot([point["step"] for point in points], [point[name] for point in points], "o-", label=name)
        axes.set_ylim(0, 1.02)
        axes.legend()
        figures.append(("dev_scores.png", scores))
    return figures


def scores_by_type(evaluation: Evaluation, name: str) -> Figure | None:
    """One bar for all questions and one for each question type; None if no question has the score.

    If there are more than MOST_BARS types, those with the most questions are shown.
    """
    if name not in evaluation.overall.means:
        return None
    types = [kind for kind, scores in evaluation.by_type.items() if name in scores.means]
    largest = sorted(types, key=lambda kind: -evaluation.by_type[kind].counts[name])[:MOST_BARS]
    shown = [kind for kind in types if kind in set(largest)]
    groups = [evaluation.overall, *(evaluation.by_type[kind] for kind in shown)]
    figure, axes = _figure(name, "", height=max(2.0, 1.0 + 0.3 * len(groups)))
    places = range(len(groups))
    axes.barh(places, [scores.means[name] for scores in groups], color=["C1", *["C0"] * len(shown)])
    labels = [
        f"{label} ({scores.counts[name]:,})"
        for label, scores in zip(["all questions", *map(_label, shown)], groups, strict=True)
    ]
    axes.set_yticks(places, labels, parse_math=False, family=_families())
    axes.invert_yaxis()
    axes.margins(y=0.02)
    axes.set_axisbelow(True)
    axes.set_xlim(0, 1.02)
    if len(shown) < len(types):
        axes.set_title(f"the {len(shown)} types with the most questions, of {len(types)}", fontsize="medium")
    return figure


def recall_curve(scores: MeanScores) -> Figure | None:
    """Recall over k, by gold id and by answer string; None if there is no recall score."""
    curves = {
        prefix: sorted(
            (int(name.removeprefix(prefix)), value) for name, value in scores.means.items() if name.startswith(prefix)
        )
        for prefix in ("recall@", "answer_recall@")
    }
    if not any(curves.values()):
        return None
    figure, axes = _figure("k", "recall@k")
    for prefix, points in curves.items():
        if points:
            axes.plot([k for k, _ in points], [value for _, value in points], "o-", label=f"{prefix}k")
    axes.set_ylim(0, 1.02)
    axes.legend()
    return figure


def _label(kind: str) -> str:
    """A question type as one short line. Letters that no installed font has appear as escapes."""
    shown = "".join(
        letter if ord(letter) in _letters() else f"\\u{ord(letter):04x}" for letter in shortened(kind, MOST_LETTERS)
    )
    return shortened(shown, MOST_LETTERS)


@functools.cache
def _families() -> list[str]:
    """The default font, then installed fonts for other scripts; Matplotlib takes each letter from the first with it."""
    installed = {font.name for font in font_manager.fontManager.ttflist}
    return ["DejaVu Sans", *(name for name in OTHER_FONTS if name in installed)]


@functools.cache
def _letters() -> frozenset[int]:
    """The code points that the fonts of `_families` have."""
    files = [font_manager.findfont(name, fallback_to_default=False) for name in _families()]
    return frozenset(code for file in files for code in font_manager.get_font(file).get_charmap())


def _figure(x: str, y: str, height: float = 4.5) -> tuple[Figure, Any]:
    figure = Figure(figsize=(7, height), layout="constrained")
    axes = figure.subplots()
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    axes.grid(alpha=0.3)
    return figure, axes
