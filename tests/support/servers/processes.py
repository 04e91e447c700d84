"""Start, watch and end a command with all its child processes: environment, free ports, sampled memory, kills."""

from __future__ import annotations

import contextlib
import os
import socket
import subprocess
import threading
import time
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import psutil

ROOT = Path(__file__).resolve().parents[3]
SAMPLE_SECONDS = 0.1
TREE_SECONDS = 0.5
MEGABYTE = 2**20
# Bound until this process ends.
_held_ports: list[socket.socket] = []


def free_port(host: str = "127.0.0.1") -> int:
    """A port for one server, which may stop and start again there. Without a server, connections are refused.

    A socket here keeps the port bound without listening, so the system gives it to no other server and no outgoing
    connection. The server can still bind it, because both sockets allow the address to be reused.
    """
    bound = socket.socket()
    bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    bound.bind((host, 0))
    _held_ports.append(bound)
    return int(bound.getsockname()[1])


def environment_in(folder: Path, **more: str) -> dict[str, str]:
    """Environment of a command that uses servers and stores of its own, in `folder`, not those of this process."""
    kept = {
        name: value for name, value in os.environ.items() if not name.startswith(("PREFECT_API", "RAY_", "MLFLOW_"))
    }
    return kept | {"PREFECT_HOME": str(folder / "prefect"), "PYTHONPATH": str(ROOT)} | more


@dataclass
class Peak:
    """Peak memory of one process, in megabytes.

    Attributes:
        resident: the kernel's high-water mark. It counts every mapped page in memory, including pages of files and of
            Ray's object store, although processes share those and the system can reclaim file pages.
        own: anonymous memory only.
    """

    resident: int = 0
    own: int = 0


class MemoryWatch:
    """`with MemoryWatch(process) as watch:` … `watch.peaks`: role → the largest `Peak` of a process in that role."""

    def __init__(self, process: subprocess.Popen[bytes]) -> None:
        self._root = psutil.Process(process.pid)
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._peaks: dict[int, Peak] = defaultdict(Peak)
        self._roles: dict[int, str] = {}

    def __enter__(self) -> MemoryWatch:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    @property
    def peaks(self) -> dict[str, Peak]:
        by_role: dict[str, Peak] = defaultdict(Peak)
        for pid, peak in self._peaks.items():
            largest = by_role[self._roles[pid]]
            largest.resident, largest.own = max(largest.resident, peak.resident), max(largest.own, peak.own)
        return dict(by_role)

    def _watch(self) -> None:
        pids, listed_at = [self._root.pid], 0.0
        while not self._stop.is_set():
            if time.monotonic() - listed_at > TREE_SECONDS:
                with contextlib.suppress(psutil.NoSuchProcess):
                    pids = [self._root.pid, *(child.pid for child in self._root.children(recursive=True))]
                listed_at = time.monotonic()
            for pid in pids:
                with contextlib.suppress(OSError, KeyError, IndexError):
                    self._sample(pid)
            self._stop.wait(SAMPLE_SECONDS)

    def _sample(self, pid: int) -> None:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
        status = dict(line.split(":\t", 1) for line in lines if ":\t" in line)
        resident, own = (int(status[name].split()[0]) // 1024 for name in ("VmHWM", "RssAnon"))
        peak = self._peaks[pid]
        peak.resident, peak.own = max(peak.resident, resident), max(peak.own, own)
        # Read every time: a Ray worker sets its title some time after it starts.
        command = Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
        self._roles[pid] = "command" if pid == self._root.pid else role_of(command)


def content_of(file: Path) -> bytes:
    """Content of a file; empty if the process that wrote it has just deleted it."""
    try:
        return file.read_bytes()
    except FileNotFoundError:
        return b""


def processes_below(pid: int, wanted: Callable[[str], bool]) -> list[psutil.Process]:
    """The descendants of a process whose names `wanted` accepts."""
    matches = []
    for child in psutil.Process(pid).children(recursive=True):
        with contextlib.suppress(psutil.NoSuchProcess):  # it has just ended
            if wanted(child.name()):
                matches.append(child)
    return matches


def kill_tree(process: subprocess.Popen[bytes]) -> None:
    """Send SIGKILL to a process and its descendants, if it still runs, and wait for its end."""
    if process.poll() is not None:
        return
    for member in [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]:
        with contextlib.suppress(psutil.NoSuchProcess):
            member.kill()
    process.wait()


def end(process: subprocess.Popen[bytes], patience: float = 30) -> None:
    """Send SIGTERM to a server of ours, and SIGKILL after `patience` seconds; wait for its end."""
    process.terminate()
    try:
        process.wait(timeout=patience)
    except subprocess.TimeoutExpired:
        kill_tree(process)


def role_of(command: str) -> str:
    """A short name for a process, from its command line."""
    if command.startswith("ray::"):
        return command.split()[0].partition(".")[0]
    for word in ("raylet", "gcs_server", "uvicorn"):
        if word in command:
            return word
    return "other"
