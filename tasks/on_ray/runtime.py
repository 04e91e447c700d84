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
import tempfile
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray
from ray._private import ray_constants
from ray._private import services as ray_services
from ray._private.authentication.authentication_token_generator import generate_new_authentication_token
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TimeElapsedColumn, TimeRemainingColumn

from rag_core.errors import ConfigError
from tasks.environment.ray_cluster import check_ray, cluster_address, object_store_here
from tasks.environment.variables import seconds
from tasks.terminal import Terminal, say, text_column

POLL_SECONDS = 0.5
# Environment variable: how long a stage waits for a machine that can hold its first worker. Default 300.
CLUSTER_WAIT = "RAG_CLUSTER_WAIT_SECONDS"
# A worker's start takes seconds; after so many it is worth saying what is waited for.
NOTICE_SECONDS = 45
# Held while Ray or what lives in it is started, which may happen in a thread.
CLUSTER = threading.RLock()
# Settings of Ray Train on a machine of one's own: it asks its workers at short intervals whether they are done, nobody
# takes the machine away, and nobody reads the metrics of a dashboard that is not there.
TRAIN_ALONE = {
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.2",
    "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0",
    "RAY_TRAIN_METRICS_ENABLED": "0",
}
# On which interface the process groups of training workers listen.
GROUP_INTERFACES = ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME")


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
    """Connect to `RAY_ADDRESS`, or start Ray on this machine; does nothing if this process already has it.

    Raises:
        ConfigError: the cluster at `RAY_ADDRESS` does not answer, does not know us or is of another version; or this
            machine lacks what Ray needs (`tasks.environment.ray_cluster`).
    """
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
    check_ray()
    # What workers print stays in Ray's session folder: failures come back as exceptions, progress through the meter.
    if address := cluster_address():
        try:
            ray.init(logging_level=logging.ERROR, log_to_driver=False)
        except ConnectionError as error:
            raise ConfigError(
                f"The Ray cluster at {address} (RAY_ADDRESS) does not answer, or asks for another token than ours. Correct "
                "the address, give the cluster's token (RAY_AUTH_TOKEN_PATH names a file with it), or unset RAY_ADDRESS to "
                "work on this machine."
            ) from error
    else:
        for name, value in TRAIN_ALONE.items():
            os.environ.setdefault(name, value)
        store = object_store_here()
        if store.notice:
            say(store.notice, style="yellow")
        _make_token_once()
        # "local": never a cluster that another command on this machine has left running, or its address.
        with _loopback_only(), _without_api_server():
            ray.init(
                "local", include_dashboard=False, logging_level=logging.ERROR, log_to_driver=False, **store.options
            )
    for name in ("ray.train", "ray.tune", "ray._private"):
        logging.getLogger(name).setLevel(logging.ERROR)


def _make_token_once() -> None:
    """Make the token that Ray asks its clients for, where this user has none yet.

    Ray would do so by itself, but overwrite the file: of two commands that are started at once on a new machine, one would
    be kept out of its own cluster. A link is made by one of them alone, and to a file that is whole.
    """
    if any(os.environ.get(name) for name in ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH")):
        return
    token = Path.home() / ".ray" / "auth_token"
    if token.exists():
        return
    token.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile("w", dir=token.parent, prefix=".auth_token-") as draft:  # nobody else may read it
        draft.write(generate_new_authentication_token())
        draft.flush()
        with contextlib.suppress(FileExistsError):
            os.link(draft.name, token)


@contextlib.contextmanager
def _loopback_only() -> Iterator[None]:
    """Ray started in the block listens on 127.0.0.1 alone, its workers' process groups for training included.

    `_node_ip_address="127.0.0.1"` does not do that: Ray puts the machine's address in its place. What it does on macOS
    and Windows, where a cluster of several machines is not supported, is what is wanted here. The environment is for
    the processes that are started here and goes back after: another cluster may be used later.
    """
    before = dict(os.environ), ray_constants.ENABLE_RAY_CLUSTER
    interface = "lo0" if sys.platform == "darwin" else "lo"
    ours = {ray_constants.ENABLE_RAY_CLUSTERS_ENV_VAR: "0"} | dict.fromkeys(GROUP_INTERFACES, interface)
    os.environ |= ours
    ray_constants.ENABLE_RAY_CLUSTER = False
    try:
        yield
    finally:
        for name in ours:
            os.environ.pop(name)
            os.environ |= {name: before[0][name]} if name in before[0] else {}
        ray_constants.ENABLE_RAY_CLUSTER = before[1]


@contextlib.contextmanager
def _without_api_server() -> Iterator[None]:
    """Ray started in the block has no API server.

    Without its dashboard that process has one module left, which gathers usage reports: switched off, it still asks the
    metadata servers of three clouds where it runs (169.254.169.254, metadata.google.internal). It also takes 100 MB.
    """
    before = ray_services.start_api_server
    ray_services.start_api_server = lambda *_, **__: (None, None)
    try:
        yield
    finally:
        ray_services.start_api_server = before


def share_of_cluster(num_workers: int = 0) -> Share:
    """Resources for `num_workers` equal workers; 0 means one for each GPU, or one for each machine without GPUs.

    One worker with all cores beats several with one core each here: each pays its own imports and model. Each gets as
    many cores as let all of them be placed on the machines that are there; where even one core is too many, those that
    find no place wait for a machine to join. A machine that gives Ray no processor, such as a cluster's head, counts
    for nothing.
    """
    machines = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    cpus, gpus = ([int(machine.get(kind, 0)) for machine in machines] for kind in ("CPU", "GPU"))
    workers = num_workers or sum(gpus) or max(1, sum(1 for one in cpus if one))
    gpu = 1 if sum(gpus) >= workers else 0

    def places(each: int) -> int:
        return sum(min(own // each, own_gpus if gpu else own) for own, own_gpus in zip(cpus, gpus, strict=True))

    fitting = (each for each in range(max(cpus, default=1), 0, -1) if places(each) >= workers)
    return Share(workers, cpus=next(fitting, 1), gpus=gpu)


def cluster_wait() -> float:
    """Seconds that a stage waits for a machine; ConfigError if `RAG_CLUSTER_WAIT_SECONDS` is no such number."""
    text = os.environ.get(CLUSTER_WAIT) or "300"
    seconds(CLUSTER_WAIT, text)
    return float(text)


class Patience:
    """How long workers may wait for a machine: a cluster may have to start one, but not for ever."""

    def __init__(self, share: Share) -> None:
        self._share = share
        self._limit = cluster_wait()
        self._since: float | None = None
        self._told = False

    def check(self, *, waits: bool) -> None:
        """Called now and then; `waits`: not one worker has a place.

        Raises:
            ConfigError: that has lasted for `RAG_CLUSTER_WAIT_SECONDS`.
        """
        now = time.monotonic()
        self._since = (self._since or now) if waits else None
        waited = now - self._since if self._since else 0.0
        wanted = " and ".join(f"{amount:g} {kind}" for kind, amount in self._share.resources.items())
        if waited > min(NOTICE_SECONDS, self._limit) and not self._told:
            self._told = True
            text = f"No worker runs yet: waiting for a machine with {wanted} ({describe_cluster()})"
            say(text)
        if waited > self._limit:
            raise ConfigError(
                f"For {self._limit:g} s no machine of the Ray cluster has had {wanted} free for a worker; "
                f"{describe_cluster()}. Add machines, end what holds them, ask for more workers with less each "
                f"(num_workers), or allow more time ({CLUSTER_WAIT})."
            )


def describe_cluster() -> str:
    """Machines, and what they have and have free, in words."""
    total, free = ray.cluster_resources(), ray.available_resources()
    machines = sum(1 for node in ray.nodes() if node["Alive"])
    parts = [f"{free.get(kind, 0):g} of {total.get(kind, 0):g} {kind} free" for kind in ("CPU", "GPU")]
    return f"it has {machines} machine{'s' if machines > 1 else ''}, {parts[0]}, {parts[1]}"


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
        self._hub: Any = None

    def keep_hub_access(self, access: Any) -> None:
        """The driver's `HubAccess`, in memory, for workers that Ray Train starts."""
        self._hub = access

    def hub_access(self) -> Any:
        """What the driver gave; None after a restart of this actor."""
        return self._hub

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
    from rag_core.pretrained.hub.access import (
        hub_access,  # not for the actors of an index's shards, which fetch no model
    )

    meter = _meter()
    meter.reset.remote(done)
    meter.keep_hub_access.remote(hub_access())
    if done:
        text = f"{description}: {done} of {total} were finished by a run that was stopped; going on with the others"
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
    # Beside the driver: another machine may be taken away, and the stage goes on.
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=True)
    options = {"scheduling_strategy": here, "max_restarts": -1}
    return ProgressMeter.options(**options).remote()  # type: ignore[attr-defined]


def _meter() -> Any:
    # One for all stages: each would cost the start of a process.
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
                logging.getLogger(__name__).debug("progress not read: %s", error)
                lost = losses
            done = min(done, total)  # what a lost worker did is done, and counted, again
            if lost > losses:
                losses = lost
                text = f"{description}: a worker was lost; another one goes on from the last checkpoint"
                console.print(text, soft_wrap=True)
            bar.update(task, completed=done, note=note)
            if not console.is_terminal and done * 10 // max(total, 1) > last_tenth:
                last_tenth = done * 10 // max(total, 1)
                console.print(f"{description}: {done}/{total} in {time.monotonic() - started:.0f} s {note}")
            if last:
                return
