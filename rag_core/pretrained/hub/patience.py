"""Limit how long we wait for a hub that has listed a model's files and then goes silent.

The hub's client has no time limit for some requests, such as the one for the tree of a commit, and it retries failed
requests for up to a minute. Importing this module gives every request of that client in this process a time limit, and
stops retries once no byte has arrived for a while. A download that moves goes on, however slow it is, even after a lost
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
    """The state of the downloads that run in this process."""

    running: int = 0
    last_byte_at: float = 0.0  # when the last byte arrived, on the monotonic clock
    requested: set[tuple[int, str, str]] = field(default_factory=set)  # thread, method and address of each request


_downloads = _Downloads()
_lock = threading.Lock()


@contextlib.contextmanager
def limited_patience() -> Iterator[None]:
    """Inside this block a failed request is not retried once the hub has been silent for `_longest_silence` seconds.

    Raises:
        HubUnreachableError: from the request; the client lets it pass, because it retries only its own errors.
    """
    with _lock:
        if not _downloads.running:
            _downloads.requested.clear()
        _downloads.running += 1
        _downloads.last_byte_at = time.monotonic()
    try:
        yield
    finally:
        with _lock:
            _downloads.running -= 1


def _longest_silence() -> float:
    """Seconds without a byte after which a failed request is not retried.

    At most one time limit: a request that gets no byte ends after that, and the client may retry it at once. Refused
    connections need less: they fail at once and are retried after 1, 3, 7 and 15 s, and 7 s must be the end. The pause
    of one second that the client makes after a lost connection must not count as silence.
    """
    seconds = float(constants.HF_HUB_ETAG_TIMEOUT)
    return min(seconds, seconds / 2 + 1)


def _limit_waiting(request: Any) -> None:
    """Give a request the time limits that it lacks; during downloads, cut those that exceed the user's settings."""
    limits = request.extensions.get("timeout", {})
    first, most = float(constants.HF_HUB_ETAG_TIMEOUT), float("inf")
    if _downloads.running:  # on its second try, the client would wait a minute for a file's metadata
        most = float(max(constants.HF_HUB_ETAG_TIMEOUT, constants.HF_HUB_DOWNLOAD_TIMEOUT))
    limits |= {kind: first if value is None else min(value, most) for kind, value in limits.items()}


def _before_request(request: Any) -> None:
    _limit_waiting(request)
    if not _downloads.running:
        return
    if reason := silent_reason():
        raise HubUnreachableError(reason)
    key = threading.get_ident(), request.method, str(request.url)
    if key in _downloads.requested and time.monotonic() - _downloads.last_byte_at >= _longest_silence():
        reason = "no answer in time"
        remember_silence(reason)
        raise HubUnreachableError(reason)
    _downloads.requested.add(key)


def _after_headers(response: Any) -> None:
    _downloads.last_byte_at = time.monotonic()
    response.stream = _timed(response.stream)


def _timed(stream: Any) -> Any:
    """The same body; each piece that arrives updates `last_byte_at`."""

    class Timed(type(stream)):  # type: ignore[misc]  # the class of bodies belongs to the client's HTTP library
        def __init__(self) -> None:
            """Keep no state: `stream` has it."""

        def __iter__(self) -> Iterator[bytes]:
            for piece in stream:
                _downloads.last_byte_at = time.monotonic()
                yield piece

        def close(self) -> None:
            stream.close()

    return Timed()


def _client() -> Any:
    client = default_client_factory()
    hooks = client.event_hooks
    client.event_hooks = {
        "request": [*hooks["request"], _before_request],
        "response": [*hooks["response"], _after_headers],
    }
    return client


set_client_factory(_client)
