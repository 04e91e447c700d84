"""Probe a server with a time limit, and describe failures without showing addresses or passwords."""

from __future__ import annotations

import socket
import ssl
import threading
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

Result = TypeVar("Result")

# Seconds that a server may take to answer one small request, and extra seconds for imports and the DNS lookup.
SECONDS, GRACE = 6.0, 6.0


def within(seconds: float, function: Callable[[], Result]) -> Result:
    """Call `function` in a thread with a time limit; returns its result or raises its error.

    It needs a thread because DNS lookups have no time limit of their own.

    Raises:
        TimeoutError: it takes longer.
    """
    outcome: dict[str, Any] = {}

    def run() -> None:
        try:
            outcome["result"] = function()
        except BaseException as error:
            outcome["error"] = error

    thread = threading.Thread(target=run, name="ask a server", daemon=True)
    thread.start()
    thread.join(seconds)
    if "error" in outcome:
        raise outcome["error"]
    if "result" not in outcome:
        raise TimeoutError(f"no answer within {seconds:g} s")
    result: Result = outcome["result"]
    return result


def reason_of(error: BaseException) -> str:
    """The network's reason for a failure in a few words, also if client libraries have wrapped the error."""
    for cause in _causes(error):
        if isinstance(cause, ConnectionRefusedError):
            return "connection refused"
        if isinstance(cause, socket.gaierror):
            return "no machine of that name is known"
        if isinstance(cause, ssl.SSLCertVerificationError):
            return "its certificate is not trusted here"
        if isinstance(cause, ssl.SSLError):
            return "it does not speak TLS, which https:// needs: is http:// meant?"
        if isinstance(cause, TimeoutError) or "Timeout" in type(cause).__name__:
            return "no answer in time"
        if type(cause).__name__ in ("RemoteProtocolError", "BadStatusLine", "ProtocolError", "RemoteDisconnected"):
            return "the server there does not speak HTTP, or closes the connection"
        if isinstance(cause, OSError) and cause.strerror and cause.errno:
            return cause.strerror.lower()
    return f"no connection, {type(error).__name__}"


def _causes(error: BaseException, depth: int = 8) -> Iterator[BaseException]:
    """The error and all errors inside it, innermost first."""
    inner = [error.__cause__, error.__context__, getattr(error, "reason", None), *error.args]
    for cause in inner if depth else []:
        if isinstance(cause, BaseException):
            yield from _causes(cause, depth - 1)
    yield error


def describe_response(status: int, content_type: str) -> str:
    """An unexpected response as a phrase, such as "answers 404 with an HTML page"."""
    kind = " with an HTML page" if "html" in content_type else ""
    return f"answers {status}{kind}"
