"""The benchmark runner: what passes, what the table says, and that a failed module does not stop the others."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from rich.console import Console

from benchmarks.__main__ import Outcome, Results, render
from benchmarks.harness import Line, Spread


def _line(**changes: object) -> Line:
    settings = {"path": "search, float32", "peer": "FAISS", "value": Spread.of([7.0, 9.0, 8.0]), "target": 8.0}
    return Line.model_validate(settings | changes)


@pytest.mark.parametrize(
    ("changes", "passed"),
    [
        ({}, True),
        ({"target": 8.1}, False),
        ({"target": 8.1, "higher_is_better": False}, True),
        ({"target": 7.9, "higher_is_better": False}, False),
        ({"memory": 0.5, "memory_target": 0.5}, True),
        ({"memory": 0.6, "memory_target": 0.5}, False),
        ({"memory": 0.6}, True),
        ({"outputs_equal": False}, False),
    ],
)
def test_a_line_passes_if_its_median_its_memory_and_its_outputs_do(changes: dict[str, object], passed: bool) -> None:
    assert _line(**changes).passed is passed
    assert Line.model_validate_json(_line(**changes).model_dump_json()).passed is passed


def test_the_table_holds_every_line_and_every_failure() -> None:
    outcomes = [
        Outcome(
            name="index", seconds=1, lines=[_line(limit_share=0.42), _line(target=9.0, memory=0.25, memory_target=0.5)]
        ),
        Outcome(name="loss", seconds=1, lines=[], error="RuntimeError: no such thing"),
    ]
    console = Console(width=220, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(render(Results(size="smoke", machine={}, outcomes=outcomes)))
    passing, short, failed = (row for row in console.export_text().splitlines() if row.startswith("│"))
    for said in ("search, float32", "FAISS", "8.00 × faster (7.00 to 9.00)", "≥ 8", "42%", "pass"):
        assert said in passing
    assert "0.25× (≤ 0.5)" in short
    assert "short" in short
    assert "loss" in failed
    assert "RuntimeError: no such thing" in failed


def test_an_unknown_benchmark_is_refused_with_the_known_ones(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks", "speed", "--json", str(tmp_path / "results.json")],
        capture_output=True,
        text=True,
        check=False,
        cwd=Path(__file__).resolve().parents[2],
        env={"PATH": "", "TERM": "dumb", "COLUMNS": "300"},
    )
    assert done.returncode == 2
    assert "infer_stage" in done.stderr
    assert not (tmp_path / "results.json").exists()
