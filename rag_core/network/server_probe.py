"""Asking a server one small question: with a time limit, and why it failed in words that hold no address or password."""

from __future__ import annotations

import socket
import ssl
import threading
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

Found = TypeVar("Found")

# How long a server may take to answer one small question, and how much more making ready for it and finding its name.
SECONDS, GRACE = 6.0, 6.0


def within(seconds: float, function: Callable[[], Found]) -> Found:
    """What `function` returns or raises; names are looked up without a time limit, so it runs beside.

    Raises:
        TimeoutError: it takes longer.
    """
    outcome: dict[str, Any] = {}

    def run() -> None:
        try:
            outcome["found"] = function()
        except BaseException as error:
            outcome["error"] = error

    thread = threading.Thread(target=run, name="ask a server", daemon=True)
    thread.start()
    thread.join(seconds)
    if "error" in outcome:
        raise outcome["error"]
    if "found" not in outcome:
        raise TimeoutError(f"no answer within {seconds:g} s")
    found: Found = outcome["found"]
    return found


def reason_of(error: BaseException) -> str:
    """What the network said, however deep the clients have wrapped it."""
    for one in _all_of(error):
        if isinstance(one, ConnectionRefusedError):
            return "connection refused"
        if isinstance(one, socket.gaierror):
            return "no machine of that name is known"
        if isinstance(one, ssl.SSLCertVerificationError):
            return "its certificate is not trusted here"
        if isinstance(one, ssl.SSLError):
            return "it does not speak TLS, as https:// asks for: is http:// meant?"
        if isinstance(one, TimeoutError) or "Timeout" in type(one).__name__:
            return "no answer in time"
        if type(one).__name__ in ("RemoteProtocolError", "BadStatusLine", "ProtocolError", "RemoteDisconnected"):
            return "what answers there does not speak HTTP, or hangs up"
        if isinstance(one, OSError) and one.strerror and one.errno:
            return one.strerror.lower()
    return f"no connection, {type(error).__name__}"


def _all_of(error: BaseException, depth: int = 8) -> Iterator[BaseException]:
    """The innermost causes first."""
    inner = [error.__cause__, error.__context__, getattr(error, "reason", None), *error.args]
    for one in inner if depth else []:
        if isinstance(one, BaseException):
            yield from _all_of(one, depth - 1)
    yield error


def what_answers(status: int, content_type: str) -> str:
    """An answer that is not the expected one, in words."""
    kind = " with an HTML page" if "html" in content_type else ""
    return f"answers {status}{kind}"
