"""Feed targets their numbered inputs: `python -m tests.fuzz TARGET … --inputs 100000 --seed 5`.

Prints a line of JSON for each: inputs, how many were read and refused, seconds, the slowest input, memory, and what was found.
An input that did neither of both is kept in `tests/fuzz/corpus/TARGET`, where `make test` reads it first. The number of
the input at hand stands in `--progress`, so that whoever started this process knows which one ended it.
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
    """An input took longer than `SECONDS`. No `Exception`, so that no reader takes it for a fault of the file."""


def keep(target: str, data: bytes) -> Path:
    """Store an input that was neither read nor refused."""
    file = KEPT / target / hashlib.sha256(data).hexdigest()[:16]
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_bytes(data)
    return file


@contextlib.contextmanager
def limited_memory() -> Iterator[None]:
    """In the block this process gets `BYTES` more address space: what asks for more, fails."""
    before = resource.getrlimit(resource.RLIMIT_AS)
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + BYTES, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)


def resident(what: str) -> int:
    """KiB of this process in memory: `VmRSS` now, `VmHWM` at most."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(f"{what}:"))


def _feed(fuzzed: Target, data: bytes) -> str:
    """Whether an input was read or refused. One that is too slow may try again: the machine may have been busy."""
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
    """Feed inputs `start` … `inputs` − 1."""

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
        # The high-water mark begins anew: that of the target before was its own.
        Path("/proc/self/clear_refs").write_text("5")
        began = time.monotonic()
        with limited_memory():
            for number in range(start, inputs):
                os.pwrite(progress, number.to_bytes(8, "little"), 0)
                data = numbered(seed, number, fuzzed.samples)
                at = time.perf_counter()
                try:
                    outcomes[_feed(fuzzed, data)] += 1
                except (Exception, TooSlowError) as error:
                    last = traceback.extract_tb(error.__traceback__)[-1]
                    findings.append(
                        f"{number}: {type(error).__name__}: {str(error)[:200]} at {last.filename}:{last.lineno}"
                    )
                    keep(target, data)
                slowest = max(slowest, time.perf_counter() - at)
                if len(findings) >= MOST_FINDINGS:
                    break
    grown = resident("VmHWM") - before
    return {
        "target": target,
        "inputs": sum(outcomes.values()) + len(findings),
        **outcomes,
        "seconds": round(time.monotonic() - began, 1),
        "slowest": round(slowest, 3),
        "grown_mb": grown // 1024,
        "findings": findings,
    }


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("targets", nargs="+", choices=[*TARGETS, *MODEL_TARGETS], metavar="TARGET")
    parser.add_argument("--inputs", type=int, default=100_000)
    parser.add_argument("--seed", type=int, default=5)
    parser.add_argument("--start", type=int, default=0)
    parser.add_argument("--progress", type=Path, default=Path(os.devnull))
    given = parser.parse_args()
    progress = os.open(given.progress, os.O_RDWR | os.O_CREAT)
    for target in given.targets:
        print(json.dumps(run(target, given.inputs, given.seed, given.start, progress)), flush=True)


if __name__ == "__main__":
    main()
