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
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator
from typing import Any

from rag_core.errors import RagError
from rag_core.network.addresses import without_credentials
from tasks.environment.mlflow_store import check_server_is_there
from tasks.environment.prefect_api import check_prefect, configured_url
from tasks.environment.ray_cluster import check_ray
from tasks.environment.variables import FOR_EVERY_COMMAND, FOR_STAGES, check_variables

START_SECONDS = 120
# A server that cannot live must not be started for ever.
REPLACEMENTS = 3
# Of <linux/prctl.h>. Loaded here: between fork and exec little is safe to do.
_PR_SET_PDEATHSIG = 1
_LIBC = ctypes.CDLL(None)


def with_services(command: Callable[..., None], *, ray: bool, trains: bool = False) -> Callable[..., None]:
    """A command that runs a flow: the server is up before its body runs. Options and help stay the command's own.

    Variables, Ray, Prefect and MLflow are looked at first, the quickest check first; each ends in a ConfigError.

    Args:
        command: the function behind the command.
        ray: whether its stages work on Ray.
        trains: whether its workers need what training needs, MLflow among it, which takes seconds to import.
    """

    @functools.wraps(command)
    def run(*arguments: Any, **options: Any) -> None:
        check_variables({**FOR_EVERY_COMMAND, **FOR_STAGES})
        check_server_is_there()
        if ray:
            check_ray()
        wait_for_cluster, wait_for_server = _nothing, start_shielded_server()
        if ray:
            from tasks.on_ray.workers import start_early

            wait_for_cluster = start_early(
                *(["tasks.stages.pretrain_generator", "tasks.stages.train"] if trains else [])
            )
        import flows.pipeline  # noqa: F401  (all that any stage imports)
        from tasks.tracking.runs import prepare_store

        # A new database takes a second or two, and the server is not up yet.
        prepare_store()
        wait_for_server()
        wait_for_cluster()
        with naming_a_lost_server():
            command(*arguments, **options)

    return run


def _nothing() -> None:
    return


@contextlib.contextmanager
def naming_a_lost_server() -> Iterator[None]:
    """What to do when Prefect's server has gone for good, instead of the traceback of its client.

    Raises:
        RagError: the flow ended because its state could not be reported; its finished stages are published.
    """
    import httpx
    from prefect.settings import get_current_settings

    try:
        yield
    except httpx.TransportError as error:
        server = without_credentials(str(get_current_settings().api.url))
        raise RagError(
            f"Prefect's server at {server} does not answer any more ({error}), so the flow ended. Finished stages are "
            "kept: start the server, or unset PREFECT_API_URL for a temporary one, and run the same command to go on after "
            "them."
        ) from error


def start_shielded_server() -> Callable[[], None]:
    """Start a server for this process's flows, unless one is configured; returns a function that waits for it.

    Raises:
        ConfigError: the one that is configured cannot be used.
    """
    if configured_url():
        check_prefect()
        return _nothing
    from prefect.settings import PREFECT_API_URL, temporary_settings

    server = TemporaryServer()
    until_exit = contextlib.ExitStack()
    until_exit.callback(server.stop)
    until_exit.enter_context(temporary_settings({PREFECT_API_URL: server.url}))
    # Not with the command: Prefect sends its last events and log lines when the interpreter ends its threads.
    atexit.register(until_exit.close)
    return server.wait_until_healthy


class TemporaryServer:
    """A server of this process. If it is lost (out of memory, killed) another takes its place.

    Prefect's clients ask for about a minute before they give up, so a flow goes on.
    """

    def __init__(self) -> None:
        port, self._held = _held_port()
        self.url = f"http://127.0.0.1:{port}/api"
        self._port, self._losses, self._stopped = port, 0, threading.Event()
        self._process = _start_server(port)
        threading.Thread(target=self._watch, name="watch Prefect's server", daemon=True).start()

    def wait_until_healthy(self) -> None:
        end = time.monotonic() + START_SECONDS
        while time.monotonic() < end and self._losses <= REPLACEMENTS:
            # The address is our own.
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
        _LIBC.prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)


def _held_port() -> tuple[int, socket.socket]:
    """A port, and a socket that keeps it ours until the server, or another one in its place, listens there.

    It is bound and does not listen: the system gives the port to nobody else, and refuses connections to it. On Linux a
    server may bind it all the same where both allow that an address is used again; elsewhere the port is let go.
    """
    holder = socket.socket()
    holder.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    holder.bind(("127.0.0.1", 0))
    port = int(holder.getsockname()[1])
    if sys.platform != "linux":
        holder.close()
    return port, holder
