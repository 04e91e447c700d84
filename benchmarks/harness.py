"""How all benchmarks measure: two sides alternate, and each pair of runs gives a ratio, compared with a target.

Each side has a process of its own, so that their peak memory is separate, and waits while the other works. The
machine's limit is the rate of a large matrix product, measured in the same run. This module knows no model and no
benchmark.
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
    """Median, minimum and maximum over several pairs."""

    median: float
    minimum: float
    maximum: float
    count: int

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        """Spread of one or more values."""
        return cls(median=statistics.median(values), minimum=min(values), maximum=max(values), count=len(values))


class Line(BaseModel):
    """One line of the table. `value` is compared with `target`, and `memory` with `memory_target` if it is set."""

    path: str = Field(description="what is measured, with its precision: 'training step, RAG-Token, float32'")
    peer: str = Field(description="the implementation compared with; '' if none")
    value: Spread
    unit: str = Field("× faster", description="unit of `value`: '× faster', '% of the step', 's', …")
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
        """Whether the median and the memory meet their targets and the outputs are as they must be."""
        reached = self.value.median >= self.target if self.higher_is_better else self.value.median <= self.target
        fits = self.memory is None or self.memory_target is None or self.memory <= self.memory_target
        return reached and fits and self.outputs_equal


class Run(BaseModel):
    """One call of a side: seconds, the process's peak memory, the peak's rise over the memory before, the result."""

    seconds: float
    peak_bytes: int
    rise_bytes: int
    result: Any


class Side:
    """A process that prepares its work once and does it on each `run`.

    Args:
        prepare: a module-level function that returns the work: a function without arguments whose result can be
            pickled and is small (NumPy arrays, numbers).
        arguments: arguments of `prepare`.
    """

    def __init__(self, prepare: Callable[..., Callable[[], Any]], *arguments: Any) -> None:
        context = multiprocessing.get_context("spawn")
        self._pipe, child_pipe = context.Pipe()
        self._process = context.Process(target=_serve, args=(child_pipe, prepare, arguments), daemon=True)
        self._process.start()
        child_pipe.close()
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
        run: Run = self._receive()
        return run

    def _receive(self) -> Any:
        try:
            message = self._pipe.recv()
        except EOFError as error:
            raise RuntimeError("a side of the benchmark ended early; its traceback is above") from error
        return message


class Pairs(BaseModel):
    """The runs of both sides, in pairs."""

    ours: list[Run]
    peer: list[Run]

    @property
    def speedup(self) -> Spread:
        """The peer's seconds ÷ ours."""
        return Spread.of([peer.seconds / ours.seconds for ours, peer in zip(self.ours, self.peer, strict=True)])

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
        """Memory added by our work ÷ memory added by the peer's."""
        return max(run.rise_bytes for run in self.ours) / max(1, max(run.rise_bytes for run in self.peer))

    def details(self) -> dict[str, Any]:
        """Details of the runs for a line: seconds and memory of both sides."""
        return {
            name: {
                "seconds": [round(run.seconds, 4) for run in runs],
                "peak_mb": max(run.peak_bytes for run in runs) // 2**20,
                "rise_mb": max(run.rise_bytes for run in runs) // 2**20,
            }
            for name, runs in (("ours", self.ours), ("peer", self.peer))
        }


def alternate(ours: Side, peer: Side, pairs: int, warmup: int = 1) -> Pairs:
    """Run both sides in turn, `pairs` times after `warmup` uncounted rounds."""
    return in_turn({"ours": ours}, peer, pairs, warmup)["ours"]


def in_turn(ours: Mapping[str, Side], peer: Side, rounds: int, warmup: int = 1) -> dict[str, Pairs]:
    """Run several sides of ours and the peer in turn. Each run of ours is paired with the peer's of the same round."""
    sides = {**ours, "peer": peer}
    runs: dict[str, list[Run]] = {name: [] for name in sides}
    for number in range(-warmup, rounds):
        for name, side in sides.items():
            run = side.run()
            if number >= 0:
                runs[name].append(run)
    return {name: Pairs(ours=runs[name], peer=runs["peer"]) for name in ours}


def matmul_rate(precision: Precision, size: int = 2048, repeats: int = 8) -> float:
    """Floating-point operations per second of a product of two square matrices, best of `repeats`."""
    left, right = (torch.randn(size, size).to(DTYPES[precision]) for _ in range(2))
    best = float("inf")
    for _ in range(repeats):
        start = time.perf_counter()
        left @ right
        best = min(best, time.perf_counter() - start)
    return 2 * size**3 / best


def limit_share(operations: float, seconds: float, precision: Precision) -> float:
    """Rate of the useful operations as a share of the machine's matrix-product rate."""
    return operations / seconds / matmul_rate(precision)


def main(measure: Callable[[Size], list[Line]]) -> None:
    """Command line of a benchmark module: `--size`, and `--lines`, the JSON Lines file to write (default: print)."""
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
    """Bytes in a line of /proc/self/status; 0 on systems without it."""
    status = Path("/proc/self/status")
    lines = status.read_text(encoding="ascii").splitlines() if status.exists() else []
    return sum(int(line.split()[1]) * 1024 for line in lines if line.startswith(name + ":"))
