"""How long a hub is waited for once it has listed a model's files: every request has a time limit, and silence an end.

The hub's client has no time limit of its own for some requests, such as that for the tree of a commit, and repeats what
failed for up to a minute. Importing this module gives every request of that client in this process a limit, and ends
the repeating where nothing has come for a while. A download that moves, however slowly, goes on, also after a lost
connection.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from huggingface_hub import constants, set_client_factory
from huggingface_hub.utils._http import default_client_factory

from rag_core.pretrained.hub.revision import HubUnreachableError, remember_silence, silent_reason


@dataclass
class _Downloads:
    """What this process knows of the downloads that are under way."""

    running: int = 0
    heard: float = 0.0  # when the last byte came, on the monotonic clock
    asked: set[tuple[int, str, str]] = field(default_factory=set)  # thread, method and address of each request


_downloads = _Downloads()
_lock = threading.Lock()


@contextlib.contextmanager
def limited_patience() -> Iterator[None]:
    """Within this block a request that failed is not repeated once the hub has been silent for `_longest_silence`.

    Raises:
        HubUnreachableError: from the request; it passes through the client, which repeats its own errors alone.
    """
    with _lock:
        if not _downloads.running:
            _downloads.asked.clear()
        _downloads.running += 1
        _downloads.heard = time.monotonic()
    try:
        yield
    finally:
        with _lock:
            _downloads.running -= 1


def _longest_silence() -> float:
    """In seconds; a whole limit at most, as a request that gets no byte ends after that and may be repeated at once.

    Less is enough for refused connections: they fail at once and are tried again after 1, 3, 7 and 15 s, of which 7 has
    to be the last. The client's pause of a second after a lost connection is no silence.
    """
    seconds = float(constants.HF_HUB_ETAG_TIMEOUT)
    return min(seconds, seconds / 2 + 1)


def _limit_waiting(request: Any) -> None:
    """Give a request the limits that it lacks; while files are downloaded, none may be longer than the user's own."""
    limits = request.extensions.get("timeout", {})
    first, most = float(constants.HF_HUB_ETAG_TIMEOUT), float("inf")
    if _downloads.running:  # the client would wait a minute for a file's description when it asks for the second time
        most = float(max(constants.HF_HUB_ETAG_TIMEOUT, constants.HF_HUB_DOWNLOAD_TIMEOUT))
    limits |= {kind: first if value is None else min(value, most) for kind, value in limits.items()}


def _before_request(request: Any) -> None:
    _limit_waiting(request)
    if not _downloads.running:
        return
    if reason := silent_reason():
        raise HubUnreachableError(reason)
    one = threading.get_ident(), request.method, str(request.url)
    if one in _downloads.asked and time.monotonic() - _downloads.heard >= _longest_silence():
        reason = "no answer in time"
        remember_silence(reason)
        raise HubUnreachableError(reason)
    _downloads.asked.add(one)


def _after_headers(response: Any) -> None:
    _downloads.heard = time.monotonic()
    response.stream = _heard(response.stream)


def _heard(stream: Any) -> Any:
    """The same body; each piece of it is a sign of life."""

    class Heard(type(stream)):  # type: ignore[misc]  # the class of bodies is of the client's own HTTP library
        def __init__(self) -> None:
            """Has no state of its own."""

        def __iter__(self) -> Iterator[bytes]:
            for piece in stream:
                _downloads.heard = time.monotonic()
                yield piece

        def close(self) -> None:
            stream.close()

    return Heard()


def _client() -> Any:
    client = default_client_factory()
    hooks = client.event_hooks
    client.event_hooks = {
        "request": [*hooks["request"], _before_request],
        "response": [*hooks["response"], _after_headers],
    }
    return client


set_client_factory(_client)
