"""Repeat the whole suite to find flaky tests: `python -m tests.again --times 10`.

Every second run is shuffled; every second pair of runs competes with a process that keeps one core busy. Prints a line
per run with its seed, and the failed tests.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PYTEST = [sys.executable, "-m", "pytest", "-q", "-n", "2", "--dist", "loadscope", "--no-loadscope-reorder"]
# Random draws must differ between processes: see `pytest_collection_modifyitems` in conftest.py.
SHUFFLED = ["-p", "randomly", "--randomly-dont-reset-seed"]
BUSY = "while True: pass"


def main() -> None:
    """Command line; pytest's own options come after `--`."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--times", type=int, default=4)
    parser.add_argument("options", nargs="*", help="for pytest, after --")
    arguments = parser.parse_args()
    failures = sum(not run(number, arguments.options) for number in range(arguments.times))
    print(f"{arguments.times - failures} of {arguments.times} runs were green")
    sys.exit(bool(failures))


def run(number: int, options: list[str]) -> bool:
    """Run the suite once; returns whether it was green."""
    seed, shuffled, busy = 1000 + number, number % 2 == 1, number % 4 > 1
    order = [*SHUFFLED, "--randomly-seed", str(seed)] if shuffled else []
    competitor = subprocess.Popen([sys.executable, "-c", BUSY]) if busy else None
    start = time.monotonic()
    try:
        result = subprocess.run([*PYTEST, *order, *options], cwd=ROOT, capture_output=True, text=True)
    finally:
        if competitor:
            competitor.kill()
            competitor.wait()
    conditions = f"{'shuffled, seed ' + str(seed) if shuffled else 'in order'}{', one core busy' if busy else ''}"
    summary = result.stdout.strip().splitlines()[-1] if result.stdout.strip() else result.stderr.strip()[-500:]
    print(f"run {number + 1}, {conditions}, {time.monotonic() - start:.0f} s: {summary}", flush=True)
    if result.returncode:
        log = ROOT / "runs" / f"test-again-{number + 1}.log"
        log.parent.mkdir(exist_ok=True)
        log.write_text(result.stdout + result.stderr)
        failures = re.findall(r"^(?:FAILED|ERROR) .*", result.stdout, re.MULTILINE)
        print(*failures, f"full output: {log}", sep="\n", flush=True)
    return result.returncode == 0


if __name__ == "__main__":
    main()
