"""Start commands again and again without repeating imports: one process imports, then forks for every command.

A command spends eight of its first ten seconds on imports, and the kills tested here do not concern those. Apart from
that a forked command is like any other: a real process with its own process group and its own Ray.
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import TracebackType

# Sources of `main` for `Prepared`: the `rag` command, or a function `work` with the services of a command.
RAG = """
import flows.cli.main

def main(*words):
    sys.argv = ["rag", *words]
    flows.cli.main.run()
"""
WORK = """
from flows.cli.prefect_server import with_services
%s
main = with_services(work, ray=True)
"""
FORKS = """
import json, os, sys, threading
from pathlib import Path
import flows.pipeline
%s
for line in sys.stdin:
    # Counts Python threads only; native threads of libraries are prepared for forks.
    assert threading.active_count() == 1, "a process of several threads must not fork"
    pid = os.fork()
    if not pid:
        os.setsid()
        with open("log", "ab") as log, open(os.devnull) as nothing:
            os.dup2(nothing.fileno(), 0), os.dup2(log.fileno(), 1), os.dup2(log.fileno(), 2)
        main(*json.loads(line))
        sys.exit()
    print(pid, flush=True)
    print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), flush=True)
"""


class Command:
    """A started command; methods are named as in `subprocess.Popen`."""

    def __init__(self, pid: int, parent: subprocess.Popen[bytes]) -> None:
        self.pid = pid
        self.returncode: int | None = None
        self._parent = parent

    def poll(self) -> int | None:
        assert self._parent.stdout
        if self.returncode is None and select.select([self._parent.stdout], [], [], 0)[0]:
            self.returncode = int(self._parent.stdout.readline())
        return self.returncode

    def wait(self, timeout: float = 600) -> int:
        end = time.monotonic() + timeout
        while self.poll() is None:
            if time.monotonic() > end:
                raise subprocess.TimeoutExpired(f"command {self.pid}", timeout)
            time.sleep(0.02)
        assert self.returncode is not None
        return self.returncode

    def send_signal(self, number: signal.Signals) -> None:
        os.kill(self.pid, number)


class Prepared:
    """`with Prepared(main, folder, environment) as commands: commands.start(…)`. Runs one command at a time.

    Args:
        main: source of a function `main`, which is called with the arguments as strings.
        folder: current folder of the commands; they append their output to the file `log` there.
        environment: of the commands.
    """

    def __init__(self, main: str, folder: Path, environment: dict[str, str]) -> None:
        self._log = folder / "log"
        self._parent = subprocess.Popen(
            [sys.executable, "-c", FORKS % main],
            cwd=folder,
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            bufsize=0,  # a buffered line would be invisible to `select`
        )
        self._last: Command | None = None

    def start(self, *arguments: object) -> Command:
        assert self._parent.stdin
        assert self._parent.stdout
        self._parent.stdin.write(json.dumps([str(argument) for argument in arguments]).encode() + b"\n")
        self._last = Command(int(self._parent.stdout.readline()), self._parent)
        return self._last

    def finish(self, *arguments: object) -> str:
        """Run a command to its end; returns what it wrote to the log."""
        before = self._log.stat().st_size if self._log.exists() else 0
        assert self.start(*arguments).wait() == 0, self._log.read_text()
        return self._log.read_bytes()[before:].decode()

    def __enter__(self) -> Prepared:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._last and self._last.poll() is None:
            with contextlib.suppress(ProcessLookupError):  # it has just ended
                os.killpg(self._last.pid, signal.SIGKILL)
        self._parent.communicate()
