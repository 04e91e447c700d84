"""What a command needs before its flow runs: Prefect's server and Ray, both started while this process still imports.

A command that was given no `PREFECT_API_URL` gets a temporary server. Prefect would start one by itself, but only when
the flow begins, and in the terminal's process group: Ctrl-C would end the server first, and the flow would then wait
minutes to report its end to it. A signal that is blocked while a process starts stays blocked in it.
"""

from __future__ import annotations

import atexit
import contextlib
import ctypes
import functools
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable
from typing import Any

START_SECONDS = 120
_PR_SET_PDEATHSIG = 1  # of <linux/prctl.h>


def with_services(command: Callable[..., None], *, ray: bool) -> Callable[..., None]:
    """A command that runs a flow: the server is up before its body runs. Options and help stay the command's own.

    Args:
        command: the function behind the command.
        ray: whether its stages work on Ray.
    """

    @functools.wraps(command)
    def run(*arguments: Any, **options: Any) -> None:
        wait_for_server = start_shielded_server()
        if ray:
            from tasks.ray_workers import start_early

            start_early()
        import flows.pipeline  # noqa: F401  (all that any stage imports)
        from tasks.tracking import prepare_store

        # A new database takes a second or two, and the server is not up yet.
        prepare_store()
        wait_for_server()
        command(*arguments, **options)

    return run


def start_shielded_server() -> Callable[[], None]:
    """Start a server for this process's flows, unless one is configured; returns a function that waits for it."""
    from prefect.settings import PREFECT_API_URL, get_current_settings, temporary_settings

    if os.environ.get("PREFECT_API_URL") or get_current_settings().api.url:
        return lambda: None
    port = _free_port()
    server = _start_server(port)
    until_exit = contextlib.ExitStack()
    until_exit.callback(_stop_server, server)
    until_exit.enter_context(temporary_settings({PREFECT_API_URL: f"http://127.0.0.1:{port}/api"}))
    # Not with the command: Prefect sends its last events and log lines when the interpreter ends its threads.
    atexit.register(until_exit.close)
    return lambda: _wait_until_healthy(f"http://127.0.0.1:{port}/api/health", server)


def _stop_server(server: subprocess.Popen[bytes]) -> None:
    server.terminate()
    try:
        server.wait(timeout=5)
    except subprocess.TimeoutExpired:
        server.kill()
        server.wait()


def _start_server(port: int) -> subprocess.Popen[bytes]:
    # As Prefect starts its own temporary server, without pages.
    command = [sys.executable, "-m", "uvicorn", "--factory", "prefect.server.api.server:create_app", "--lifespan", "on"]
    command += ["--host", "127.0.0.1", "--port", str(port), "--log-level", "error"]
    environment = os.environ | {
        "PREFECT_UI_ENABLED": "0",
        "PREFECT__SERVER_EPHEMERAL": "1",
        "PREFECT__SERVER_FINAL": "1",
    }
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        return subprocess.Popen(command, env=environment, preexec_fn=_end_with_parent)
    finally:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})


def _end_with_parent() -> None:
    # A command that is killed with signal 9 cannot stop its server; the kernel does.
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)


def _wait_until_healthy(url: str, server: subprocess.Popen[bytes]) -> None:
    end = time.monotonic() + START_SECONDS
    while time.monotonic() < end and server.poll() is None:
        with contextlib.suppress(OSError), urllib.request.urlopen(url, timeout=5):  # noqa: S310
            return
        time.sleep(0.05)
    raise RuntimeError(f"Prefect's temporary server does not answer at {url}; it ended with {server.poll()}")


def _free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return int(one.getsockname()[1])
