"""Another thread draws from the random generators that all threads share, as a library's thread may."""

from __future__ import annotations

import random
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch


def draw_in_another_thread(times: int = 1) -> None:
    """Let another thread draw from every shared generator, and wait until it has ended."""

    def draw() -> None:
        for _ in range(times):
            random.random(), np.random.random(), torch.rand(()), torch.randn(5)

    thread = threading.Thread(target=draw)
    thread.start()
    thread.join()


@contextmanager
def torchs_own_generator_untouched() -> Iterator[None]:
    """Raise AssertionError if the block draws from PyTorch's default generator or seeds it."""
    before = torch.get_rng_state()
    yield
    assert torch.equal(torch.get_rng_state(), before)
