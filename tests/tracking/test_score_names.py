"""Scores by question type in MLflow, plots and Prefect's tables, whatever the types are called."""

from __future__ import annotations

import json
import unicodedata
import warnings
from dataclasses import replace
from pathlib import Path

from hypothesis import given, settings
from hypothesis import strategies as st

from rag_core.evaluation.scores import MeanScores, by_type
from rag_core.questions.questions import Question, write_questions
from tasks.reports.plots import MOST_BARS, recall_curve, scores_by_type, training_curves
from tasks.reports.score_tables import systems_markdown, types_markdown
from tasks.tracking.metric_names import metric_prefixes, score_metrics, type_of_prefix
from tests.evaluation.test_evaluation import CASES, _published

TYPES = [
    "overall", "count", "em", "seconds", "a/b", "a//b", ".", "..", "../x", "/", ".hidden", "step2&3", "[/b]", "100%",
    "recall@5", "中文", "日本語 問題", "a\nb", " a", "a ", "a", "A", "É", "é", "e\u0301", "ß", "ss", "x:26:y", "a:-b",
    "$x^2$", "$\\frac$", "`c`|<b>", "x" * 5000, "x" * 5001, "é" * 300, "\u200b", "😀",
]  # fmt: skip


def _valid(name: str) -> None:
    from mlflow.utils.validation import _validate_metric_name

    _validate_metric_name(name)


def _as_a_lax_store_sees_it(name: str) -> str:
    """MySQL's usual collation: case, accents and spaces at the end do not count."""
    letters = unicodedata.normalize("NFKD", name.casefold())
    return "".join(letter for letter in letters if not unicodedata.combining(letter)).rstrip()


def _check_prefixes(types: list[str]) -> None:
    prefixes = metric_prefixes(types)
    for kind, prefix in prefixes.items():
        _valid(f"{prefix}/answer_recall_at_1000_count")
        assert "/" not in prefix
        assert type_of_prefix(prefix) == (kind if len(kind) < 50 else type_of_prefix(prefix))
    assert len({_as_a_lax_store_sees_it(prefix) for prefix in prefixes.values()}) == len(set(types))


def test_any_type_is_a_metric_name_that_mlflow_takes_and_reads_back() -> None:
    _check_prefixes(TYPES)
    plain = metric_prefixes(["country", "multi-hop", "Who is it", "step2&3", "中文"])
    assert list(plain.values()) == ["country", "multi-hop", "Who is it", "step2:26:3", "中文"]
    long = metric_prefixes(["x" * 5000])["x" * 5000]
    assert (type_of_prefix(long), long) == (None, metric_prefixes(["other", "x" * 5000])["x" * 5000])


@settings(max_examples=150, deadline=None, derandomize=True)
@given(st.lists(st.text(min_size=1, max_size=12).filter(lambda text: text.strip() and "\0" not in text), unique=True))
def test_drawn_types_are_metric_names_too(types: list[str]) -> None:
    prefixes = metric_prefixes(types)
    for kind, prefix in prefixes.items():
        _valid(f"{prefix}/em")
        assert type_of_prefix(prefix) == kind
    assert len(set(prefixes.values())) == len(types)


def test_no_types_metric_takes_the_name_of_another() -> None:
    evaluation = by_type([(kind, {"em": 1.0, "recall@5": 0.0}) for kind in TYPES] + [("a/b", None), ("a", {"em": 0.0})])
    metrics = score_metrics(evaluation)
    groups = 1 + len(TYPES)
    assert sum(name.endswith("em") for name in metrics) == groups
    assert (metrics["count"], metrics["unanswerable"], metrics["recall_at_5_count"]) == (len(TYPES) + 1, 1, len(TYPES))
    assert (metrics["overall/em"], metrics["count/count"], metrics["a/em"], metrics["a/recall_at_5_count"]) == (
        1,
        1,
        0.5,
        1,
    )
    assert metrics["a:2f:b/unanswerable"] == 1
    assert "overall/unanswerable" not in metrics


def test_a_plot_shows_any_type_without_warnings_and_of_many_the_largest() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        figure = scores_by_type(by_type([(kind, {"em": 1.0}) for kind in TYPES]), "em")
        assert figure is not None
        figure.savefig("/dev/null", format="png")
        labels = [label.get_text() for label in figure.axes[0].get_yticklabels()]
        assert labels[0] == f"all questions ({len(TYPES)})"
        assert {"overall (1)", "$x^2$ (1)", "$\\frac$ (1)", "a\\nb (1)"} <= set(labels)
        assert max(map(len, labels)) < 60
        evaluation = by_type([(f"type {n}", {"em": 0.5}) for n in range(200) for _ in range(1 + n % 3)])
        figure = scores_by_type(evaluation, "em")
        assert figure is not None
        figure.savefig("/dev/null", format="png")
        bars = figure.axes[0].patches
        assert len(bars) == MOST_BARS + 1
        assert {label.get_text()[-3:] for label in figure.axes[0].get_yticklabels()[1:]} == {"(3)"}


def test_there_is_no_plot_of_a_score_that_no_question_has() -> None:
    closed_book = by_type([("a", {"em": 1.0})])
    assert scores_by_type(closed_book, "recall@1") is None
    assert recall_curve(closed_book.overall) is None
    assert recall_curve(MeanScores.of([])) is None
    # A generator's first points have no dev scores; a dev score may come later, or without a likelihood.
    curves = training_curves([{"step": 1, "train_nll": 1.0}], [{"step": 1}, {"step": 2, "dev_em": 0.5}])
    assert [name for name, _ in curves] == ["loss.png", "dev_scores.png"]
    assert list(curves[1][1].axes[0].lines[0].get_xdata()) == [2]


def test_tables_in_markdown_have_a_row_a_type_and_a_dash_where_there_is_no_score() -> None:
    evaluation = by_type([("a|b", {"em": 1.0, "recall@1": 1.0}), ("<b>", {"em": 0.0}), (None, None)], "characters")
    rows = types_markdown(evaluation).split("\n")
    assert rows[0] == "| type | questions | left out | em | recall@1 |"
    assert rows[2:] == [
        "| all questions | 2 | 1 | 50.0% | 100.0% (1) |",
        r"| \<b\> | 1 | 0 | 0.0% | – |",
        r"| a\|b | 1 | 0 | 100.0% | 100.0% |",
    ]
    systems = systems_markdown({"RAG-Token": evaluation, "closed-book": by_type([("a", {"em": 0.25})], "characters")})
    assert "| closed-book | 1 | 0 | 25.0% | – |" in systems
    assert "Answers compared by characters." in systems


def test_two_hundred_odd_types_reach_mlflow_and_read_back(services: Path, tmp_path: Path) -> None:
    """More metrics than MLflow takes at once, names that it refuses, and a type named like the row of all questions."""
    import mlflow
    from mlflow import MlflowClient

    from flows.stages.evaluate import evaluate

    types = [*TYPES, *(f"[{n}] & co" for n in range(200 - len(TYPES)))]
    question, answer = CASES[0]
    cases = [(replace(question, id=str(n), type=kind), answer) for n, kind in enumerate(types)]
    cases.append((Question("x", "who?", (), "overall", is_impossible=True), answer))
    write_questions([question for question, _ in cases], tmp_path / "questions.jsonl")
    (tmp_path / "a[").mkdir()
    predictions = _published(tmp_path / "a[/b]|`c`", cases)
    result, evaluation = evaluate(predictions, tmp_path / "questions.jsonl", [1, 2], match="characters")
    assert (evaluation.overall.count, evaluation.overall.unanswerable, len(evaluation.by_type)) == (200, 1, 200)
    run = MlflowClient().get_run(result.run_id)
    assert len(run.data.metrics) > 1000
    assert (run.data.metrics["em"], run.data.metrics["count"], run.data.metrics["unanswerable"]) == (1, 200, 1)
    assert run.data.params == {"match": "characters", "k": "1,2"}
    assert {name: run.data.metrics[name] for name in score_metrics(evaluation)} == score_metrics(evaluation)
    report = json.loads(mlflow.artifacts.load_text(f"{run.info.artifact_uri}/scores.json"))
    assert set(report["by_type"]) == set(types)
    for kind, scores in report["by_type"].items():
        prefix = scores.get("metrics", f"{kind}/…").removesuffix("/…")
        assert run.data.metrics[f"{prefix}/em"] == scores["em"] == 1
    plots = {file.path for file in MlflowClient().list_artifacts(result.run_id, "plots")}
    assert plots == {"plots/em_by_type.png", "plots/recall_at_1_by_type.png", "plots/recall_at_k.png"}
