"""A clock that a test sets by hand. It replaces `time` in one module of ours, so a busy machine cannot move it."""

from __future__ import annotations


class Clock:
    """Advances by `sleep`, or by hand (`clock.now += 599`), and stands still otherwise."""

    def __init__(self) -> None:
        self.now = 1000.0

    def monotonic(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds
