"""How everything here is measured: two sides alternate, ratios of pairs are kept, and a line says whether it is enough.

Each side lives in a process of its own, so that its peak memory is its own, and waits while the other works. What the
arithmetic allows is taken from a large matrix product measured in the same run. This module knows no model and no path.
"""

from __future__ import annotations

import argparse
import multiprocessing
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import BaseModel, Field, computed_field

Size = Literal["full", "smoke"]
Precision = Literal["float32", "bfloat16"]
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


class Spread(BaseModel):
    """Median, minimum and maximum of what several pairs gave."""

    median: float
    minimum: float
    maximum: float
    count: int

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        """Spread of one value or more."""
        return cls(median=statistics.median(values), minimum=min(values), maximum=max(values), count=len(values))


class Line(BaseModel):
    """One line of the table. `value` is compared with `target`; `memory` with `memory_target`, where there is one."""

    path: str = Field(description="what was measured, with its precision: 'training step, RAG-Token, float32'")
    peer: str = Field(description="against whom; '' if against nobody")
    value: Spread
    unit: str = Field("× faster", description="what `value` counts: '× faster', '% of the step', 's', …")
    target: float
    higher_is_better: bool = True
    limit_share: float | None = Field(None, description="useful operations ÷ (our seconds × measured rate), 0 to 1")
    memory: float | None = Field(None, description="our peak memory ÷ the peer's")
    memory_target: float | None = None
    outputs: str = Field("", description="how the outputs compare")
    outputs_equal: bool = True
    details: dict[str, Any] = Field(default_factory=dict, description="everything else: seconds, bytes, settings")

    @computed_field  # type: ignore[prop-decorator]
    @property
    def passed(self) -> bool:
        """The median reaches the target, memory stays within its own, and the outputs are what they must be."""
        reached = self.value.median >= self.target if self.higher_is_better else self.value.median <= self.target
        fits = self.memory is None or self.memory_target is None or self.memory <= self.memory_target
        return reached and fits and self.outputs_equal


class Run(BaseModel):
    """One call of a side: its seconds, the process's peak memory, the peak's rise over the memory before, its result."""

    seconds: float
    peak_bytes: int
    rise_bytes: int
    result: Any


class Side:
    """A process that prepares its work once and does it when told.

    Args:
        prepare: a function of a module that can be imported; it returns the work, a function without arguments whose
            result can be pickled (small: NumPy arrays, numbers).
        arguments: for `prepare`.
    """

    def __init__(self, prepare: Callable[..., Callable[[], Any]], *arguments: Any) -> None:
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(theirs, prepare, arguments), daemon=True)
        self._process.start()
        theirs.close()
        self._receive()

    def __enter__(self) -> Side:
        return self

    def __exit__(self, *exception: object) -> None:
        self._pipe.close()
        self._process.join(timeout=30)
        if self._process.is_alive():
            self._process.terminate()

    def run(self) -> Run:
        """Do the work once."""
        self._pipe.send("run")
        found: Run = self._receive()
        return found

    def _receive(self) -> Any:
        try:
            answer = self._pipe.recv()
        except EOFError as error:
            raise RuntimeError("a side of the benchmark ended early; its traceback is above") from error
        return answer


class Pairs(BaseModel):
    """The runs of both sides, in pairs."""

    ours: list[Run]
    peer: list[Run]

    @property
    def speedup(self) -> Spread:
        """The peer's seconds ÷ ours."""
        return Spread.of([theirs.seconds / mine.seconds for mine, theirs in zip(self.ours, self.peer, strict=True)])

    @property
    def seconds(self) -> float:
        """Median of our seconds."""
        return statistics.median(run.seconds for run in self.ours)

    @property
    def peak_ratio(self) -> float:
        """Our process's peak memory ÷ the peer's."""
        return max(run.peak_bytes for run in self.ours) / max(run.peak_bytes for run in self.peer)

    @property
    def rise_ratio(self) -> float:
        """What our work added to the process's memory ÷ what the peer's did."""
        return max(run.rise_bytes for run in self.ours) / max(1, max(run.rise_bytes for run in self.peer))

    def details(self) -> dict[str, Any]:
        """What a line keeps of the runs beside its ratio."""
        return {
            name: {
                "seconds": [round(run.seconds, 4) for run in runs],
                "peak_mb": max(run.peak_bytes for run in runs) // 2**20,
                "rise_mb": max(run.rise_bytes for run in runs) // 2**20,
            }
            for name, runs in (("ours", self.ours), ("peer", self.peer))
        }


def alternate(ours: Side, peer: Side, pairs: int, warmup: int = 1) -> Pairs:
    """Run both sides in turn; the warm-up is not counted."""
    return in_turn({"ours": ours}, peer, pairs, warmup)["ours"]


def in_turn(ours: Mapping[str, Side], peer: Side, rounds: int, warmup: int = 1) -> dict[str, Pairs]:
    """Run several sides of ours and the peer in turn; each of ours is paired with the peer's run of its round."""
    sides = {**ours, "peer": peer}
    runs: dict[str, list[Run]] = {name: [] for name in sides}
    for number in range(-warmup, rounds):
        for name, side in sides.items():
            run = side.run()
            if number >= 0:
                runs[name].append(run)
    return {name: Pairs(ours=runs[name], peer=runs["peer"]) for name in ours}


def matmul_rate(precision: Precision, size: int = 2048, repeats: int = 8) -> float:
    """Floating-point operations a second of a product of two square matrices, best of `repeats`."""
    left, right = (torch.randn(size, size).to(DTYPES[precision]) for _ in range(2))
    best = float("inf")
    for _ in range(repeats):
        start = time.perf_counter()
        left @ right
        best = min(best, time.perf_counter() - start)
    return 2 * size**3 / best


def limit_share(operations: float, seconds: float, precision: Precision) -> float:
    """Which share of the machine's matrix-product rate the useful operations were done at."""
    return operations / seconds / matmul_rate(precision)


def main(measure: Callable[[Size], list[Line]]) -> None:
    """Entry point of a benchmark module: `--size`, and where to write the lines as JSON Lines (default: print)."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--size", choices=["full", "smoke"], default="full")
    parser.add_argument("--lines", type=Path, default=None)
    options = parser.parse_args()
    text = "".join(line.model_dump_json() + "\n" for line in measure(options.size))
    if options.lines:
        options.lines.write_text(text, encoding="utf-8")
    else:
        print(text, end="")


def _serve(pipe: Connection, prepare: Callable[..., Callable[[], Any]], arguments: Sequence[Any]) -> None:
    work = prepare(*arguments)
    pipe.send("ready")
    while True:
        try:
            pipe.recv()
        except EOFError:
            return
        _reset_peak()
        before = _memory("VmRSS")
        start = time.perf_counter()
        result = work()
        seconds = time.perf_counter() - start
        peak = _memory("VmHWM")
        pipe.send(Run(seconds=seconds, peak_bytes=peak, rise_bytes=max(0, peak - before), result=result))


def _reset_peak() -> None:
    if Path("/proc/self/clear_refs").exists():
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")


def _memory(name: str) -> int:
    """Bytes of a line of /proc/self/status; 0 where there is none."""
    status = Path("/proc/self/status")
    lines = status.read_text(encoding="ascii").splitlines() if status.exists() else []
    return sum(int(line.split()[1]) * 1024 for line in lines if line.startswith(name + ":"))
