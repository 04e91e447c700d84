"""Connects to Ray, divides its cores among workers, and shows the workers' progress on the terminal.

With `RAY_ADDRESS` set, the stages run on that cluster. Otherwise Ray starts on this machine and ends with the
process; it runs without its dashboard and with its token authentication on.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import os
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TimeElapsedColumn, TimeRemainingColumn

from rag_core.errors import ConfigError
from tasks.environment.ray_cluster import check_ray, cluster_address, object_store_here
from tasks.environment.ray_internals import LOGGERS, new_authentication_token, single_machine, without_api_server
from tasks.environment.variables import seconds
from tasks.terminal import Terminal, say, text_column

POLL_SECONDS = 0.5
# Environment variable: how long a stage waits for a machine that can hold its first worker. Default 300.
CLUSTER_WAIT = "RAG_CLUSTER_WAIT_SECONDS"
# A worker starts within seconds. After this many, a line says that the stage waits for a machine.
NOTICE_SECONDS = 45
# Held while Ray or its actors start, because a thread may start them.
CLUSTER = threading.RLock()
# Settings of Ray Train on a single machine: poll the workers often, do not watch for preemption, and export no
# metrics, since no dashboard reads them.
TRAIN_ALONE = {
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.2",
    "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0",
    "RAY_TRAIN_METRICS_ENABLED": "0",
}
# The network interface on which the process groups of training workers listen.
GROUP_INTERFACES = ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME")


@dataclass(frozen=True)
class Share:
    """Resources of each of `num_workers` equal workers."""

    num_workers: int
    cpus: int
    gpus: int

    @property
    def resources(self) -> dict[str, float]:
        """In the form that Ray Train expects."""
        return {"CPU": self.cpus, **({"GPU": self.gpus} if self.gpus else {})}


def ensure_ray() -> None:
    """Connect to `RAY_ADDRESS`, or start Ray on this machine; does nothing if this process already has it.

    Raises:
        ConfigError: the cluster at `RAY_ADDRESS` does not answer, rejects our token or runs another version of
        Ray; or
            this machine lacks what Ray needs (`tasks.environment.ray_cluster`).
    """
    with CLUSTER:
        if not ray.is_initialized():
            _start_ray()


def job() -> str:
    """Id of this process's connection to Ray. Actors made under another id no longer exist."""
    return str(ray.get_runtime_context().get_job_id())


def _start_ray() -> None:
    # Ray's own notices would mix with ours on the terminal.
    os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    check_ray()
    # Workers' output stays in Ray's session folder. Failures come back as exceptions, progress through the
    # meter.
    if address := cluster_address():
        try:
            ray.init(logging_level=logging.ERROR, log_to_driver=False)
        except ConnectionError as error:
            raise ConfigError(
                f"The Ray cluster at {address} (RAY_ADDRESS) does not answer, or asks for another token than ours. "
                "Correct the address, give the cluster's token (RAY_AUTH_TOKEN_PATH names a file with it), or unset "
                "RAY_ADDRESS to work on this machine."
            ) from error
    else:
        for name, value in TRAIN_ALONE.items():
            os.environ.setdefault(name, value)
        store = object_store_here()
        if store.notice:
            say(store.notice, style="yellow")
        _make_token_once()
        interface = "lo0" if sys.platform == "darwin" else "lo"
        # "local": do not connect to a cluster that another command left running on this machine.
        with single_machine(dict.fromkeys(GROUP_INTERFACES, interface)), without_api_server():
            ray.init(
                "local", include_dashboard=False, logging_level=logging.ERROR, log_to_driver=False, **store.options
            )
    for name in LOGGERS:
        logging.getLogger(name).setLevel(logging.ERROR)


def _make_token_once() -> None:
    """Create the token that Ray's clients authenticate with, if this user has none yet.

    Ray would create it too, but it overwrites the file: if two commands start at once on a new machine, one of
    them could not connect to its own cluster. Creating a hard link succeeds for one command only, and the file
    behind it is complete.
    """
    if any(os.environ.get(name) for name in ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH")):
        return
    token = Path.home() / ".ray" / "auth_token"
    if token.exists():
        return
    token.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile("w", dir=token.parent, prefix=".auth_token-") as draft:  # nobody else may read it
        draft.write(new_authentication_token())
        draft.flush()
        with contextlib.suppress(FileExistsError):
            os.link(draft.name, token)


def share_of_cluster(num_workers: int = 0) -> Share:
    """Resources for `num_workers` equal workers; 0 means one for each GPU, or without GPUs one for each machine.

    One worker with all cores is faster here than several with one core each, because every worker pays for its
    own imports and model. Each worker gets the largest equal number of cores with which all of them fit on the
    machines. If they do not fit even with one core each, the others wait for a machine to join. Machines that
    give Ray no CPU, such as a cluster's head, are not counted.
    """
    machines = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    cpus, gpus = ([int(machine.get(kind, 0)) for machine in machines] for kind in ("CPU", "GPU"))
    workers = num_workers or sum(gpus) or max(1, sum(1 for count in cpus if count))
    gpu = 1 if sum(gpus) >= workers else 0

    def places(cores: int) -> int:
        """Workers that fit on the machines if each gets `cores` cores."""
        return sum(min(own // cores, own_gpus if gpu else own) for own, own_gpus in zip(cpus, gpus, strict=True))

    fitting = (cores for cores in range(max(cpus, default=1), 0, -1) if places(cores) >= workers)
    return Share(workers, cpus=next(fitting, 1), gpus=gpu)


def cluster_wait() -> float:
    """Seconds that a stage waits for a machine; ConfigError if `RAG_CLUSTER_WAIT_SECONDS` is no number of seconds."""
    text = os.environ.get(CLUSTER_WAIT) or "300"
    seconds(CLUSTER_WAIT, text)
    return float(text)


class PlacementTimeout:
    """Limits how long a stage waits for a machine that can hold its first worker; a cluster may have to start one."""

    def __init__(self, share: Share) -> None:
        self._share = share
        self._limit = cluster_wait()
        self._since: float | None = None
        self._noticed = False

    def check(self, *, waiting: bool) -> None:
        """Call at short intervals; `waiting` says that no worker has a machine yet.

        Raises:
            ConfigError: no worker has had a machine for `RAG_CLUSTER_WAIT_SECONDS`.
        """
        now = time.monotonic()
        self._since = (self._since or now) if waiting else None
        waited = now - self._since if self._since else 0.0
        requested = " and ".join(f"{amount:g} {kind}" for kind, amount in self._share.resources.items())
        if waited > min(NOTICE_SECONDS, self._limit) and not self._noticed:
            self._noticed = True
            text = f"No worker runs yet: waiting for a machine with {requested} ({describe_cluster()})"
            say(text)
        if waited > self._limit:
            raise ConfigError(
                f"For {self._limit:g} s no machine of the Ray cluster has had {requested} free for a worker; "
                f"{describe_cluster()}. Add machines, stop the jobs that use them, raise num_workers so that each "
                f"worker asks for less, or allow more time ({CLUSTER_WAIT})."
            )


def describe_cluster() -> str:
    """The cluster in words: its machines, and how many of their CPUs and GPUs are free."""
    total, free = ray.cluster_resources(), ray.available_resources()
    machines = sum(1 for node in ray.nodes() if node["Alive"])
    parts = [f"{free.get(kind, 0):g} of {total.get(kind, 0):g} {kind} free" for kind in ("CPU", "GPU")]
    return f"it has {machines} machine{'s' if machines > 1 else ''}, {parts[0]}, {parts[1]}"


def limit_threads(cpus: int) -> None:
    """Called in a worker: make PyTorch and FAISS use as many threads as the worker has cores."""
    import faiss
    import torch

    torch.set_num_threads(cpus)
    faiss.omp_set_num_threads(cpus)


@ray.remote(num_cpus=0)
class ProgressMeter:
    """Counts the workers' progress for the driver's bar; passes the driver's stop request and hub access to workers."""

    def __init__(self) -> None:
        self.reset()

    def reset(self, done: int = 0) -> None:
        self._done = done
        self._note = ""
        self._losses = 0
        self._stopping = False
        self._logged: dict[str, int] = {}
        self._hub: Any = None

    def keep_hub_access(self, access: Any) -> None:
        """Keep the driver's `HubAccess` in memory, for workers that Ray Train starts."""
        self._hub = access

    def hub_access(self) -> Any:
        """The driver's `HubAccess`; None after a restart of this actor."""
        return self._hub

    def advance(self, amount: int, note: str = "") -> None:
        self._done += amount
        self._note = note or self._note

    def read(self) -> tuple[int, str, int]:
        return self._done, self._note, self._losses

    def start_at(self, done: int) -> None:
        """Set the count at which training starts or resumes."""
        self._done = done

    def lose_worker(self) -> None:
        """Count a training worker that was lost and is replaced."""
        self._losses += 1

    def stop(self) -> None:
        self._stopping = True

    def stopping(self) -> bool:
        """Whether training should stop with a checkpoint."""
        return self._stopping

    def mark_logged(self, curve: str, step: int) -> None:
        """Note that a curve's points up to `step` are in MLflow."""
        self._logged[curve] = step

    def logged_steps(self) -> dict[str, int]:
        """For each curve, the step up to which MLflow has its points; a worker that resumes sends only later ones."""
        return self._logged


@contextlib.contextmanager
def progress(description: str, total: int, done: int = 0) -> Iterator[Any]:
    """Show a progress bar that workers advance; yield the `ProgressMeter` handle to pass to them.

    A terminal shows a live bar; a log gets one line per tenth. `done` is the part that an earlier run finished.
    """
    # Imported here: the actors of index shards import this module, and they fetch no model.
    from rag_core.pretrained.hub.access import hub_access

    meter = _meter()
    meter.reset.remote(done)
    meter.keep_hub_access.remote(hub_access())
    if done:
        text = f"{description}: an earlier run finished {done} of {total}; continuing with the rest"
        say(text)
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
    # On the driver's machine: other machines may be lost while the stage goes on.
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=True)
    options = {"scheduling_strategy": here, "max_restarts": -1}
    return ProgressMeter.options(**options).remote()  # type: ignore[attr-defined]


def _meter() -> Any:
    # One meter serves all stages, because each would cost the start of a process.
    return _meter_of(job())


def _watch(meter: Any, description: str, total: int, stop: threading.Event) -> None:
    console = Terminal(stderr=True)
    columns = (
        text_column("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        text_column("{task.fields[note]}"),
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
                logging.getLogger(__name__).debug("Progress not read: %s", error)
                lost = losses
            done = min(done, total)  # work of a lost worker is repeated and counted twice
            if lost > losses:
                losses = lost
                text = f"{description}: a worker was lost; a new one continues from the last checkpoint"
                console.print(text, soft_wrap=True)
            bar.update(task, completed=done, note=note)
            if not console.is_terminal and done * 10 // max(total, 1) > last_tenth:
                last_tenth = done * 10 // max(total, 1)
                console.print(f"{description}: {done}/{total} in {time.monotonic() - started:.0f} s {note}")
            if last:
                return
