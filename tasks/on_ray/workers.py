"""Long-lived Ray workers: processes that keep their imports from one stage to the next.

A worker process spends seconds on `import torch, transformers` before it can work. So all stages of a driver process
share one set of workers, which starts when the first stage needs it. `map_on_workers` deals items out to the workers;
`run_on_worker` gives one worker the whole job. The workers end with the process, when a stage needs another number of
them, or when a job is interrupted.
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
    PlacementTimeout,
    Share,
    ensure_ray,
    job,
    limit_threads,
    share_of_cluster,
)

Item = TypeVar("Item")
Result = TypeVar("Result")

# A lost worker (out of memory, machine taken away) is replaced and its item is done again; a stage may lose any number
# of machines. But an item that loses more than this many workers is taken to be the cause, and the stage fails.
REPLACEMENTS = 3
# Exceptions of a call whose worker is lost or cannot be reached.
LOST = (ray.exceptions.RayActorError, ray.exceptions.OutOfMemoryError, ray.exceptions.ObjectLostError)
# The two steps of a worker before its first item: its process starts, then `prepare` runs.
START, PREPARE = "start", "prepare"

_workers: list[Any] = []
_made_for: tuple[Share, str] | None = None


@ray.remote
class Worker:
    """A process with everything imported. `prepare` loads what all calls of a stage share, such as model and index."""

    def __init__(self, cpus: int) -> None:
        limit_threads(cpus)
        keep_freed_blocks()
        self.warm("tasks.on_ray.embedding", "tasks.on_ray.answering")

    def warm(self, *modules: str) -> None:
        """Import these modules now, while the driver does something else."""
        for module in modules:
            importlib.import_module(module)

    def ping(self) -> None:
        """Returns as soon as the process runs."""

    def use_hub(self, access: HubAccess) -> None:
        """Give this worker the driver's access to the hub.

        It is an argument of a call, which stays in memory. An argument of `__init__` would not.
        """
        access.use()

    def prepare(self, make: Callable[..., Callable[[Any], Any]], *arguments: Any) -> None:
        """Make the function that `call` applies to items."""
        self._function = make(*arguments)

    def call(self, item: Any) -> Any:
        return self._function(item)

    def run(self, function: Callable[..., Any], *arguments: Any) -> Any:
        return function(*arguments)

    def forget(self) -> None:
        """Free the memory of what `prepare` made."""
        self.__dict__.pop("_function", None)
        gc.collect()
        return_freed_blocks()


def workers_for(share: Share) -> list[Any]:
    """The workers of this process; start them if there are none for this share of the cluster."""
    global _made_for
    with CLUSTER:
        requested = (share, job())
        if _made_for != requested:
            close_workers()
            _workers[:] = [_start(share) for _ in range(share.num_workers)]
            _made_for = requested
        return list(_workers)


def close_workers() -> None:
    """End the workers and free their cores."""
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
        modules: modules to import in the workers, besides those that every worker imports.

    Returns:
        a function that waits until this process is connected to the cluster at RAY_ADDRESS and raises the error of
        `ensure_ray`, if any. It does not wait for Ray on this machine.
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
        # On Linux, Ray's processes end with the thread that started them, so this thread stays until the main
        # thread ends.
        threading.main_thread().join()
        ray.shutdown()

    def wait() -> None:
        if cluster_address():
            connected.wait()
        if problems:
            raise problems[0]

    # Ray and Prefect both import pydantic.v1, whose modules import each other. When two threads do so at once, Python
    # breaks the deadlock by handing one of them a half-initialised module, so import it before there are two.
    importlib.import_module("pydantic.v1")
    threading.Thread(target=start, name="start Ray early").start()
    return wait


def map_on_workers(
    share: Share,
    make: Callable[..., Callable[[Item], Result]],
    arguments: Sequence[Any],
    items: Sequence[Item],
) -> list[Result]:
    """Call `make(*arguments)` once in each worker, and the function that it returns on every item.

    Returns:
        the function's results, in the order of the items.

    Raises:
        RagError: an item's call raised it.
        ConfigError: no machine of the cluster has room for a worker. Other failures of workers come as Ray raises them.
    """
    with _closing_on_failure():
        return _Dispatcher(share, make, arguments, items).results()


def run_on_worker(share: Share, function: Callable[..., Result], *arguments: Any) -> Result:
    """Call `function(*arguments)` in the only worker of `share`; raise the errors that `map_on_workers` raises."""
    with _closing_on_failure():
        worker = _running_worker(share)
        worker.use_hub.remote(hub_access())
        result: Result = ray.get(worker.run.remote(function, *arguments))
        return result


@contextlib.contextmanager
def _closing_on_failure() -> Iterator[None]:
    try:
        yield
    except BaseException as error:
        # Ctrl-C, an error, a lost machine: nobody needs the other workers' results any more.
        close_workers()
        cause = getattr(error, "cause", None)
        if isinstance(cause, RagError):
            raise cause from error
        raise


class _Dispatcher(Generic[Item, Result]):
    """Deals items out to the workers of a share, as workers get ready, finish items, are lost and are replaced.

    A worker that finds no machine does not delay the others; they do its items.
    """

    def __init__(
        self,
        share: Share,
        make: Callable[..., Callable[[Item], Result]],
        arguments: Sequence[Any],
        items: Sequence[Item],
    ) -> None:
        self._share, self._make, self._items = share, make, items
        self._shared = [ray.put(argument) for argument in arguments]
        self._waiting = list(range(len(items)))[::-1]
        self._results: dict[int, Result] = {}
        self._losses: Counter[str] = Counter()
        # For each unfinished call its worker, and the item's place in `items`, or START or PREPARE.
        self._running: dict[Any, tuple[Any, int | str]] = {}
        # Workers that run but are not prepared, and prepared workers that wait for an item.
        self._spare: list[Any] = []
        self._idle: list[Any] = []

    def results(self) -> list[Result]:
        """Do all items; their results in the order of the items."""
        for worker in workers_for(self._share):
            self._running[worker.ping.remote()] = (worker, START)
        timeout = PlacementTimeout(self._share)
        while len(self._results) < len(self._items):
            for call in ray.wait(list(self._running), num_returns=1, timeout=POLL_SECONDS)[0]:
                worker, step = self._running.pop(call)
                try:
                    self._advance(worker, step, ray.get(call))
                except LOST as error:
                    self._replace_lost(worker, step, error)
            timeout.check(waiting=all(step == START for _, step in self._running.values()))
        for worker in workers_for(self._share):
            worker.forget.remote()
        return [self._results[place] for place in range(len(self._items))]

    def _advance(self, worker: Any, step: int | str, result: Any) -> None:
        """Take the result of a worker's finished step, and give the worker its next one."""
        if isinstance(step, int):
            self._results[step] = result
        (self._spare if step == START else self._idle).append(worker)
        self._deal_out()

    def _replace_lost(self, lost: Any, step: int | str, error: Exception) -> None:
        """Start a worker in place of a lost one; the lost worker's item waits for the next free worker."""
        if isinstance(step, int):
            self._waiting.append(step)
        new = _replace(lost, self._share)
        cause = f"item {step}" if isinstance(step, int) else f"start of worker {_workers.index(new)}"
        self._losses[cause] += 1
        if self._losses[cause] > REPLACEMENTS:
            raise error
        self._running[new.ping.remote()] = (new, START)
        self._deal_out()

    def _deal_out(self) -> None:
        while self._idle and self._waiting:
            worker, place = self._idle.pop(), self._waiting.pop()
            self._running[worker.call.remote(self._items[place])] = (worker, place)
        preparing = sum(1 for _, step in self._running.values() if step == PREPARE)
        while self._spare and preparing < len(self._waiting):  # do not load more models than there are items
            worker, preparing = self._spare.pop(), preparing + 1
            worker.use_hub.remote(hub_access())
            self._running[worker.prepare.remote(self._make, *self._shared)] = (worker, PREPARE)


def _running_worker(share: Share) -> Any:
    """Wait until the only worker of `share` runs; replace it if it was lost since the last stage."""
    (worker,) = workers_for(share)
    timeout, losses = PlacementTimeout(share), 0
    while True:
        started = worker.ping.remote()
        while not ray.wait([started], timeout=POLL_SECONDS)[0]:
            timeout.check(waiting=True)
        try:
            ray.get(started)
            return worker
        except LOST:
            losses += 1
            if losses > REPLACEMENTS:
                raise
            worker = _replace(worker, share)


def _start(share: Share) -> Any:
    # Spread: two workers on one machine would share its memory while another machine is idle.
    options = {"num_cpus": share.cpus, "num_gpus": share.gpus, "scheduling_strategy": "SPREAD"}
    return Worker.options(**options).remote(share.cpus)  # type: ignore[attr-defined]


def _replace(lost: Any, share: Share) -> Any:
    # The worker may only be unreachable; if it came back, it would hold cores that its replacement needs.
    ray.kill(lost)
    _workers[_workers.index(lost)] = replacement = _start(share)
    return replacement
