"""A training worker's connection to MLflow and the driver: metrics, progress, the best weights, requests to stop.

Only rank 0 writes. Every point of a curve goes to the stage's MLflow run once. A worker that replaces a lost one learns
from the driver which points are there. Training that continues under another MLflow run sends the earlier points first.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import ray

from rag_core.reading.contexts import ContextCount
from rag_core.training.checkpoint import Checkpoints
from rag_core.training.loop import Hooks, Place, sum_over_workers
from tasks.tracking.runs import RunAddress


class DriverLink:
    """A worker's end of the `ProgressMeter`. If the meter is lost, training continues without the driver seeing it."""

    def __init__(self, meter: Any) -> None:
        self._meter = meter
        self._pending: Any = None

    def start_at(self, step: int) -> dict[str, int]:
        """Report that training starts after `step`; returns up to which step each curve is in MLflow."""
        self._meter.start_at.remote(step)
        return dict(self._answer(self._meter.logged_steps.remote()) or {})

    def advance(self, steps: int, note: str) -> None:
        self._meter.advance.remote(steps, note)

    def mark_logged(self, curve: str, step: int) -> None:
        """Report that the curve's points up to `step` are in MLflow."""
        self._meter.mark_logged.remote(curve, step)

    def stop_wanted(self) -> bool:
        """Whether training is to stop. Never waits: the driver's answer may arrive a step later."""
        call = self._pending or self._meter.stopping.remote()
        ready, _ = ray.wait([call], timeout=0)
        self._pending = None if ready else call
        return bool(ready and self._answer(call))

    def _answer(self, call: Any) -> Any:
        try:
            return ray.get(call)
        except ray.exceptions.RayActorError as error:
            logging.getLogger(__name__).warning("The driver's meter is gone: %s", error)
            return None


@dataclass
class Reporter:
    """Sends a worker's metrics and progress, and keeps its best weights.

    `count` is the context reader's own counter, which grows while the worker trains.
    """

    address: RunAddress
    link: DriverLink
    save: Callable[[Path], None]
    better: Callable[[dict[str, float]], float]
    rank: int
    count: ContextCount
    checkpoints: Checkpoints
    history: list[dict[str, float]] = field(default_factory=list)
    dev: list[dict[str, float]] = field(default_factory=list)
    contexts: ContextCount = field(default_factory=ContextCount)
    _seen: int = 0
    _best: float | None = None
    _best_step: int = 0
    _logged: dict[str, int] | None = None

    @classmethod
    def of(
        cls,
        settings: dict[str, Any],
        place: Place,
        save: Callable[[Path], None],
        better: Callable[[dict[str, float]], float],
        count: ContextCount,
    ) -> Reporter:
        """The reporter of a worker whose loop has these `settings`."""
        link, checkpoints = DriverLink(settings["meter"]), Checkpoints(Path(settings["checkpoints"]))
        return cls(settings["address"], link, save, better, place.rank, count, checkpoints)

    def hooks(self, **others: Any) -> Hooks:
        """Hooks for `run_training`, with the caller's own `evaluate` and `batch`."""
        return Hooks(
            log=self.log, keep=self.keep, stop=self.link.stop_wanted, state=self.state, restore=self.restore, **others
        )

    def log(self, step: int, metrics: dict[str, float]) -> None:
        """Add a point to the training curves, with the share of contexts cut since the last point, over all workers.

        All ranks must call it. The other metrics are those of rank 0.
        """
        before, self.contexts = self.contexts, count_over_workers(self.count)
        metrics = {**metrics, "contexts_cut_share": (self.contexts - before).cut_share}
        if self.rank == 0:
            self.history.append({"step": step, **metrics})
            self._send("history")
            self.link.advance(step - self._seen, f"nll {metrics['train_nll']:.3f}")
            self._seen = step

    def keep(self, step: int, dev: dict[str, float]) -> None:
        """Add a point to the dev curves, and keep the weights if they are the best so far. All ranks must call it."""
        self.dev.append({"step": step, **dev})
        if self.rank == 0:
            self._send("dev")
        score = self.better(dev)
        if self._best is None or score > self._best:
            self._best, self._best_step = score, step
            if self.rank == 0:
                self.checkpoints.keep_best(step, self.save)

    def state(self) -> dict[str, Any]:
        """The state for a checkpoint. `count` is this worker's own, `contexts` the sum over all workers."""
        return {
            "history": self.history,
            "dev": self.dev,
            "best": self._best,
            "best_step": self._best_step,
            "contexts": asdict(self.contexts),
            "count": asdict(self.count),
        }

    def restore(self, step: int, state: dict[str, Any]) -> None:
        """Continue after `step` from the `state` of a checkpoint."""
        self.history, self.dev = state["history"], state["dev"]
        self._best, self._best_step, self._seen = state["best"], state["best_step"], step
        self.contexts = ContextCount(**state["contexts"])
        for name, value in state["count"].items():
            setattr(self.count, name, value)
        if self.rank == 0:
            for curve in ("history", "dev"):
                self._send(curve)

    def result(self, done: int) -> dict[str, Any]:
        """The return value of a worker's loop: the steps done, and all fields of a `TrainedModel` except its folder."""
        return {
            "done": done,
            "best_step": self._best_step,
            "history": self.history,
            "dev": self.dev,
            "contexts": self.contexts,
        }

    def _send(self, curve: str) -> None:
        """Send the curve's points that are not in MLflow yet."""
        if self._logged is None:
            self._logged = self.link.start_at(self._seen)
        points: list[dict[str, float]] = getattr(self, curve)
        new = [point for point in points if point["step"] > self._logged.get(curve, 0)]
        for point in new:
            metrics = {name: value for name, value in point.items() if name != "step"}
            if metrics:
                self.address.log_metrics(metrics, int(point["step"]))
        if new:
            self._logged[curve] = int(new[-1]["step"])
            self.link.mark_logged(curve, self._logged[curve])


def count_over_workers(count: ContextCount) -> ContextCount:
    """The sum of all workers' counts. All ranks must call it."""
    sums = sum_over_workers({name: float(value) for name, value in asdict(count).items()})
    return ContextCount(**{name: int(value) for name, value in sums.items()})
