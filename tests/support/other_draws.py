"""Draws from the generators that a process shares, made by another thread, as any library's thread may make them."""

from __future__ import annotations

import random
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch


def draw_in_another_thread(times: int = 1) -> None:
    """Another thread draws from every shared generator, and has ended."""

    def draw() -> None:
        for _ in range(times):
            random.random(), np.random.random(), torch.rand(()), torch.randn(5)

    thread = threading.Thread(target=draw)
    thread.start()
    thread.join()


@contextmanager
def torchs_own_generator_untouched() -> Iterator[None]:
    """AssertionError if the block draws from PyTorch's default generator, or seeds it."""
    before = torch.get_rng_state()
    yield
    assert torch.equal(torch.get_rng_state(), before)
