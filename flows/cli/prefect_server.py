"""The temporary Prefect server of a command that was given no `PREFECT_API_URL`, shielded from Ctrl-C.

Prefect starts such a server by itself, but in the terminal's process group: Ctrl-C would end the server first, and the
flow would then wait minutes to report its end to it. A signal that is blocked while a process starts stays blocked in it.
"""

from __future__ import annotations

import functools
import os
import signal
from collections.abc import Callable
from typing import Any


def start_shielded_server() -> None:
    """Start the server that Prefect would start anyway; it ends with this process."""
    from prefect.server.api.server import SubprocessASGIServer
    from prefect.settings import get_current_settings

    if os.environ.get("PREFECT_API_URL") or get_current_settings().api.url:
        return
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        SubprocessASGIServer().start(timeout=120)
    finally:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})


def with_server(command: Callable[..., None]) -> Callable[..., None]:
    """A command that runs a flow: the server is up before its body runs. Options and help stay the command's own."""

    @functools.wraps(command)
    def run(*arguments: Any, **options: Any) -> None:
        start_shielded_server()
        command(*arguments, **options)

    return run
