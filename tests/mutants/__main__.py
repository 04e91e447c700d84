"""`python -m tests.mutants`: puts each fault into a copy of the project and prints the first test that fails."""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from rich.progress import track

from tests.mutants import MUTANTS
from tests.mutants.mutant import Mutant, mutated

PROJECT = Path(__file__).resolve().parents[2]
COPIED = ("rag_core", "tasks", "flows", "tests", "docs", "pyproject.toml")
TIMEOUT_SECONDS = 900


def main() -> None:
    """Run the mutants and print a Markdown table with the test that caught each."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", default="", help="run the mutants whose fault, file or tests contain this")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1)
    options = parser.parse_args()
    chosen = [mutant for mutant in MUTANTS if options.only in f"{mutant.fault} {mutant.file} {mutant.tests}"]
    rows, survivors = ["| fault | in | caught by |", "| --- | --- | --- |"], 0
    with ThreadPoolExecutor(options.jobs) as pool:
        results = zip(chosen, track(pool.map(caught, chosen), total=len(chosen), description="mutants"), strict=True)
        for mutant, test in results:
            survivors += test is None
            rows.append(f"| {mutant.fault} | `{mutant.file}` | {f'`{test}`' if test else 'nothing'} |")
    print(*rows, f"{len(chosen) - survivors} of {len(chosen)} caught", sep="\n")
    sys.exit(bool(survivors))


def caught(mutant: Mutant) -> str | None:
    """The first test that fails on the mutant, or None if none does.

    Raises:
        RuntimeError: the tests did not run (pytest's exit status is neither 0 nor 1), or took longer than the limit.
    """
    with tempfile.TemporaryDirectory(prefix="mutant-") as folder:
        copy = Path(folder)
        for name in COPIED:
            source = PROJECT / name
            (shutil.copytree if source.is_dir() else shutil.copy2)(source, copy / name)
        path = copy / mutant.file
        path.write_text(mutated(mutant, path.read_text(encoding="utf-8")), encoding="utf-8")
        command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", "--no-header"]
        run = subprocess.run(
            [*command, *mutant.tests.split()],
            cwd=copy,
            env=os.environ | {"PYTHONPATH": str(copy), "OMP_NUM_THREADS": "1"},
            capture_output=True,
            text=True,
            timeout=TIMEOUT_SECONDS,
        )
    if run.returncode not in (0, 1):
        raise RuntimeError(f"The tests of the mutant {mutant.fault!r} did not run:\n{run.stdout[-3000:]}{run.stderr}")
    failed = re.search(r"^FAILED (\S+::\w+)", run.stdout, re.MULTILINE)
    return failed.group(1).removeprefix("tests/") if failed else None


if __name__ == "__main__":
    main()
