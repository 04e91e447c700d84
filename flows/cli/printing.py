"""Prints the results of commands: short tables, answers, and the addresses of the MLflow and Prefect pages."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, get_args

from rich import box
from rich.table import Table
from rich.text import Text

from rag_core.errors import ConfigError
from rag_core.network.addresses import without_credentials
from tasks.terminal import Terminal, shortened, styled

if TYPE_CHECKING:
    from flows.pipeline import PipelineResult
    from rag_core.evaluation.metrics import Match
    from rag_core.evaluation.scores import Evaluation, MeanScores
    from rag_core.model.reader import Answer
    from rag_core.reading.likelihood import Variant
    from tasks.results import StageResult

console = Terminal()


def parse_ks(text: str) -> list[int]:
    """Parse a list such as '1,5,20'; ConfigError for anything else."""
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isdigit() and int(part) > 0 for part in parts):
        raise ConfigError(f"--k {text!r} is not a list of positive numbers. Give for example --k 1,5,20.")
    return sorted({int(part) for part in parts})


def parse_variant(text: str | None) -> Variant | None:
    """Accept 'sequence', 'token' or None; ConfigError for anything else."""
    if text is None or text == "sequence" or text == "token":
        return text  # type: ignore[return-value]
    raise ConfigError(f"Unknown variant {text!r}. Give --variant sequence or --variant token.")


def parse_match(text: str) -> Match:
    """Accept 'words' or 'characters'; ConfigError for anything else."""
    from rag_core.evaluation.metrics import Match

    if text not in get_args(Match):
        raise ConfigError(f"Unknown rule {text!r} to compare answers. Give --match words or --match characters.")
    return text  # type: ignore[return-value]


def print_stage(result: StageResult) -> None:
    """Print a line for a finished stage, and another one if too many contexts were cut."""
    from tasks.reports.summary import cut_note

    counts = ", ".join(f"{count:,} {name.replace('_', ' ')}" for name, count in result.counts.items())
    state = "up to date" if result.skipped else f"{result.seconds:.1f} s"
    console.print(f"{result.stage}: {counts} → {result.path} ({state}; MLflow run {result.run_id})")
    if note := cut_note(result):
        console.print(note, style="yellow")


def print_scores(evaluation: Evaluation) -> None:
    """Print a table of scores: first a row for all questions, then a row for each question type."""
    from tasks.reports.score_tables import ALL, score_names

    names = score_names([evaluation.overall, *evaluation.by_type.values()])
    table = _score_table("", names, left_out=evaluation.overall.unanswerable > 0)
    _add_scores(table, styled(ALL, "bold"), evaluation.overall, names)
    table.add_section()
    for kind, scores in evaluation.by_type.items():
        _add_scores(table, Text(shortened(kind)), scores, names)
    console.print(table)
    _print_rules([evaluation])


def _score_table(first: str, names: list[str], *, left_out: bool, title: str | None = None) -> Table:
    table = Table(
        box=box.SIMPLE_HEAD, title=title, title_justify="left", pad_edge=False, show_edge=False, padding=(0, 1, 0, 0)
    )
    table.add_column(first, overflow="fold")
    # Two lines per heading, so that nine columns fit into 80 characters.
    short = [name.replace("answer_", "answer\n").replace("@", "\n@") for name in names]
    for name in ["questions", *(["left\nout"] if left_out else []), *short]:
        table.add_column(name, justify="right", vertical="top", no_wrap=True)
    return table


def _add_scores(table: Table, label: Text, scores: MeanScores, names: list[str]) -> None:
    from tasks.reports.score_tables import score_cell

    left_out = [f"{scores.unanswerable:,}"] if len(table.columns) == len(names) + 3 else []
    cells = [score_cell(scores, name).replace(" (", "\n(") for name in names]
    table.add_row(label, f"{scores.count:,}", *left_out, *cells)


def _print_rules(evaluations: list[Evaluation]) -> None:
    """Print below a table how answers were compared and which questions were left out."""
    from tasks.reports.score_tables import MATCH_NAMES

    rules = [
        f"Answers compared by {MATCH_NAMES[match]}."
        for match in dict.fromkeys(evaluation.match for evaluation in evaluations)
    ]
    groups = [evaluation.overall for evaluation in evaluations]
    if any(group.unanswerable for group in groups):
        rules.append("Left out: unanswerable questions.")
    if any(count != group.count for group in groups for count in group.counts.values()):
        rules.append("In brackets: the number of questions, if a mean is not over all of them.")
    console.print(" ".join(rules))


def print_answer(answer: Answer) -> None:
    """Print the answer, the other candidates, and the passages with p(z|q) and p(z|q,a)."""
    console.print(Text.assemble(styled(answer.text, "bold"), f"   (log-probability {answer.log_prob:.2f})"))
    for candidate in answer.candidates[1:]:
        console.print(f"  or: {candidate.text}   ({candidate.log_prob:.2f})")
    table = Table("passage", "text", "p(z|q)", "p(z|q,a)")
    for read in answer.passages:
        table.add_row(read.passage.id, read.passage.text, f"{read.prior:.3f}", f"{read.posterior:.3f}")
    console.print(table)


def print_pipeline(result: PipelineResult) -> None:
    """Print every system's test scores, every stage's time, and which stages cut too many contexts."""
    from tasks.reports.score_tables import score_names
    from tasks.reports.summary import cut_note

    evaluations = list(result.scores.values())
    # Recall by answer string is in scores.json only.
    overall = [evaluation.overall for evaluation in evaluations]
    names = [name for name in score_names(overall) if not name.startswith("answer_")]
    left_out = any(scores.unanswerable for scores in overall)
    table = _score_table("system", names, left_out=left_out, title="On the test questions")
    for system, evaluation in result.scores.items():
        _add_scores(table, Text(system), evaluation.overall, names)
    console.print(table)
    _print_rules(evaluations)
    times = Table("stage", "seconds", "", title="Stages")
    for stage in result.stages:
        times.add_row(stage.stage, f"{stage.seconds:.1f}", "up to date" if stage.skipped else "")
    times.add_row("all", f"{sum(stage.seconds for stage in result.stages):.1f}", "")
    console.print(times)
    for note in filter(None, map(cut_note, result.stages)):
        console.print(note, style="yellow")


def print_pages() -> None:
    """Print how to open the MLflow and Prefect pages."""
    addresses = (os.environ.get(name, "") for name in ("MLFLOW_TRACKING_URI", "PREFECT_API_URL"))
    mlflow_uri, prefect_url = map(without_credentials, addresses)
    mlflow_page = mlflow_uri if mlflow_uri.startswith("http") else "make mlflow   then http://127.0.0.1:5000"
    prefect_page = prefect_url.removesuffix("/api") if prefect_url else "make prefect  then http://127.0.0.1:4200"
    console.print(f"\nMLflow (compare the variants):  {mlflow_page}\nPrefect (flow runs):            {prefect_page}")
