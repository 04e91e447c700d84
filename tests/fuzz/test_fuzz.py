"""Fuzzing: a reader reads any bytes or refuses them with `RagError`, within 2 s and 1 GiB of memory.

`make test` reads all earlier findings again, and sixty inputs per reader that Hypothesis draws and shrinks.
`make chaos` feeds 500 to 100,000 numbered inputs to every reader, in a process per group, so that a crash of the
process is noticed.
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
# Inputs per target of each group. An index's files share one reader, and each input of a model target loads a model, so
# these groups get fewer.
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
    """The targets whose names begin with the group's; "others" are the rest."""
    names = [*TARGETS, *MODEL_TARGETS]
    if group == "others":
        return [name for name in names if name.partition("-")[0] not in GROUPS]
    return [name for name in names if name.startswith(f"{group}-")]


def read_or_refused(feed: Feed, data: bytes) -> None:
    before = time.thread_time()
    with contextlib.suppress(RagError):
        feed(data)
    assert time.thread_time() - before < SECONDS, "seconds of this thread on the processor, without those of other work"


def warm(target: Target) -> Target:
    """Read a valid sample first: the imports that it triggers take longer than an input may."""
    target.feed(target.samples[0])
    return target


@pytest.mark.parametrize("name", TARGETS)
def test_every_earlier_finding_is_read_or_refused(name: str, tmp_path: Path) -> None:
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


def test_numbered_inputs_are_reproducible_and_seldom_equal_a_sample() -> None:
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
    process = subprocess.run(
        [*command, "--progress", progress], capture_output=True, text=True, timeout=1000, cwd=Path(__file__).parents[2]
    )
    results = [
        json.loads(line) for line in process.stdout.splitlines() if line.startswith('{"target"')
    ]  # skips what libraries print
    if process.returncode:
        number = int.from_bytes(progress.read_bytes()[:8], "little")
        name, errors = names[len(results)], process.stderr[-2000:]
        pytest.fail(f"{name} ended with {process.returncode} at input {number}, seed {SEED}: {errors}")
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
