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
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

import ray

from rag_core.errors import RagError
from rag_core.heap import keep_freed_blocks, return_freed_blocks
from tasks.ray_runtime import CLUSTER, Share, ensure_ray, job, limit_threads, share_of_cluster

Item = TypeVar("Item")
Found = TypeVar("Found")

# A worker that dies (out of memory, a lost machine) is replaced and its item done again; a job that kills its workers
# must end all the same.
REPLACEMENTS = 3

_workers: list[Any] = []
_made_for: tuple[Share, str] | None = None


@ray.remote
class Worker:
    """A process with everything imported. `prepare` makes what a stage's calls share: its model, its index."""

    def __init__(self, cpus: int) -> None:
        limit_threads(cpus)
        keep_freed_blocks()
        # The seconds are paid here, while the driver does something else.
        for module in ("tasks.embed_corpus", "tasks.pretrain_generator", "tasks.train", "tasks.batch_infer"):
            importlib.import_module(module)

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


def start_early() -> None:
    """Start Ray and its workers in the background, while this process is busy with its own imports.

    A cluster that cannot be reached is reported by the stage that needs it.
    """

    def start() -> None:
        try:
            ensure_ray()
            workers_for(share_of_cluster())
        except Exception as error:
            logging.getLogger(__name__).debug("Ray did not start early: %s", error)
        # Linux ends Ray's processes with the thread that started them, so this one stays as long as the main thread.
        threading.main_thread().join()
        ray.shutdown()

    threading.Thread(target=start, name="start Ray early").start()


def map_on_workers(
    share: Share,
    make: Callable[..., Callable[[Item], Found]],
    arguments: Sequence[Any],
    items: Sequence[Item],
) -> list[Found]:
    """`make(*arguments)` once in each worker, then its result called on every item; what it found, in the items' order.

    Raises:
        RagError: as an item's call raised it. Other failures of workers come as Ray raises them.
    """
    with _closing_on_failure():
        return _deal(share, make, arguments, items)


def run_on_worker(share: Share, function: Callable[..., Found], *arguments: Any) -> Found:
    """`function(*arguments)` in the only worker of `share`; raises as `map_on_workers` does."""
    with _closing_on_failure():
        (worker,) = workers_for(share)
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


def _deal(
    share: Share, make: Callable[..., Callable[[Item], Found]], arguments: Sequence[Any], items: Sequence[Item]
) -> list[Found]:
    shared = [ray.put(one) for one in arguments]
    waiting, found, losses = list(range(len(items)))[::-1], {}, 0
    running: dict[Any, tuple[Any, int]] = {}

    def give(worker: Any) -> None:
        place = waiting.pop()
        running[worker.call.remote(items[place])] = (worker, place)

    workers = workers_for(share)[: len(items)]
    ray.get([worker.prepare.remote(make, *shared) for worker in workers])
    for worker in workers:
        give(worker)
    while running:
        (done,), _ = ray.wait(list(running), num_returns=1)
        worker, place = running.pop(done)
        try:
            found[place] = ray.get(done)
        except ray.exceptions.RayActorError:
            losses += 1
            if losses > REPLACEMENTS:
                raise
            waiting.append(place)
            worker = _replace(worker, share)
            worker.prepare.remote(make, *shared)
        if waiting:
            give(worker)
    for worker in workers_for(share):
        worker.forget.remote()
    return [found[place] for place in range(len(items))]


def _start(share: Share) -> Any:
    options = {"num_cpus": share.cpus, "num_gpus": share.gpus}
    return Worker.options(**options).remote(share.cpus)  # type: ignore[attr-defined]


def _replace(lost: Any, share: Share) -> Any:
    _workers[_workers.index(lost)] = found = _start(share)
    return found
