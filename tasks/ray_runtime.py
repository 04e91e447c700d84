"""Ray: one cluster for a process, workers × threads = cores, and progress that comes back to the terminal.

With `RAY_ADDRESS` set the stages run on that cluster; otherwise Ray starts on this machine, without its dashboard and
with its own token authentication left on, and ends with the process.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import os
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import ray
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

POLL_SECONDS = 0.5
# Held while Ray or what lives in it is started, which may happen in a thread.
CLUSTER = threading.RLock()
# Settings of Ray Train on a machine of one's own: it asks its workers at short intervals whether they are done, nobody
# takes the machine away, and nobody reads the metrics of a dashboard that is not there.
TRAIN_ALONE = {
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.2",
    "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0",
    "RAY_TRAIN_METRICS_ENABLED": "0",
}


@dataclass(frozen=True)
class Share:
    """What each of several equal workers gets."""

    num_workers: int
    cpus: int
    gpus: int

    @property
    def resources(self) -> dict[str, float]:
        """As Ray Train wants it."""
        return {"CPU": self.cpus, **({"GPU": self.gpus} if self.gpus else {})}


def ensure_ray() -> None:
    """Connect to `RAY_ADDRESS`, or start Ray on this machine; does nothing if this process already has it."""
    with CLUSTER:
        if not ray.is_initialized():
            _start_ray()


def job() -> str:
    """Names the connection to Ray: what was made in another one is gone."""
    return str(ray.get_runtime_context().get_job_id())


def _start_ray() -> None:
    # Ray's own notices would fight with ours for the terminal.
    os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    # What workers print stays in Ray's session folder: failures come back as exceptions, progress through the meter.
    if os.environ.get("RAY_ADDRESS"):
        ray.init(logging_level=logging.ERROR, log_to_driver=False)
    else:
        for name, value in TRAIN_ALONE.items():
            os.environ.setdefault(name, value)
        # "local": never a cluster that another command on this machine has left running, or its address.
        ray.init(
            "local",
            include_dashboard=False,
            logging_level=logging.ERROR,
            log_to_driver=False,
            _node_ip_address="127.0.0.1",
        )
    for name in ("ray.train", "ray.tune", "ray._private"):
        logging.getLogger(name).setLevel(logging.ERROR)


def share_of_cluster(num_workers: int = 0) -> Share:
    """Resources for `num_workers` equal workers; 0 means one for each GPU, or one for each machine without GPUs.

    One worker with all cores beats several with one core each here: each pays its own imports and model.
    """
    total = ray.cluster_resources()
    gpus, cpus = int(total.get("GPU", 0)), int(total.get("CPU", 1))
    workers = num_workers or gpus or sum(1 for node in ray.nodes() if node["Alive"])
    return Share(workers, cpus=max(1, cpus // workers), gpus=1 if gpus >= workers else 0)


def limit_threads(cpus: int) -> None:
    """Called in a worker: PyTorch and FAISS use as many threads as the worker has cores."""
    import faiss
    import torch

    torch.set_num_threads(cpus)
    faiss.omp_set_num_threads(cpus)


@ray.remote(num_cpus=0)
class ProgressMeter:
    """Counts what the workers have done; the driver asks it for the bar. Workers ask it what the driver wants."""

    def __init__(self) -> None:
        self.reset()

    def reset(self, done: int = 0) -> None:
        self._done = done
        self._note = ""
        self._losses = 0
        self._stopping = False
        self._told: dict[str, int] = {}

    def advance(self, amount: int, note: str = "") -> None:
        self._done += amount
        self._note = note or self._note

    def read(self) -> tuple[int, str, int]:
        return self._done, self._note, self._losses

    def start_at(self, done: int) -> None:
        """Training begins here, or goes on from here."""
        self._done = done

    def lose_worker(self) -> None:
        """A worker of training was lost, and another goes on."""
        self._losses += 1

    def stop(self) -> None:
        self._stopping = True

    def stopping(self) -> bool:
        """Whether training is to stop with a checkpoint."""
        return self._stopping

    def tell(self, curve: str, step: int) -> None:
        """The point of that step is in MLflow."""
        self._told[curve] = step

    def told(self) -> dict[str, int]:
        """Up to which step the points of each curve are in MLflow: a worker that goes on leaves those out."""
        return self._told


@contextlib.contextmanager
def progress(description: str, total: int, done: int = 0) -> Iterator[Any]:
    """A progress bar that workers advance: yields a `ProgressMeter` handle to pass to them.

    On a terminal it is a live bar; in a log it is one line at each tenth. `done` is what a former run has finished.
    """
    meter = _meter()
    meter.reset.remote(done)
    if done:
        text = f"{description}: {done} of {total} were finished by a run that was stopped; going on with the others"
        Console(stderr=True).print(text, highlight=False, soft_wrap=True)
    stop = threading.Event()
    watcher = threading.Thread(target=_watch, args=(meter, description, total, stop), daemon=True)
    watcher.start()
    try:
        yield meter
    finally:
        stop.set()
        watcher.join(timeout=10)


@functools.cache
def _meter_of(job: str) -> Any:
    return ProgressMeter.remote()  # type: ignore[attr-defined]


def _meter() -> Any:
    # One for all stages: each would cost the start of a process.
    return _meter_of(job())


def _watch(meter: Any, description: str, total: int, stop: threading.Event) -> None:
    console = Console(stderr=True)
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[note]}"),
    )
    started, last_tenth = time.monotonic(), 0
    done, note, losses = 0, "", 0
    with Progress(*columns, console=console, disable=not console.is_terminal) as bar:
        task = bar.add_task(description, total=total, note="")
        while True:
            last = stop.wait(POLL_SECONDS)
            try:
                done, note, lost = ray.get(meter.read.remote(), timeout=5)
            except (ray.exceptions.RayError, ray.exceptions.GetTimeoutError) as error:
                logging.getLogger(__name__).debug("progress not read: %s", error)
                lost = losses
            if lost > losses:
                losses = lost
                text = f"{description}: a worker was lost; another one goes on from the last checkpoint"
                console.print(text, highlight=False, soft_wrap=True)
            bar.update(task, completed=done, note=note)
            if not console.is_terminal and done * 10 // max(total, 1) > last_tenth:
                last_tenth = done * 10 // max(total, 1)
                console.print(
                    f"{description}: {done}/{total} in {time.monotonic() - started:.0f} s {note}", highlight=False
                )
            if last:
                return
