"""Fuzzing: whatever bytes a reader is given, it reads them or raises `RagError`, soon and without much memory.

`make test` reads again what was ever found, and a few hundred inputs that Hypothesis draws and shrinks; `make chaos` feeds
every reader 100,000 numbered inputs in a process of its own, so that one that dies is noticed, too.
"""

from __future__ import annotations

import contextlib
import json
import random
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from rag_core.errors import RagError
from tests.fuzz.__main__ import BYTES, KEPT, SECONDS
from tests.fuzz.mutations import mutate, numbered
from tests.fuzz.targets import MODEL_TARGETS, TARGETS, Feed, Target

SEED = 5
# Inputs for each target of a process. An index's files are one reader's; each input of a model target loads a model.
GROUPS = {
    "corpus": 100_000,
    "layouts": 50_000,
    "questions": 100_000,
    "datasets": 50_000,
    "others": 100_000,
    "index": 20_000,
    "model": 500,
}


def targets_of(group: str) -> list[str]:
    """Those whose names begin so; "others" are those of no group."""
    names = [*TARGETS, *MODEL_TARGETS]
    if group == "others":
        return [name for name in names if name.partition("-")[0] not in GROUPS]
    return [name for name in names if name.startswith(f"{group}-")]


def read_or_refused(feed: Feed, data: bytes) -> None:
    before = time.thread_time()
    with contextlib.suppress(RagError):
        feed(data)
    assert time.thread_time() - before < SECONDS, "of the processor, whatever else the machine does"


def warm(target: Target) -> Target:
    """The target once it has imported all that it needs, which takes longer than an input may."""
    target.feed(target.samples[0])
    return target


@pytest.mark.parametrize("name", TARGETS)
def test_what_was_ever_found_is_read_or_refused(name: str, tmp_path: Path) -> None:
    target = warm(TARGETS[name](tmp_path))
    for file in sorted((KEPT / name).glob("*")):
        read_or_refused(target.feed, file.read_bytes())


@pytest.mark.parametrize("name", TARGETS)
def test_damaged_samples_are_read_or_refused(name: str, tmp_path: Path) -> None:
    target = warm(TARGETS[name](tmp_path))

    @settings(max_examples=60, suppress_health_check=list(HealthCheck))
    @given(st.randoms(use_true_random=False))
    def check(rng: random.Random) -> None:
        read_or_refused(target.feed, mutate(rng, target.samples))

    check()


@pytest.mark.parametrize("name", MODEL_TARGETS)
def test_a_damaged_model_folder_is_read_or_refused(name: str, tmp_path: Path) -> None:
    target = warm(MODEL_TARGETS[name](tmp_path))
    for file in sorted((KEPT / name).glob("*")):
        read_or_refused(target.feed, file.read_bytes())
    for number in range(10):
        read_or_refused(target.feed, numbered(SEED, number, target.samples))


def test_numbered_inputs_can_be_made_again_and_are_seldom_the_samples() -> None:
    samples = [b'{"id": "a", "text": "one"}\n', b"id\ttext\n1\tone\n"]
    inputs = [numbered(SEED, number, samples) for number in range(200)]
    assert inputs == [numbered(SEED, number, samples) for number in range(200)]
    assert sum(data in samples for data in inputs) < 40
    assert len(set(inputs)) > 150


def test_every_target_is_in_one_group() -> None:
    assert sorted(name for group in GROUPS for name in targets_of(group)) == sorted([*TARGETS, *MODEL_TARGETS])


@pytest.mark.chaos(short=False)
@pytest.mark.timeout(1200)
@pytest.mark.parametrize(("group", "inputs"), GROUPS.items())
def test_a_hundred_thousand_inputs_are_read_or_refused_soon_and_in_little_memory(
    group: str, inputs: int, tmp_path: Path, figure: Callable[[str], None]
) -> None:
    names, progress = targets_of(group), tmp_path / "progress"
    command = [sys.executable, "-m", "tests.fuzz", *names, "--inputs", str(inputs), "--seed", str(SEED)]
    done = subprocess.run(
        [*command, "--progress", progress], capture_output=True, text=True, timeout=1000, cwd=Path(__file__).parents[2]
    )
    results = [
        json.loads(line) for line in done.stdout.splitlines() if line.startswith('{"target"')
    ]  # libraries print, too
    if done.returncode:
        at = int.from_bytes(progress.read_bytes()[:8], "little")
        pytest.fail(
            f"{names[len(results)]} ended with {done.returncode} at input {at}, seed {SEED}: {done.stderr[-2000:]}"
        )
    assert [result["target"] for result in results] == names
    for result in results:
        assert result["findings"] == []
        assert result["read"] + result["refused"] == inputs
        assert result["read"] > 0
        assert result["grown_mb"] < BYTES // 2**20
        figure(
            f"{result['target']}: {result['read']:,} read, {result['refused']:,} refused, 0 other; the slowest in "
            f"{result['slowest']} s, {result['grown_mb']} MiB more, {result['seconds']} s in all"
        )
