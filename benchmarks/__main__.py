"""`python -m benchmarks`: run every benchmark in a fresh process, one after the other; write a table, JSON and MLflow.

A module that fails gets a line that says so, and the others still run. The exit code is 1 only if a module failed: a
ratio that misses its target is a finding, not an error.
"""

from __future__ import annotations

import platform
import subprocess
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from pydantic import BaseModel
from rich.console import Console
from rich.table import Table

from benchmarks.harness import Line, Size, matmul_rate

# Module → its folder, in the order in which they run.
MODULES = {
    "loss": "components",
    "training": "components",
    "memory": "generators",
    "retrieval": "components",
    "decoding": "components",
    "causal": "generators",
    "embedding": "components",
    "embed_stage": "stages",
    "growth": "components",
    "index": "components",
    "infer_stage": "stages",
    "fixed_cost": "stages",
}
LIBRARIES = ("torch", "transformers", "sentence-transformers", "ray", "prefect", "mlflow", "faiss-cpu", "numpy")


class Outcome(BaseModel):
    """Result of one module. If it failed, `error` is the last line of its output."""

    name: str
    seconds: float
    lines: list[Line]
    error: str = ""


class Results(BaseModel):
    """Results of one run of the command, as written to JSON."""

    size: Size
    machine: dict[str, Any]
    outcomes: list[Outcome]


def run_module(name: str, size: Size) -> Outcome:
    """Run a benchmark in a fresh process."""
    with tempfile.TemporaryDirectory() as folder:
        lines_file, log_file = Path(folder) / "lines.jsonl", Path(folder) / "log"
        command = [
            sys.executable,
            "-m",
            f"benchmarks.{MODULES[name]}.{name}",
            "--size",
            size,
            "--lines",
            str(lines_file),
        ]
        start = time.perf_counter()
        with log_file.open("wb") as log:
            code = subprocess.run(command, stdout=log, stderr=subprocess.STDOUT, check=False).returncode
        seconds = time.perf_counter() - start
        output = log_file.read_text(encoding="utf-8", errors="replace")
        if code:
            print(output[-8000:], file=sys.stderr)
            messages = [line for line in output.splitlines() if line.strip()]
            error = messages[-1] if messages else f"exit code {code}"
            return Outcome(name=name, seconds=seconds, lines=[], error=error)
        stored = lines_file.read_text(encoding="utf-8").splitlines()
    return Outcome(name=name, seconds=seconds, lines=[Line.model_validate_json(line) for line in stored])


def describe_machine() -> dict[str, Any]:
    """Processor, cores, versions, and the rates of a large matrix product, measured here."""
    file = Path("/proc/cpuinfo")
    cpuinfo = file.read_text(encoding="utf-8") if file.exists() else ""
    fields = dict(line.split(":", 1) for line in cpuinfo.splitlines() if ":" in line)
    fields = {key.strip(): value.strip() for key, value in fields.items()}
    return {
        "processor": fields.get("model name", platform.processor()),
        "cores": torch.get_num_threads(),
        "avx512_bf16": "avx512_bf16" in fields.get("flags", "").split(),
        "gflops_float32": matmul_rate("float32") / 1e9,
        "gflops_bfloat16": matmul_rate("bfloat16") / 1e9,
        "python": platform.python_version(),
        "libraries": {name: version(name) for name in LIBRARIES},
    }


def render(results: Results) -> Table:
    """The table: one row per line, and one per failed module."""
    table = Table(title=f"Benchmarks, {results.size}", show_lines=False)
    for heading in ("path", "against", "median (min to max)", "target", "limit", "memory", "outputs", ""):
        table.add_column(heading, overflow="fold")
    for outcome in results.outcomes:
        if outcome.error:
            table.add_row(outcome.name, "", "", "", "", "", outcome.error, "failed", style="red")
        for line in outcome.lines:
            value, sign = line.value, "≥" if line.higher_is_better else "≤"
            memory = "" if line.memory is None else f"{line.memory:.2f}×"
            if line.memory_target is not None:
                memory += f" (≤ {line.memory_target:g})"
            table.add_row(
                line.path,
                line.peer,
                f"{value.median:.2f} {line.unit} ({value.minimum:.2f} to {value.maximum:.2f})",
                f"{sign} {line.target:g}",
                "" if line.limit_share is None else f"{line.limit_share:.0%}",
                memory,
                line.outputs,
                "pass" if line.passed else "short",
                style="" if line.passed else "yellow",
            )
    return table


def log_to_mlflow(results: Results, file: Path) -> None:
    """Log one run to the experiment rag-bench: machine as parameters, figures of every line as metrics, JSON file."""
    import mlflow

    mlflow.set_experiment("rag-bench")
    with mlflow.start_run(run_name=f"bench-{results.size}"):
        mlflow.log_params({"size": results.size, **results.machine})
        for line in (line for outcome in results.outcomes for line in outcome.lines):
            name = "".join(letter if letter.isalnum() or letter in "_-. /" else "_" for letter in line.path)
            figures = {"median": line.value.median, "minimum": line.value.minimum, "maximum": line.value.maximum}
            figures |= {"passed": float(line.passed), "limit_share": line.limit_share, "memory": line.memory}
            mlflow.log_metrics({f"{name}/{key}": value for key, value in figures.items() if value is not None})
        mlflow.log_artifact(str(file))


def run(
    names: Annotated[
        list[str] | None, typer.Argument(help=f"benchmarks to run (default: all): {', '.join(MODULES)}")
    ] = None,
    size: Annotated[str, typer.Option(help="full, or smoke: every module once at a tiny size")] = "full",
    json_file: Annotated[Path, typer.Option("--json", help="file for the results")] = Path("runs/bench/results.json"),
    mlflow: Annotated[bool, typer.Option("--mlflow", help="also log the results to MLflow")] = False,
) -> None:
    """Run benchmarks and print one table."""
    unknown = set(names or ()) - set(MODULES)
    if unknown or size not in ("full", "smoke"):
        raise typer.BadParameter(f"The benchmarks are {', '.join(MODULES)}; the sizes are full and smoke.")
    start = time.perf_counter()
    results = Results(size=size, machine=describe_machine(), outcomes=[])  # type: ignore[arg-type]
    for name in names or MODULES:
        print(f"[{time.perf_counter() - start:5.0f} s] {name} ...", file=sys.stderr, flush=True)
        outcome = run_module(name, results.size)
        ending = f"failed: {outcome.error}" if outcome.error else f"{len(outcome.lines)} lines"
        print(f"[{time.perf_counter() - start:5.0f} s] {name}: {ending}", file=sys.stderr, flush=True)
        results.outcomes.append(outcome)
        json_file.parent.mkdir(parents=True, exist_ok=True)
        json_file.write_text(results.model_dump_json(indent=2) + "\n", encoding="utf-8")
    console = Console(width=None if sys.stdout.isatty() else 200)
    console.print(render(results))
    for key, value in results.machine.items():
        console.print(f"{key}: {value:.0f}" if isinstance(value, float) else f"{key}: {value}", highlight=False)
    print(f"{time.perf_counter() - start:.0f} s; all results in {json_file}")
    if mlflow:
        log_to_mlflow(results, json_file)
    if any(outcome.error for outcome in results.outcomes):
        raise typer.Exit(1)


if __name__ == "__main__":
    typer.run(run)
