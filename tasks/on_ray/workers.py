"""Long-lived Ray workers: processes that keep their imports from one stage to the next.

A worker process pays seconds for `import torch, transformers` before it does anything. So a process of ours has one set
of workers, made when first wanted, and every stage that runs equal jobs side by side uses it: `map_on_workers` deals
items out to them, `run_on_worker` gives one of them the whole job. They end with the process, when a stage wants another
number of them, or when a job is interrupted.
"""

from __future__ import annotations

import contextlib
import gc
import importlib
import logging
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Generic, TypeVar

import ray

from rag_core.cpu.heap import keep_freed_blocks, return_freed_blocks
from rag_core.errors import RagError
from rag_core.pretrained.hub.access import HubAccess, hub_access
from tasks.environment.ray_cluster import cluster_address
from tasks.on_ray.runtime import (
    CLUSTER,
    POLL_SECONDS,
    Patience,
    Share,
    ensure_ray,
    job,
    limit_threads,
    share_of_cluster,
)

Item = TypeVar("Item")
Found = TypeVar("Found")

# A worker that is lost (out of memory, a machine that was taken away) is replaced and its item done again, however many
# machines are lost in a stage. An item that loses its worker so many times over is at fault itself.
REPLACEMENTS = 3
# How a lost worker, or one that is out of reach, shows in the calls that it was given.
LOST = (ray.exceptions.RayActorError, ray.exceptions.OutOfMemoryError, ray.exceptions.ObjectLostError)
# The steps of a worker before its first item.
HERE, PREPARE = "here", "prepare"

_workers: list[Any] = []
_made_for: tuple[Share, str] | None = None


@ray.remote
class Worker:
    """A process with everything imported. `prepare` makes what a stage's calls share: its model, its index."""

    def __init__(self, cpus: int) -> None:
        limit_threads(cpus)
        keep_freed_blocks()
        self.warm("tasks.on_ray.embedding", "tasks.on_ray.answering")

    def warm(self, *modules: str) -> None:
        """Import these now, while the driver does something else."""
        for module in modules:
            importlib.import_module(module)

    def here(self) -> None:
        """Answered once the process runs."""

    def use_hub(self, access: HubAccess) -> None:
        """Fetch models as the driver would. An argument of a call stays in memory; one of `__init__` would not."""
        access.use()

    def prepare(self, make: Callable[..., Callable[[Any], Any]], *arguments: Any) -> None:
        """Make the function that `call` calls."""
        self._function = make(*arguments)

    def call(self, item: Any) -> Any:
        return self._function(item)

    def run(self, function: Callable[..., Any], *arguments: Any) -> Any:
        return function(*arguments)

    def forget(self) -> None:
        """Give back the memory of what `prepare` made."""
        self.__dict__.pop("_function", None)
        gc.collect()
        return_freed_blocks()


def workers_for(share: Share) -> list[Any]:
    """The workers, started if they are not there or were made for another share of the cluster."""
    global _made_for
    with CLUSTER:
        wanted = (share, job())
        if _made_for != wanted:
            close_workers()
            _workers[:] = [_start(share) for _ in range(share.num_workers)]
            _made_for = wanted
        return list(_workers)


def close_workers() -> None:
    """End the workers and give their cores back, for others to use or because what they do is not wanted any more."""
    global _made_for
    with CLUSTER:
        if _made_for and _made_for[1] == job():
            for worker in _workers:
                ray.kill(worker)
        _workers.clear()
        _made_for = None


def start_early(*modules: str) -> Callable[[], None]:
    """Start Ray and its workers in the background, while this process is busy with its own imports.

    Args:
        modules: what the workers will need beside what every one imports.

    Returns:
        a function that waits until this process is connected to a cluster at RAY_ADDRESS, and raises what `ensure_ray`
        raised; Ray on this machine is not waited for.
    """
    problems: list[RagError] = []
    connected = threading.Event()

    def start() -> None:
        try:
            try:
                ensure_ray()
            except RagError as error:
                problems.append(error)
                raise
            finally:
                connected.set()
            for worker in workers_for(share_of_cluster()):
                worker.warm.remote(*modules)
        except Exception as error:
            logging.getLogger(__name__).debug("Ray did not start early: %s", error)
        # Linux ends Ray's processes with the thread that started them, so this one stays as long as the main thread.
        threading.main_thread().join()
        ray.shutdown()

    def wait() -> None:
        if cluster_address():
            connected.wait()
        if problems:
            raise problems[0]

    threading.Thread(target=start, name="start Ray early").start()
    return wait


def map_on_workers(
    share: Share,
    make: Callable[..., Callable[[Item], Found]],
    arguments: Sequence[Any],
    items: Sequence[Item],
) -> list[Found]:
    """`make(*arguments)` once in each worker, then its result called on every item; what it found, in the items' order.

    Raises:
        RagError: as an item's call raised it.
        ConfigError: no machine of the cluster has room for a worker. Other failures of workers come as Ray raises them.
    """
    with _closing_on_failure():
        return _Deal(share, make, arguments, items).results()


def run_on_worker(share: Share, function: Callable[..., Found], *arguments: Any) -> Found:
    """`function(*arguments)` in the only worker of `share`; raises as `map_on_workers` does."""
    with _closing_on_failure():
        worker = _worker_that_is_here(share)
        worker.use_hub.remote(hub_access())
        found: Found = ray.get(worker.run.remote(function, *arguments))
        return found


@contextlib.contextmanager
def _closing_on_failure() -> Iterator[None]:
    try:
        yield
    except BaseException as error:
        # Ctrl-C, a fault, a lost machine: what the other workers are doing is of no use any more.
        close_workers()
        cause = getattr(error, "cause", None)
        if isinstance(cause, RagError):
            raise cause from error
        raise


class _Deal(Generic[Item, Found]):
    """Items dealt out to the workers of a share as these get ready, work, are lost and are replaced.

    A worker that cannot be placed holds up nobody: the others do its part.
    """

    def __init__(
        self,
        share: Share,
        make: Callable[..., Callable[[Item], Found]],
        arguments: Sequence[Any],
        items: Sequence[Item],
    ) -> None:
        self._share, self._make, self._items = share, make, items
        self._shared = [ray.put(one) for one in arguments]
        self._waiting = list(range(len(items)))[::-1]
        self._found: dict[int, Found] = {}
        self._losses: Counter[str] = Counter()
        # What each call under way is: the worker, and a place in `items` or one of the two steps before the first.
        self._running: dict[Any, tuple[Any, int | str]] = {}
        # Workers that run but are not prepared, and those that are and wait for an item.
        self._spare: list[Any] = []
        self._idle: list[Any] = []

    def results(self) -> list[Found]:
        """What was found for each item, in their order."""
        for worker in workers_for(self._share):
            self._running[worker.here.remote()] = (worker, HERE)
        patience = Patience(self._share)
        while len(self._found) < len(self._items):
            for call in ray.wait(list(self._running), num_returns=1, timeout=POLL_SECONDS)[0]:
                worker, step = self._running.pop(call)
                try:
                    self._go_on(worker, step, ray.get(call))
                except LOST as error:
                    self._make_good(worker, step, error)
            patience.check(waits=all(step == HERE for _, step in self._running.values()))
        for worker in workers_for(self._share):
            worker.forget.remote()
        return [self._found[place] for place in range(len(self._items))]

    def _go_on(self, worker: Any, step: int | str, found: Any) -> None:
        if isinstance(step, int):
            self._found[step] = found
        (self._spare if step == HERE else self._idle).append(worker)
        self._deal_out()

    def _make_good(self, lost: Any, step: int | str, error: Exception) -> None:
        """Another worker in the place of one that was lost; the item waits again, for whoever is free first."""
        if isinstance(step, int):
            self._waiting.append(step)
        new = _replace(lost, self._share)
        counted = f"item {step}" if isinstance(step, int) else f"start of worker {_workers.index(new)}"
        self._losses[counted] += 1
        if self._losses[counted] > REPLACEMENTS:
            raise error
        self._running[new.here.remote()] = (new, HERE)
        self._deal_out()

    def _deal_out(self) -> None:
        while self._idle and self._waiting:
            worker, place = self._idle.pop(), self._waiting.pop()
            self._running[worker.call.remote(self._items[place])] = (worker, place)
        preparing = sum(1 for _, step in self._running.values() if step == PREPARE)
        while self._spare and preparing < len(self._waiting):  # no more models than items
            worker, preparing = self._spare.pop(), preparing + 1
            worker.use_hub.remote(hub_access())
            self._running[worker.prepare.remote(self._make, *self._shared)] = (worker, PREPARE)


def _worker_that_is_here(share: Share) -> Any:
    """The only worker of `share`, once its process runs. One that was lost since the last stage is replaced."""
    (worker,) = workers_for(share)
    patience, losses = Patience(share), 0
    while True:
        here = worker.here.remote()
        while not ray.wait([here], timeout=POLL_SECONDS)[0]:
            patience.check(waits=True)
        try:
            ray.get(here)
            return worker
        except LOST:
            losses += 1
            if losses > REPLACEMENTS:
                raise
            worker = _replace(worker, share)


def _start(share: Share) -> Any:
    # Spread: two workers on one machine would share its memory, while another has none to do.
    options = {"num_cpus": share.cpus, "num_gpus": share.gpus, "scheduling_strategy": "SPREAD"}
    return Worker.options(**options).remote(share.cpus)  # type: ignore[attr-defined]


def _replace(lost: Any, share: Share) -> Any:
    # It may be out of reach only, and would come back to hold cores that its successor needs.
    ray.kill(lost)
    _workers[_workers.index(lost)] = found = _start(share)
    return found
