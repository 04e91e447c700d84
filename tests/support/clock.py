"""A clock that a test sets by hand, in place of the module `time` of one module of ours: busy machines do not move it."""

from __future__ import annotations


class Clock:
    """It goes on while one sleeps, or when it is told to (`clock.now += 599`), and stands still otherwise."""

    def __init__(self) -> None:
        self.now = 1000.0

    def monotonic(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds
