"""What a worker's training loop talks to: metrics, the best weights, progress, and whether it is to stop.

Only rank 0 writes. Points of the curves go to the stage's MLflow run once: a worker that goes on after a lost one knows
from the driver which are there, and a run that goes on in another MLflow run sends those of the former one first.
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
    """A worker's end of the `ProgressMeter`. Where that cannot be reached training goes on, unseen by the driver."""

    def __init__(self, meter: Any) -> None:
        self._meter = meter
        self._asked: Any = None

    def start_at(self, step: int) -> dict[str, int]:
        """Training begins after `step`; returns up to which step each curve is in MLflow."""
        self._meter.start_at.remote(step)
        return dict(self._answer(self._meter.told.remote()) or {})

    def advance(self, steps: int, note: str) -> None:
        self._meter.advance.remote(steps, note)

    def tell(self, curve: str, step: int) -> None:
        """The points of a curve are in MLflow up to `step`."""
        self._meter.tell.remote(curve, step)

    def stop_wanted(self) -> bool:
        """Whether training is to stop; never waits for the answer, which may come a step later."""
        asked = self._asked or self._meter.stopping.remote()
        ready, _ = ray.wait([asked], timeout=0)
        self._asked = None if ready else asked
        return bool(ready and self._answer(asked))

    def _answer(self, call: Any) -> Any:
        try:
            return ray.get(call)
        except ray.exceptions.RayActorError as error:
            logging.getLogger(__name__).warning("The driver's meter is gone: %s", error)
            return None


@dataclass
class Reporter:
    """A worker's way out: metrics, best weights, progress. `count` is its reader's, as it grows."""

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
    _told: dict[str, int] | None = None

    @classmethod
    def of(
        cls,
        settings: dict[str, Any],
        place: Place,
        save: Callable[[Path], None],
        better: Callable[[dict[str, float]], float],
        count: ContextCount,
    ) -> Reporter:
        """The reporter of a worker whose loop was given `settings`."""
        link, checkpoints = DriverLink(settings["meter"]), Checkpoints(Path(settings["checkpoints"]))
        return cls(settings["address"], link, save, better, place.rank, count, checkpoints)

    def hooks(self, **others: Any) -> Hooks:
        """For `run_training`, with the caller's own `evaluate` and `batch`."""
        return Hooks(
            log=self.log, keep=self.keep, stop=self.link.stop_wanted, state=self.state, restore=self.restore, **others
        )

    def log(self, step: int, metrics: dict[str, float]) -> None:
        """A point of the training curves, with the share of contexts cut since the last one, over all workers.

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
        """A point of the dev curves; the weights are kept if they are the best so far. All ranks must call it."""
        self.dev.append({"step": step, **dev})
        if self.rank == 0:
            self._send("dev")
        score = self.better(dev)
        if self._best is None or score > self._best:
            self._best, self._best_step = score, step
            if self.rank == 0:
                self.checkpoints.keep_best(step, self.save)

    def state(self) -> dict[str, Any]:
        """For a checkpoint. The contexts are this worker's own."""
        return {
            "history": self.history,
            "dev": self.dev,
            "best": self._best,
            "best_step": self._best_step,
            "contexts": asdict(self.contexts),
            "count": asdict(self.count),
        }

    def restore(self, step: int, state: dict[str, Any]) -> None:
        """Go on after `step` with what `state` told of."""
        self.history, self.dev = state["history"], state["dev"]
        self._best, self._best_step, self._seen = state["best"], state["best_step"], step
        self.contexts = ContextCount(**state["contexts"])
        for name, value in state["count"].items():
            setattr(self.count, name, value)
        if self.rank == 0:
            for curve in ("history", "dev"):
                self._send(curve)

    def result(self, done: int) -> dict[str, Any]:
        """What a worker's loop returns: the steps done, and all of a `TrainedModel` but its folder."""
        return {
            "done": done,
            "best_step": self._best_step,
            "history": self.history,
            "dev": self.dev,
            "contexts": self.contexts,
        }

    def _send(self, curve: str) -> None:
        """The points that are not in MLflow yet."""
        if self._told is None:
            self._told = self.link.start_at(self._seen)
        points: list[dict[str, float]] = getattr(self, curve)
        new = [point for point in points if point["step"] > self._told.get(curve, 0)]
        for point in new:
            figures = {name: value for name, value in point.items() if name != "step"}
            if figures:
                self.address.log_metrics(figures, int(point["step"]))
        if new:
            self._told[curve] = int(new[-1]["step"])
            self.link.tell(curve, self._told[curve])


def count_over_workers(count: ContextCount) -> ContextCount:
    """The sum of all workers' counts. All ranks must call it."""
    sums = sum_over_workers({name: float(value) for name, value in asdict(count).items()})
    return ContextCount(**{name: int(value) for name, value in sums.items()})
