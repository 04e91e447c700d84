"""The whole suite again and again, to find tests that fail now and then: `python -m tests.again --times 10`.

Every second run is shuffled, and every second pair has a busy processor core beside it. A line tells of each run; the failed
tests are named, with what runs that order again.
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
# Their draws are not to be the same in each process: see `pytest_collection_modifyitems` in conftest.py.
SHUFFLED = ["-p", "randomly", "--randomly-dont-reset-seed"]
BUSY = "while True: pass"


def main() -> None:
    """The command; pytest's own options come after `--`."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--times", type=int, default=4)
    parser.add_argument("options", nargs="*", help="for pytest, after --")
    given = parser.parse_args()
    failures = sum(not run(number, given.options) for number in range(given.times))
    print(f"{given.times - failures} of {given.times} runs were green")
    sys.exit(bool(failures))


def run(number: int, options: list[str]) -> bool:
    """One run; whether it was green."""
    seed, shuffled, busy = 1000 + number, number % 2 == 1, number % 4 > 1
    order = [*SHUFFLED, "--randomly-seed", str(seed)] if shuffled else []
    beside = subprocess.Popen([sys.executable, "-c", BUSY]) if busy else None
    before = time.monotonic()
    try:
        done = subprocess.run([*PYTEST, *order, *options], cwd=ROOT, capture_output=True, text=True)
    finally:
        if beside:
            beside.kill()
            beside.wait()
    words = f"{'shuffled, seed ' + str(seed) if shuffled else 'in order'}{', a busy core beside' if busy else ''}"
    last = done.stdout.strip().splitlines()[-1] if done.stdout.strip() else done.stderr.strip()[-500:]
    print(f"run {number + 1}, {words}, {time.monotonic() - before:.0f} s: {last}", flush=True)
    if done.returncode:
        log = ROOT / "runs" / f"test-again-{number + 1}.log"
        log.parent.mkdir(exist_ok=True)
        log.write_text(done.stdout + done.stderr)
        print(
            *re.findall(r"^(?:FAILED|ERROR) .*", done.stdout, re.MULTILINE), f"all of it: {log}", sep="\n", flush=True
        )
    return done.returncode == 0


if __name__ == "__main__":
    main()
