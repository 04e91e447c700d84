"""A worker reports every point of a curve once, even if workers are lost in between, and keeps the best weights."""

from __future__ import annotations

import json
from pathlib import Path

from rag_core.reading.contexts import ContextCount
from rag_core.training.checkpoint import Checkpoints
from tasks.tracking.reporter import Reporter


class Mlflow:
    """Stands for a run; remembers its points."""

    def __init__(self) -> None:
        self.points: list[tuple[int, str, float]] = []

    def log_metrics(self, metrics: dict[str, float], step: int) -> None:
        self.points += [(step, name, value) for name, value in metrics.items() if name != "contexts_cut_share"]


class Driver:
    """Stands for the link to the driver, which outlives a worker."""

    def __init__(self) -> None:
        self.logged: dict[str, int] = {}
        self.done = 0

    def start_at(self, step: int) -> dict[str, int]:
        self.done = step
        return dict(self.logged)

    def advance(self, steps: int, note: str) -> None:
        self.done += steps

    def mark_logged(self, curve: str, step: int) -> None:
        self.logged[curve] = step

    def stop_wanted(self) -> bool:
        return False


def _reporter(run: Mlflow, driver: Driver, folder: Path) -> Reporter:
    def save(draft: Path) -> None:
        (draft / "weights").write_text(str(len(run.points)))

    return Reporter(run, driver, save, lambda dev: dev["em"], 0, ContextCount(), Checkpoints(folder))  # type: ignore[arg-type]


def _steps(reporter: Reporter, first: int, last: int) -> None:
    for step in range(first, last + 1):
        reporter.count.contexts += 10
        reporter.count.contexts_cut += step
        reporter.log(step, {"train_nll": 1 / step})
        if step % 2 == 0:
            reporter.keep(step, {"em": -abs(step - 4.0)})


def test_a_replacement_worker_sends_the_points_that_the_lost_one_did_not(tmp_path: Path) -> None:
    run, driver = Mlflow(), Driver()
    _steps(undisturbed := _reporter(Mlflow(), Driver(), tmp_path / "undisturbed"), 1, 8)
    lost = _reporter(run, driver, tmp_path / "training")
    _steps(lost, 1, 3)
    state = json.loads(json.dumps(lost.state()))
    _steps(lost, 4, 6)  # the worker is lost after three steps that no checkpoint holds
    resumed = _reporter(run, driver, tmp_path / "training")
    resumed.restore(3, state)
    assert driver.done == 3
    _steps(resumed, 4, 8)
    assert resumed.result(8) == undisturbed.result(8)
    assert run.points == undisturbed.address.points  # type: ignore[attr-defined]
    assert driver.done == 8


def test_training_resumed_under_another_mlflow_run_sends_the_whole_curve(tmp_path: Path) -> None:
    _steps(undisturbed := _reporter(Mlflow(), Driver(), tmp_path / "undisturbed"), 1, 8)
    _steps(stopped := _reporter(Mlflow(), Driver(), tmp_path / "training"), 1, 5)
    run = Mlflow()
    resumed = _reporter(run, Driver(), tmp_path / "training")
    resumed.restore(5, json.loads(json.dumps(stopped.state())))
    _steps(resumed, 6, 8)
    assert sorted(run.points) == sorted(undisturbed.address.points)  # type: ignore[attr-defined]
    assert resumed.result(8) == undisturbed.result(8)
    assert resumed.result(8)["best_step"] == 4


def test_a_worker_that_starts_over_skips_the_points_that_the_lost_one_sent(tmp_path: Path) -> None:
    run, driver = Mlflow(), Driver()
    _steps(_reporter(run, driver, tmp_path / "training"), 1, 3)
    _steps(_reporter(run, driver, tmp_path / "training"), 1, 4)
    assert [step for step, name, _ in run.points if name == "train_nll"] == [1, 2, 3, 4]
    assert driver.done == 4
