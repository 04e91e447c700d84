"""A Ray cluster of several nodes on this machine: real `ray start` processes, each in a process tree of its own.

Every node has its own loopback address, so Ray and PyTorch treat nodes as different machines. The head has no CPUs:
it holds the cluster's state and the drivers, and runs no tasks. Token authentication is on, with a token of this
cluster alone.
"""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from tests.support.servers.processes import free_port, kill_tree

ROOT = Path(__file__).resolve().parents[3]
START_SECONDS = 180
OBJECT_STORE_BYTES = 100_000_000
COUNT_NODES = """
import sys
import ray
ray.init(log_to_driver=False, logging_level="ERROR")
for _ in sys.stdin:
    print("nodes", sum(node["Alive"] and "CPU" in node["Resources"] for node in ray.nodes()), flush=True)
"""


class LocalCluster:
    """A cluster for the length of a `with` block. Commands that use it run with `cluster.environment`."""

    def __init__(self, nodes: int, resources: dict[str, float] | None = None) -> None:
        self._initial_nodes, self._resources = nodes, json.dumps(resources or {})
        self.nodes: list[subprocess.Popen[bytes]] = []
        self._hosts = 1
        self._counter: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> LocalCluster:
        # A short path, because Ray's sockets are below it and their paths are limited.
        self._folder = Path(tempfile.mkdtemp(prefix="ray-"))
        (self._folder / "token").write_text(secrets.token_hex(32))
        self.address = f"127.0.0.2:{free_port('127.0.0.2')}"
        kept = {
            name: value for name, value in os.environ.items() if not name.startswith(("RAY_", "PREFECT_", "MLFLOW_"))
        }
        self.environment = kept | {
            "PYTHONPATH": str(ROOT),
            "RAY_ADDRESS": self.address,
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN_PATH": str(self._folder / "token"),
            "RAY_USAGE_STATS_ENABLED": "0",
            "RAY_enable_metrics_collection": "0",
        }
        port = self.address.partition(":")[2]
        self._head = self._start("--head", "--port", port, "--temp-dir", self._folder / "ray", cpus=0)
        self._wait(lambda: _answers(self.address), "the head does not answer")
        try:
            for _ in range(self._initial_nodes):
                self.add()
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        for process in [self._counter, *self.nodes, self._head]:
            if process:
                kill_tree(process)
        shutil.rmtree(self._folder, ignore_errors=True)

    def add(self, cpus: int = 1) -> subprocess.Popen[bytes]:
        """Start another node. It joins a few seconds later."""
        self.nodes.append(self._start("--address", self.address, cpus=cpus))
        return self.nodes[-1]

    def remove(self, node: subprocess.Popen[bytes]) -> None:
        """Send SIGKILL to all processes of a node, as if its machine were lost."""
        kill_tree(node)
        self.nodes.remove(node)

    def wait_for_nodes(self, number: int) -> None:
        """Wait until the cluster counts `number` nodes with CPUs."""

        def reached() -> bool:
            for position, node in enumerate(self.nodes):
                if node.poll() is not None:  # Ray allows a node 30 s to start; a busy machine can take longer
                    self.nodes[position] = self._start("--address", self.address, cpus=1)
            return self._count_nodes() == number

        self._wait(reached, f"there are not {number} nodes")

    def _count_nodes(self) -> int:
        """Ask a process that stays connected; −1 if it was lost, for example with the node it was connected to."""
        if self._counter is None or self._counter.poll() is not None:
            command, pipe = [sys.executable, "-c", COUNT_NODES], subprocess.PIPE
            self._counter = subprocess.Popen(command, env=self.environment, stdin=pipe, stdout=pipe, bufsize=0)
        assert self._counter.stdin
        assert self._counter.stdout
        with contextlib.suppress(BrokenPipeError):
            self._counter.stdin.write(b"\n")
        for line in iter(self._counter.stdout.readline, b""):  # skips Ray's notices of lost nodes
            if line.startswith(b"nodes "):
                return int(line.split()[1])
        return -1

    def log(self) -> str:
        """Output of all nodes."""
        return (self._folder / "log").read_text()

    def _start(self, *options: object, cpus: int) -> subprocess.Popen[bytes]:
        self._hosts += 1
        command = [str(Path(sys.executable).with_name("ray")), "start", *map(str, options), "--block"]
        command += ["--node-ip-address", f"127.0.0.{self._hosts}", "--num-cpus", str(cpus), "--num-gpus", "0"]
        command += ["--object-store-memory", str(OBJECT_STORE_BYTES), "--disable-usage-stats"]
        command += ["--include-dashboard", "false"] if "--head" in options else ["--resources", self._resources]
        environment = {name: value for name, value in self.environment.items() if name != "RAY_ADDRESS"}
        with (self._folder / "log").open("ab") as log:
            return subprocess.Popen(command, env=environment, stdout=log, stderr=log, start_new_session=True)

    def _wait(self, ready: Callable[[], bool], fault: str) -> None:
        end = time.monotonic() + START_SECONDS
        while not ready():
            assert time.monotonic() < end, f"{fault}: {self.log()}"
            time.sleep(0.1)


def _answers(address: str) -> bool:
    host, _, port = address.partition(":")
    try:
        socket.create_connection((host, int(port)), timeout=1).close()
    except OSError:
        return False
    return True
