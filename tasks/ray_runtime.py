"""Ray: one cluster for a process, workers × threads = cores, and progress that comes back to the terminal.

With `RAY_ADDRESS` set the stages run on that cluster; otherwise Ray starts on this machine, without its dashboard and
with its own token authentication left on, and ends with the process.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import os
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import ray
from ray._private import ray_constants
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
        with _loopback_only():
            ray.init("local", include_dashboard=False, logging_level=logging.ERROR, log_to_driver=False)
    for name in ("ray.train", "ray.tune", "ray._private"):
        logging.getLogger(name).setLevel(logging.ERROR)


@contextlib.contextmanager
def _loopback_only() -> Iterator[None]:
    """Ray started in the block listens on 127.0.0.1 alone, its workers' process groups for training included.

    `_node_ip_address="127.0.0.1"` does not do that: Ray puts the machine's address in its place. What it does on macOS
    and Windows, where a cluster of several machines is not supported, is what is wanted here. The environment is for
    the processes that are started here and goes back after: another cluster may be used later.
    """
    before = dict(os.environ), ray_constants.ENABLE_RAY_CLUSTER
    interface = "lo0" if sys.platform == "darwin" else "lo"
    os.environ |= {ray_constants.ENABLE_RAY_CLUSTERS_ENV_VAR: "0", "GLOO_SOCKET_IFNAME": interface}
    ray_constants.ENABLE_RAY_CLUSTER = False
    try:
        yield
    finally:
        for name in (ray_constants.ENABLE_RAY_CLUSTERS_ENV_VAR, "GLOO_SOCKET_IFNAME"):
            os.environ.pop(name)
            os.environ |= {name: before[0][name]} if name in before[0] else {}
        ray_constants.ENABLE_RAY_CLUSTER = before[1]


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
    """Counts what the workers have done; the driver asks it for the bar."""

    def __init__(self) -> None:
        self.reset()

    def reset(self, done: int = 0) -> None:
        self._done = done
        self._note = ""

    def advance(self, amount: int, note: str = "") -> None:
        self._done += amount
        self._note = note or self._note

    def read(self) -> tuple[int, str]:
        return self._done, self._note


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
    with Progress(*columns, console=console, disable=not console.is_terminal) as bar:
        task = bar.add_task(description, total=total, note="")
        while True:
            last = stop.wait(POLL_SECONDS)
            try:
                done, note = ray.get(meter.read.remote(), timeout=5)
            except (ray.exceptions.RayError, ray.exceptions.GetTimeoutError) as error:
                logging.getLogger(__name__).debug("progress not read: %s", error)
                done, note = 0, ""
            bar.update(task, completed=done, note=note)
            if not console.is_terminal and done * 10 // max(total, 1) > last_tenth:
                last_tenth = done * 10 // max(total, 1)
                console.print(
                    f"{description}: {done}/{total} in {time.monotonic() - started:.0f} s {note}", highlight=False
                )
            if last:
                return
