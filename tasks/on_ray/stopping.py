"""Handles Ctrl-C and SIGTERM during training: the first stops it with a checkpoint, the second stops it at once."""

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
    """Delay SIGINT and SIGTERM in the block: ask the workers to stop, and let the signal take effect after the block.

    The stop request goes through `meter`, a `ProgressMeter`. A second signal takes effect at once. Outside the main
    thread this does nothing, because only the main thread receives signals.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.getsignal(number) for number in SIGNALS}
    received: list[int] = []
    wake, over = threading.Event(), threading.Event()

    def on_signal(number: int, frame: FrameType | None) -> None:
        if received:
            take_effect(number, frame)
            return
        received.append(number)
        wake.set()

    def take_effect(number: int, frame: FrameType | None = None) -> None:
        for other, handler in before.items():
            signal.signal(other, handler)
        handler = before[signal.Signals(number)]
        if callable(handler):
            handler(number, frame)
        else:
            os.kill(os.getpid(), number)

    def request_stop() -> None:
        # Runs in a thread, because a signal handler may interrupt this process in the middle of anything.
        wake.wait()
        if not over.is_set():
            meter.stop.remote()
            text = (
                f"\n{stage}: stopping after this step, with a checkpoint. A second signal stops at once, without one."
            )
            say(text)
            meter.stop.remote()

    threading.Thread(target=request_stop, name="pass a signal on", daemon=True).start()
    for number in SIGNALS:
        signal.signal(number, on_signal)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        over.set()
        wake.set()
    if received:
        take_effect(received[0])
