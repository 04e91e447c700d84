"""A missing Ray cluster, the folder of Ray's sockets, and the shared memory of this machine."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from tasks.environment import ray_cluster
from tasks.environment.ray_cluster import SMALLEST_STORE, ObjectStore, check_ray, object_store
from tests.support.environment_checks import message_of
from tests.support.servers.odd_servers import absent, silent

pytest_plugins = ["tests.support.environment_fixtures"]
pytestmark = pytest.mark.usefixtures("nothing_set")

GIGABYTE = 10**9


def test_a_missing_ray_cluster_is_named_without_waiting_for_minutes(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    timeouts = {name: "1" for name in ray_cluster._TIMEOUTS if name.endswith(("_s", "_seconds"))}
    monkeypatch.setattr(ray_cluster, "_TIMEOUTS", ray_cluster._TIMEOUTS | timeouts)
    with silent() as hole:
        for address, reason in {
            absent(): "connection refused",
            "no-such-machine.invalid:6379": "no machine of that name",
            hole: "does not answer as Ray does",
        }.items():
            monkeypatch.setenv("RAY_ADDRESS", address)
            message_of(check_ray, address, reason, "unset RAY_ADDRESS")


def test_a_running_cluster_passes_with_its_token_and_is_named_without(
    services: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    import ray

    monkeypatch.setenv("RAY_ADDRESS", ray.get_runtime_context().gcs_address)
    check_ray()
    ray_cluster._check_cluster.cache_clear()
    (tmp_path / "other").write_text("w" * 64)
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(tmp_path / "other"))
    message_of(check_ray, "asks for another token", "RAY_AUTH_MODE=token", "RAY_AUTH_TOKEN_PATH")
    monkeypatch.delenv("RAY_AUTH_TOKEN_PATH")
    changed = ray_cluster.CLUSTER_PROBE.replace("compute_version_info()]", "['2.9.0', '3.11.7']]")
    monkeypatch.setattr(ray_cluster, "CLUSTER_PROBE", changed)
    message_of(check_ray, f"runs Ray {ray.__version__}", "Ray 2.9.0", "Both must be equal")


def test_the_folder_of_rays_sockets_may_be_as_long_as_ray_allows(monkeypatch: pytest.MonkeyPatch) -> None:
    rest = len("/ray/session_2026-11-27_16-39-29_123456_/sockets/plasma_store") + len(str(os.getpid()))
    longest = "/tmp/" + "x" * (ray_cluster.LONGEST_SOCKET_PATH - rest - len("/tmp/"))
    monkeypatch.setenv("RAY_TMPDIR", longest)
    check_ray()
    monkeypatch.setenv("RAY_TMPDIR", longest + "x")
    message_of(check_ray, "RAY_TMPDIR", f"may have {len(longest)}.", "/tmp")


def test_rays_object_store_fits_the_shared_memory() -> None:
    assert object_store(4 * GIGABYTE, 8 * GIGABYTE, 0, "/tmp") == ObjectStore()
    assert object_store(4 * GIGABYTE, GIGABYTE, 0, "/tmp") == ObjectStore(int(0.95 * GIGABYTE))
    small = object_store(4 * GIGABYTE, 64 * 2**20, 10 * GIGABYTE, "/tmp")
    assert small.options == {"object_store_memory": 2 * 2**30, "_plasma_directory": "/tmp"}
    assert "/dev/shm has 67 MB free" in small.notice
    assert "--shm-size" in small.notice
    none = object_store(4 * GIGABYTE, None, 2 * SMALLEST_STORE, "/scratch")
    assert none.options == {"object_store_memory": SMALLEST_STORE, "_plasma_directory": "/scratch"}
    for shared in (None, 2**20):
        message_of(lambda shared=shared: object_store(4 * GIGABYTE, shared, 10**8, "/tmp"), "/dev/shm", "RAY_TMPDIR")
