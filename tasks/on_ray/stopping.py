"""Ctrl-C and SIGTERM while workers train: the first asks them to stop with a checkpoint, a second one stops at once."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
from collections.abc import Iterator
from types import FrameType
from typing import Any

from tasks.terminal import say

SIGNALS = (signal.SIGINT, signal.SIGTERM)


@contextlib.contextmanager
def stopping_gently(stage: str, meter: Any) -> Iterator[None]:
    """Inside, a signal is passed on to the workers through `meter`; on leaving it has the effect it would have had.

    A second signal has its effect at once. Nothing happens outside of the main thread, which alone gets signals.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.getsignal(number) for number in SIGNALS}
    received: list[int] = []
    asked, over = threading.Event(), threading.Event()

    def take(number: int, frame: FrameType | None) -> None:
        if received:
            give_back(number, frame)
            return
        received.append(number)
        asked.set()

    def give_back(number: int, frame: FrameType | None = None) -> None:
        for one, handler in before.items():
            signal.signal(one, handler)
        handler = before[signal.Signals(number)]
        if callable(handler):
            handler(number, frame)
        else:
            os.kill(os.getpid(), number)

    def pass_on() -> None:
        # Not in the handler, which may interrupt whatever this process is in the middle of.
        asked.wait()
        if not over.is_set():
            meter.stop.remote()
            text = (
                f"\n{stage}: stopping after this step, with a checkpoint. A second signal stops at once, without one."
            )
            say(text)
            meter.stop.remote()

    threading.Thread(target=pass_on, name="pass a signal on", daemon=True).start()
    for number in SIGNALS:
        signal.signal(number, take)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        over.set()
        asked.set()
    if received:
        give_back(received[0])
