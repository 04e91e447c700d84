"""The first signal asks the workers to stop with a checkpoint; the second one stops at once."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tasks.on_ray.stopping import stopping_gently


class Meter:
    """A stand-in for the `ProgressMeter`; it only takes the stop request."""

    def __init__(self) -> None:
        self.stop_requested = threading.Event()
        self.stop = self

    def remote(self) -> None:
        self.stop_requested.set()


@pytest.fixture(autouse=True)
def _ctrl_c_interrupts() -> Iterator[None]:
    """A shell that starts the tests in the background makes them ignore SIGINT; undo that."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def send(number: int) -> None:
    os.kill(os.getpid(), number)
    time.sleep(0.01)


def test_a_signal_stops_the_workers_and_takes_effect_after_that(
    capsys: pytest.CaptureFixture[str],
) -> None:
    before, meter, steps = signal.getsignal(signal.SIGINT), Meter(), []

    def train() -> None:
        with stopping_gently("train", meter):
            send(signal.SIGINT)
            assert meter.stop_requested.wait(60)
            steps.append("the current step, and a checkpoint")

    with pytest.raises(KeyboardInterrupt):
        train()
    assert steps
    assert signal.getsignal(signal.SIGINT) is before
    assert "train: stopping after this step, with a checkpoint." in capsys.readouterr().err


def test_a_second_signal_takes_effect_at_once() -> None:
    steps = []

    def train() -> None:
        with stopping_gently("train", Meter()):
            send(signal.SIGINT)
            send(signal.SIGINT)
            steps.append("it went on")

    with pytest.raises(KeyboardInterrupt):
        train()
    assert not steps


def test_without_a_signal_no_stop_is_requested_and_the_handlers_are_restored() -> None:
    before, meter = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)], Meter()
    with stopping_gently("train", meter):
        pass
    with pytest.raises(ValueError, match="a fault"), stopping_gently("train", meter):
        raise ValueError("a fault")
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == before
    assert not meter.stop_requested.is_set()


def test_another_thread_gets_no_signals_and_sets_no_handlers() -> None:
    done: list[bool] = []

    def work() -> None:
        with stopping_gently("train", Meter()):
            done.append(signal.getsignal(signal.SIGINT) is signal.default_int_handler)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert done == [True]


@pytest.mark.parametrize("signals", [1, 2])
def test_a_process_that_is_terminated_ends_by_that_signal(signals: int) -> None:
    program = f"""
import os, signal, sys, time
from tasks.on_ray.stopping import stopping_gently
from tests.on_ray.test_stopping import Meter
meter = Meter()
with stopping_gently("train", meter):
    for _ in range({signals}):
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(0.01)
    meter.stop_requested.wait(60)
    print("stopped with a checkpoint", flush=True)
print("went on", flush=True)
"""
    root = Path(__file__).resolve().parents[2]
    ended = subprocess.run(
        [sys.executable, "-c", program], cwd=root, capture_output=True, text=True, timeout=60, check=False
    )
    assert ended.returncode == -signal.SIGTERM
    assert ended.stdout == ("stopped with a checkpoint\n" if signals == 1 else "")
