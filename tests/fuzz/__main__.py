"""Feed numbered inputs to fuzzing targets: `python -m tests.fuzz TARGET … --inputs 100000 --seed 5`.

Prints one line of JSON per target: inputs, how many were read and refused, seconds, the slowest input, memory, and
findings. An input that was neither read nor refused is kept in `tests/fuzz/corpus/TARGET`, where `make test` reads it
first. The file `--progress` holds the number of the current input, so that the parent process knows which input killed
this one.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import os
import resource
import signal
import tempfile
import time
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from rag_core.errors import RagError
from tests.fuzz.mutations import numbered
from tests.fuzz.targets import MODEL_TARGETS, TARGETS, Target

KEPT = Path(__file__).parent / "corpus"
SECONDS = 2.0
BYTES = 2**30
MOST_FINDINGS = 10


class TooSlowError(BaseException):
    """An input took longer than `SECONDS`. Not an `Exception`, so no reader mistakes it for a fault of the file."""


def keep(target: str, data: bytes) -> Path:
    """Store an input that was neither read nor refused."""
    file = KEPT / target / hashlib.sha256(data).hexdigest()[:16]
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_bytes(data)
    return file


@contextlib.contextmanager
def limited_memory() -> Iterator[None]:
    """Limit this process to `BYTES` of additional address space in the block; larger allocations fail."""
    original = resource.getrlimit(resource.RLIMIT_AS)
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + BYTES, original[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, original)


def resident(counter: str) -> int:
    """Resident memory of this process in KiB: `VmRSS` now, `VmHWM` at its peak."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(f"{counter}:"))


def _feed(fuzzed: Target, data: bytes) -> str:
    """Whether an input was read or refused. A slow input gets three attempts, as the machine may have been busy."""
    for attempt in (1, 2, 3):
        signal.setitimer(signal.ITIMER_REAL, SECONDS)
        try:
            fuzzed.feed(data)
            return "read"
        except RagError:
            return "refused"
        except TooSlowError:
            if attempt == 3:
                raise
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
    raise AssertionError


def run(target: str, inputs: int, seed: int, start: int, progress: int) -> dict[str, Any]:
    """Feed inputs `start` to `inputs` − 1; returns the counts and findings."""

    def too_slow(*_: object) -> None:
        raise TooSlowError

    signal.signal(signal.SIGALRM, too_slow)
    home = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
    outcomes = {"read": 0, "refused": 0}
    slowest = 0.0
    findings: list[str] = []
    with tempfile.TemporaryDirectory(prefix="fuzz-", dir=home) as folder:
        fuzzed = (TARGETS | MODEL_TARGETS)[target](Path(folder))
        for sample in fuzzed.samples:
            fuzzed.feed(sample)
        before = resident("VmRSS")
        # Reset the high-water mark, which the previous target may have raised.
        Path("/proc/self/clear_refs").write_text("5")
        start_time = time.monotonic()
        with limited_memory():
            for number in range(start, inputs):
                os.pwrite(progress, number.to_bytes(8, "little"), 0)
                data = numbered(seed, number, fuzzed.samples)
                input_start = time.perf_counter()
                try:
                    outcomes[_feed(fuzzed, data)] += 1
                except (Exception, TooSlowError) as error:
                    last = traceback.extract_tb(error.__traceback__)[-1]
                    findings.append(
                        f"{number}: {type(error).__name__}: {str(error)[:200]} at {last.filename}:{last.lineno}"
                    )
                    keep(target, data)
                slowest = max(slowest, time.perf_counter() - input_start)
                if len(findings) >= MOST_FINDINGS:
                    break
    grown = resident("VmHWM") - before
    return {
        "target": target,
        "inputs": sum(outcomes.values()) + len(findings),
        **outcomes,
        "seconds": round(time.monotonic() - start_time, 1),
        "slowest": round(slowest, 3),
        "grown_mb": grown // 1024,
        "findings": findings,
    }


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("targets", nargs="+", choices=[*TARGETS, *MODEL_TARGETS], metavar="TARGET")
    parser.add_argument("--inputs", type=int, default=100_000)
    parser.add_argument("--seed", type=int, default=5)
    parser.add_argument("--start", type=int, default=0)
    parser.add_argument("--progress", type=Path, default=Path(os.devnull))
    options = parser.parse_args()
    progress = os.open(options.progress, os.O_RDWR | os.O_CREAT)
    for target in options.targets:
        print(json.dumps(run(target, options.inputs, options.seed, options.start, progress)), flush=True)


if __name__ == "__main__":
    main()
