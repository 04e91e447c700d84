"""Starts what a command needs before its flow runs, Prefect's server and Ray, while this process still imports.

Without `PREFECT_API_URL` a command gets a temporary server. Prefect would start one itself, but only when the
flow begins, and in the terminal's process group: Ctrl-C would end the server first, and the flow would wait for
minutes to report its end. So we start the server with SIGINT blocked; a process keeps the signals blocked that
were blocked at its start.
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
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from rag_core.errors import ConfigError, RagError
from rag_core.network.addresses import without_credentials
from tasks.environment.mlflow_store import check_server_is_there
from tasks.environment.prefect_api import check_prefect, configured_url
from tasks.environment.prefect_internals import SERVER_APPLICATION
from tasks.environment.ray_cluster import check_ray
from tasks.environment.variables import FOR_EVERY_COMMAND, FOR_STAGES, check_variables

START_SECONDS = 120
# Limit, so that a server that cannot run is not restarted for ever.
REPLACEMENTS = 3
# From <linux/prctl.h>. The library is loaded here, because little is safe between fork and exec.
_PR_SET_PDEATHSIG = 1
_LIBC = ctypes.CDLL(None)


def with_services(command: Callable[..., None], *, ray: bool, trains: bool = False) -> Callable[..., None]:
    """Wrap a command that runs a flow, so that Prefect's server and Ray are up before the command's body runs.

    The wrapper first checks environment variables, Ray, Prefect and MLflow, the quickest check first; a failed check
    raises ConfigError. The command keeps its options and help.

    Args:
        command: the function behind the command.
        ray: whether its stages use Ray.
        trains: whether its workers need the modules of training, which take seconds to import (MLflow).
    """

    @functools.wraps(command)
    def run(*arguments: Any, **options: Any) -> None:
        check_variables({**FOR_EVERY_COMMAND, **FOR_STAGES})
        check_server_is_there()
        if ray:
            check_ray()
        wait_for_cluster, wait_for_server = _do_nothing, start_shielded_server()
        if ray:
            from tasks.on_ray.workers import start_early

            wait_for_cluster = start_early(
                *(["tasks.stages.pretrain_generator", "tasks.stages.train"] if trains else [])
            )
        import flows.pipeline  # noqa: F401  (imports everything that a stage needs)
        from tasks.tracking.runs import prepare_store

        # Creating a database takes a second or two; do it while the server starts.
        prepare_store()
        wait_for_server()
        wait_for_cluster()
        with _explaining_a_lost_server():
            command(*arguments, **options)

    return run


def _do_nothing() -> None:
    return


@contextlib.contextmanager
def _explaining_a_lost_server() -> Iterator[None]:
    """Turn the error of Prefect's client about a lost server into one that says what to do.

    Raises:
        RagError: the flow ended because it could not report its state; its finished stages are published.
    """
    import httpx
    from prefect.settings import get_current_settings

    try:
        yield
    except httpx.TransportError as error:
        server = without_credentials(str(get_current_settings().api.url))
        raise RagError(
            f"Prefect's server at {server} does not answer any more ({error}), so the flow ended. Finished stages are "
            "kept. Start the server, or unset PREFECT_API_URL to use a temporary one, and run the same command to "
            "continue."
        ) from error


def start_shielded_server() -> Callable[[], None]:
    """Start a Prefect server for this process, unless one is configured; return a function that waits for it.

    Raises:
        ConfigError: a server is configured and cannot be used, or PREFECT_HOME cannot be made.
    """
    if configured_url():
        check_prefect()
        return _do_nothing
    from prefect.settings import PREFECT_API_URL, temporary_settings

    _make_home()
    server = TemporaryServer()
    until_exit = contextlib.ExitStack()
    until_exit.callback(server.stop)
    until_exit.enter_context(temporary_settings({PREFECT_API_URL: server.url}))
    # Stop at interpreter exit, not with the command: Prefect still sends its last events and log lines then.
    atexit.register(until_exit.close)
    return server.wait_until_healthy


def _make_home() -> None:
    """Make Prefect's folder with its parents. Prefect makes the last folder only; else its server would not start."""
    from prefect.settings import PREFECT_HOME

    home = Path(PREFECT_HOME.value())
    try:
        home.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(
            f"PREFECT_HOME is {home}, and this folder cannot be made ({error.strerror}), but Prefect's server keeps its "
            "database there. Set PREFECT_HOME to a folder that can be written, or unset it to use ~/.prefect."
        ) from error


class TemporaryServer:
    """This process's Prefect server. If it is lost (out of memory, killed), another one starts at the same port.

    Prefect's clients retry for about a minute, so a flow survives that.
    """

    def __init__(self) -> None:
        port, self._port_holder = _reserve_port()
        self.url = f"http://127.0.0.1:{port}/api"
        self._port, self._losses, self._stopped = port, 0, threading.Event()
        self._process = _start_server(port)
        threading.Thread(target=self._watch, name="watch Prefect's server", daemon=True).start()

    def wait_until_healthy(self) -> None:
        end = time.monotonic() + START_SECONDS
        while time.monotonic() < end and self._losses <= REPLACEMENTS:
            # Safe to open: the address is our own.
            with contextlib.suppress(OSError), urllib.request.urlopen(f"{self.url}/health", timeout=5):  # noqa: S310  # nosec B310
                return
            time.sleep(0.05)
        raise RuntimeError(f"Prefect's temporary server does not answer at {self.url}")

    def stop(self) -> None:
        self._stopped.set()
        self._process.terminate()
        try:
            self._process.wait(timeout=5)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()

    def _watch(self) -> None:
        while True:
            self._process.wait()
            self._losses += 1
            if self._stopped.is_set() or self._losses > REPLACEMENTS:
                return
            self._process = _start_server(self._port)


def _start_server(port: int) -> subprocess.Popen[bytes]:
    # The same command with which Prefect starts its temporary server, without web pages.
    command = [sys.executable, "-m", "uvicorn", "--factory", SERVER_APPLICATION, "--lifespan", "on"]
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
    # A command killed with signal 9 cannot stop its server, so the kernel does it.
    if sys.platform == "linux":
        _LIBC.prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)


def _reserve_port() -> tuple[int, socket.socket]:
    """A free port, and a socket that reserves it until our server, or its replacement, listens there.

    The socket is bound but does not listen, so the system gives the port to no other process and refuses connections
    to it. On Linux our server can still bind the port, because both sockets set SO_REUSEADDR. Elsewhere it could not,
    so the socket is closed.
    """
    holder = socket.socket()
    holder.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    holder.bind(("127.0.0.1", 0))
    port = int(holder.getsockname()[1])
    if sys.platform != "linux":
        holder.close()
    return port, holder
