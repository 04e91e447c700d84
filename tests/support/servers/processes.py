"""A command and every process below it: its environment, its port, their memory, sampled while they live, and their end."""

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
# Until this process ends.
_held: list[socket.socket] = []


def free_port(host: str = "127.0.0.1") -> int:
    """A port for a server of ours, which may stop and start there again. Without one, connections are refused.

    It stays bound here, without listening, so the system gives it to nobody else, neither as a server's port nor as the
    near end of a connection. A server may bind it all the same, as both sides allow the address to be used again.
    """
    holder = socket.socket()
    holder.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    holder.bind((host, 0))
    _held.append(holder)
    return int(holder.getsockname()[1])


def environment_in(folder: Path, **more: str) -> dict[str, str]:
    """A command's environment: its own servers and stores, in `folder`, whatever this process has."""
    kept = {
        name: value for name, value in os.environ.items() if not name.startswith(("PREFECT_API", "RAY_", "MLFLOW_"))
    }
    return kept | {"PREFECT_HOME": str(folder / "prefect"), "PYTHONPATH": str(ROOT)} | more


@dataclass
class Peak:
    """Megabytes of one process: the most that was resident (kernel's own high-water mark), and of it what it wrote itself.

    `resident` counts every page that is mapped and in memory, of files and of Ray's object store too, although others
    share them and the system takes file pages back. `own` is anonymous memory alone.
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
        found: dict[str, Peak] = defaultdict(Peak)
        for pid, peak in self._peaks.items():
            role = found[self._roles[pid]]
            role.resident, role.own = max(role.resident, peak.resident), max(role.own, peak.own)
        return dict(found)

    def _watch(self) -> None:
        tree, looked = [self._root.pid], 0.0
        while not self._stop.is_set():
            if time.monotonic() - looked > TREE_SECONDS:
                with contextlib.suppress(psutil.NoSuchProcess):
                    tree = [self._root.pid, *(child.pid for child in self._root.children(recursive=True))]
                looked = time.monotonic()
            for pid in tree:
                with contextlib.suppress(OSError, KeyError, IndexError):
                    self._sample(pid)
            self._stop.wait(SAMPLE_SECONDS)

    def _sample(self, pid: int) -> None:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
        status = dict(line.split(":\t", 1) for line in lines if ":\t" in line)
        resident, own = (int(status[name].split()[0]) // 1024 for name in ("VmHWM", "RssAnon"))
        peak = self._peaks[pid]
        peak.resident, peak.own = max(peak.resident, resident), max(peak.own, own)
        # A worker's title comes after its start.
        words = Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
        self._roles[pid] = "command" if pid == self._root.pid else role_of(words)


def content_of(file: Path) -> bytes:
    """What a file holds; nothing if the process that wrote it has just deleted it."""
    try:
        return file.read_bytes()
    except FileNotFoundError:
        return b""


def processes_below(pid: int, wanted: Callable[[str], bool]) -> list[psutil.Process]:
    """The descendants of a process whose names are wanted."""
    found = []
    for child in psutil.Process(pid).children(recursive=True):
        with contextlib.suppress(psutil.NoSuchProcess):  # it has just ended
            if wanted(child.name()):
                found.append(child)
    return found


def kill_tree(process: subprocess.Popen[bytes]) -> None:
    """Signal 9 to a process and all below it, if it still runs; waits for its end."""
    if process.poll() is not None:
        return
    for one in [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]:
        with contextlib.suppress(psutil.NoSuchProcess):
            one.kill()
    process.wait()


def end(process: subprocess.Popen[bytes], patience: float = 30) -> None:
    """SIGTERM to a server of ours, and signal 9 if it has not ended by then; waits for its end."""
    process.terminate()
    try:
        process.wait(timeout=patience)
    except subprocess.TimeoutExpired:
        kill_tree(process)


def role_of(command: str) -> str:
    """A short name for what a command line says."""
    if command.startswith("ray::"):
        return command.split()[0].partition(".")[0]
    for word in ("raylet", "gcs_server", "uvicorn"):
        if word in command:
            return word
    return "other"
