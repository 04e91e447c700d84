"""What the commands print: short tables, answers, and where to look further."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import TYPE_CHECKING

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from rag_core.addresses import without_credentials
from rag_core.errors import ConfigError

if TYPE_CHECKING:
    from flows.pipeline import PipelineResult
    from rag_core.likelihood import Variant
    from rag_core.reader import Answer
    from tasks.results import StageResult

console = Console()


def parse_ks(text: str) -> list[int]:
    """'1,5,20' to numbers; ConfigError for anything else."""
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isdigit() and int(part) > 0 for part in parts):
        raise ConfigError(f"--k {text!r} is not a list of positive numbers. Give for example --k 1,5,20.")
    return sorted({int(part) for part in parts})


def parse_variant(text: str | None) -> Variant | None:
    """'sequence', 'token' or nothing; ConfigError for anything else."""
    if text is None or text == "sequence" or text == "token":
        return text  # type: ignore[return-value]
    raise ConfigError(f"Unknown variant {text!r}. Give --variant sequence or --variant token.")


def print_stage(result: StageResult) -> None:
    """One line for a finished stage, and one more if too many contexts were cut."""
    from tasks.summary import cut_note

    counts = ", ".join(f"{count:,} {name.replace('_', ' ')}" for name, count in result.counts.items())
    state = "up to date" if result.skipped else f"{result.seconds:.1f} s"
    console.print(f"{result.stage}: {counts} → {result.path} ({state}; MLflow run {result.run_id})", highlight=False)
    if note := cut_note(result):
        console.print(escape(note), style="yellow", highlight=False)


def print_scores(scores: Mapping[str, Mapping[str, float]]) -> None:
    """Question types as rows, scores as columns."""
    names = [name for name in scores["overall"] if name != "count"]
    table = Table("", "questions", *names)
    for kind, values in scores.items():
        cells = [f"{100 * values[name]:.1f}%" if name in values else "–" for name in names]
        table.add_row(kind, f"{int(values['count'])}", *cells)
    console.print(table)


def print_answer(answer: Answer) -> None:
    """The answer, its runners-up, and the passages with p(z|q) and p(z|q,a)."""
    console.print(f"[bold]{escape(answer.text)}[/]   (log-probability {answer.log_prob:.2f})", highlight=False)
    for candidate in answer.candidates[1:]:
        console.print(f"  or: {escape(candidate.text)}   ({candidate.log_prob:.2f})", highlight=False)
    table = Table("passage", "text", "p(z|q)", "p(z|q,a)")
    for read in answer.passages:
        row = (escape(read.passage.id), escape(read.passage.text))
        table.add_row(*row, f"{read.prior:.3f}", f"{read.posterior:.3f}")
    console.print(table)


def print_pipeline(result: PipelineResult) -> None:
    """Scores of every system on the test questions, the time of every stage, and where too many contexts were cut."""
    from tasks.summary import cut_note

    names = [name for name in next(iter(result.scores.values()))["overall"] if name in ("em", "f1") or "recall" in name]
    names = [name for name in names if not name.startswith("answer_")]
    table = Table("system", *names, "questions", title="On the test questions")
    for system, scores in result.scores.items():
        overall = scores["overall"]
        cells = [f"{100 * overall[name]:.1f}%" if name in overall else "–" for name in names]
        table.add_row(system, *cells, f"{int(overall['count'])}")
    console.print(table)
    times = Table("stage", "seconds", "", title="Stages")
    for stage in result.stages:
        times.add_row(stage.stage, f"{stage.seconds:.1f}", "up to date" if stage.skipped else "")
    times.add_row("all", f"{sum(stage.seconds for stage in result.stages):.1f}", "")
    console.print(times)
    for note in filter(None, map(cut_note, result.stages)):
        console.print(escape(note), style="yellow", highlight=False)


def print_pages() -> None:
    """How to open the MLflow and Prefect pages."""
    addresses = (os.environ.get(name, "") for name in ("MLFLOW_TRACKING_URI", "PREFECT_API_URL"))
    mlflow_uri, prefect_url = map(without_credentials, addresses)
    mlflow_page = mlflow_uri if mlflow_uri.startswith("http") else "make mlflow   then http://127.0.0.1:5000"
    prefect_page = prefect_url.removesuffix("/api") if prefect_url else "make prefect  then http://127.0.0.1:4200"
    console.print(f"\nMLflow (compare the variants):  {mlflow_page}\nPrefect (flow runs):            {prefect_page}")
