"""Long-lived workers return results in order, keep their processes, replace lost workers, and pass errors on."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import ray

from rag_core.errors import ConfigError, InputError
from tasks.on_ray import workers as ray_workers
from tasks.on_ray.runtime import Share, share_of_cluster
from tasks.on_ray.workers import map_on_workers, run_on_worker, workers_for

# Workers cannot import the tests, so functions of this file are pickled by value.
ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]


def test_what_ray_and_prefect_both_import_is_imported_before_rays_thread_starts() -> None:
    code = (
        "import os, sys, tasks.on_ray.workers as workers\n"
        "def report():\n"
        "    print('pydantic.v1.main' in sys.modules, flush=True)\n"
        "    os._exit(0)\n"
        "workers.ensure_ray = report\n"
        "workers.start_early()"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "True"


def adding(amount: int) -> Callable[[int], int]:
    return lambda item: item + amount


def dying_once(flag: Path) -> Callable[[int], int]:
    """Kills its own process in the middle of item 1, but only the first time."""

    def work(item: int) -> int:
        if item == 1 and not flag.exists():
            flag.touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return 10 * item

    return work


def always_dying() -> Callable[[int], None]:
    return lambda item: os.kill(os.getpid(), signal.SIGKILL)


def refusing() -> Callable[[int], None]:
    def work(item: int) -> None:
        raise InputError(f"item {item} is no question")

    return work


@pytest.mark.parametrize("num_workers", [1, 2])
def test_results_come_in_the_order_of_the_items(services: Path, num_workers: int) -> None:
    share = share_of_cluster(num_workers)
    assert map_on_workers(share, adding, (7,), list(range(5))) == [7, 8, 9, 10, 11]
    assert map_on_workers(share, adding, (7,), []) == []


def test_a_worker_serves_one_stage_after_the_other(services: Path) -> None:
    share = share_of_cluster(1)
    first = run_on_worker(share, os.getpid)
    map_on_workers(share, adding, (1,), [1])
    assert run_on_worker(share, os.getpid) == first != os.getpid()


def test_another_share_of_the_cluster_gets_workers_of_its_own(services: Path) -> None:
    first = run_on_worker(Share(1, cpus=2, gpus=0), os.getpid)
    assert run_on_worker(Share(1, cpus=1, gpus=0), os.getpid) != first


def test_a_worker_that_is_killed_is_replaced_and_its_item_done_again(services: Path, tmp_path: Path) -> None:
    assert map_on_workers(share_of_cluster(1), dying_once, (tmp_path / "died",), [0, 1, 2]) == [0, 10, 20]
    assert (tmp_path / "died").exists()


def test_work_that_kills_its_workers_ends(services: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ray_workers, "REPLACEMENTS", 1)  # each takes seconds to start
    with pytest.raises(ray.exceptions.RayActorError):
        map_on_workers(share_of_cluster(1), always_dying, (), [0])


def test_an_error_of_the_user_arrives_as_it_was_raised(services: Path) -> None:
    with pytest.raises(InputError, match=r"^item 3 is no question$"):
        map_on_workers(share_of_cluster(1), refusing, (), [3])
    assert map_on_workers(share_of_cluster(1), adding, (1,), [1]) == [2]


def test_a_worker_that_was_lost_between_two_stages_is_replaced(services: Path) -> None:
    share = share_of_cluster(1)
    first = run_on_worker(share, os.getpid)
    os.kill(first, signal.SIGKILL)
    assert run_on_worker(share, os.getpid) != first


def test_a_stage_that_no_machine_has_room_for_says_so(services: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAG_CLUSTER_WAIT_SECONDS", "1")
    expected = (
        r"^For 1 s no machine of the Ray cluster has had 64 CPU free for a worker; it has 1 machine, \S+ of \d+ CPU"
    )
    with pytest.raises(ConfigError, match=expected):
        map_on_workers(Share(2, cpus=64, gpus=0), adding, (1,), [1, 2, 3])
    with pytest.raises(ConfigError, match=expected):
        run_on_worker(Share(1, cpus=64, gpus=0), os.getpid)


MACHINES = {
    "a head without processors": ([(0, 0), (4, 0), (4, 0)], 0, Share(2, cpus=4, gpus=0)),
    "machines of unequal size": ([(8, 0), (4, 0)], 0, Share(2, cpus=4, gpus=0)),
    "three workers on two machines": ([(4, 0), (2, 0)], 3, Share(3, cpus=2, gpus=0)),
    "one worker on two machines": ([(4, 0), (2, 0)], 1, Share(1, cpus=4, gpus=0)),
    "one for each GPU": ([(0, 0), (8, 2), (8, 2)], 0, Share(4, cpus=4, gpus=1)),
    "GPUs where processors are scarce": ([(16, 0), (2, 1)], 1, Share(1, cpus=2, gpus=1)),
    "more workers than places": ([(2, 0)], 4, Share(4, cpus=1, gpus=0)),
    "no machine yet": ([(0, 0)], 0, Share(1, cpus=1, gpus=0)),
}


@pytest.mark.parametrize("case", MACHINES)
def test_every_worker_of_a_share_finds_a_place(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    machines, num_workers, expected = MACHINES[case]
    nodes = [{"Alive": True, "Resources": {"CPU": float(cpus), "GPU": float(gpus)}} for cpus, gpus in machines]
    lost = {"Alive": False, "Resources": {"CPU": 64.0}}
    monkeypatch.setattr(ray, "nodes", lambda: [*nodes, lost])
    assert share_of_cluster(num_workers) == expected


def test_interrupted_work_ends_its_workers(services: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    share = share_of_cluster(1)
    before = workers_for(share)

    def interrupted(*arguments: object, **options: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(ray, "wait", interrupted)
        with pytest.raises(KeyboardInterrupt):
            map_on_workers(share, adding, (1,), [1])
    assert workers_for(share) != before
    assert map_on_workers(share, adding, (1,), [1]) == [2]
