"""Checkpoints on disk: damage, kills, full disks and second writers leave a complete checkpoint to resume from."""

from __future__ import annotations

import contextlib
import functools
import os
import shutil
import subprocess
from collections.abc import Callable, Iterator
from itertools import count
from pathlib import Path
from typing import Any

import pytest

from rag_core.errors import ArtifactError, ConfigError
from rag_core.training.checkpoint import Checkpoints
from rag_core.training.loop import Hooks, Place, run_training
from tests.support.clock import Clock
from tests.training.resumable_runs import CONFIG, EXAMPLES, STEPS, Line, run


def _flip_a_bit(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


def _cut(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-9])


@pytest.mark.parametrize(
    ("name", "damage"),
    [
        ("step-00000006/model.safetensors", _flip_a_bit),
        ("step-00000006/optimizer.safetensors", _cut),
        ("step-00000006/state.json", Path.unlink),
        ("step-00000006/manifest.json", _cut),
        ("step-00000006/manifest.json", Path.unlink),
        ("best-00000006/best", _flip_a_bit),
        ("best-00000006/manifest.json", Path.unlink),
    ],
)
def test_a_damaged_checkpoint_is_passed_over_and_the_one_before_leads_to_the_same_bits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], name: str, damage: Any
) -> None:
    from tasks.on_ray.training import _announce_resume

    undisturbed = run(Line, tmp_path / "undisturbed", monkeypatch)
    folder = tmp_path / "training"
    run(Line, folder, monkeypatch, stop_after=6)
    assert sorted(path.name for path in folder.glob("[sb]*-*")) == [
        "best-00000003",
        "best-00000006",
        "step-00000005",
        "step-00000006",
    ], "the last two checkpoints, and the best weights that each refers to"
    damage(folder / name)
    _announce_resume("train", folder, STEPS)
    stderr = capsys.readouterr().err
    assert "train: the checkpoint step-00000006 is damaged, so it is not used" in stderr
    assert "train: resuming after step 5 of 7 (checkpoint of 20" in stderr
    second = run(Line, folder, monkeypatch)
    second.assert_equals(undisturbed)
    assert second.caller.stop_checks == 7
    assert (second.caller.checkpoints.best() / "best").read_text() == (
        undisturbed.caller.checkpoints.best() / "best"
    ).read_text()


def test_without_a_complete_checkpoint_training_starts_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    undisturbed = run(Line, tmp_path / "undisturbed", monkeypatch)
    folder = tmp_path / "training"
    run(Line, folder, monkeypatch, stop_after=6)
    for manifest in folder.glob("step-*/manifest.json"):
        manifest.unlink()
    (folder / ".step-00000007.draft-1234").mkdir()
    run(Line, folder, monkeypatch).assert_equals(undisturbed)
    assert not list(folder.glob(".*")), "leftovers of a killed writer are deleted"


class _Killed(BaseException):
    """Stands for a kill: nothing in the process catches it to clean up."""


@contextlib.contextmanager
def _killed_at(moment: int, folder: Path) -> Iterator[list[int]]:
    """Kill the run in the block at the write, flush, rename or deletion of this number, counted after step 1.

    Yields a list with the number of operations left.
    """
    import rag_core.training.checkpoint

    left = [moment]

    def counted(plain: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **options: Any) -> Any:
            if (folder / "step-00000001").exists():
                left[0] -= 1
                if left[0] <= 0:
                    raise _Killed
            return plain(*arguments, **options)

        return call

    with pytest.MonkeyPatch.context() as patch, contextlib.suppress(_Killed):
        for owner, names in ((os, ["fsync"]), (Path, ["rename", "mkdir", "unlink"]), (shutil, ["rmtree"])):
            for name in names:
                patch.setattr(owner, name, counted(getattr(owner, name)))
        patch.setattr(rag_core.training.checkpoint, "save_file", counted(rag_core.training.checkpoint.save_file))
        yield left


def test_a_kill_at_any_moment_of_writing_leaves_a_checkpoint_that_leads_to_the_same_bits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = CONFIG.model_copy(update={"steps": 3, "eval_every": 2})
    undisturbed = run(Line, tmp_path / "undisturbed", monkeypatch, config)
    for moment in count(1):
        folder = tmp_path / f"killed-{moment}"
        with _killed_at(moment, folder) as left:
            run(Line, folder, monkeypatch, config, stop_after=2)
        if left[0] > 0:
            break
        second = run(Line, folder, monkeypatch, config)
        second.assert_equals(undisturbed)
    assert moment > 12


def test_another_number_of_workers_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "training"
    run(Line, folder, monkeypatch, stop_after=2)
    message = "ran with 1 workers, but this run has 3, .* Set num_workers to 1, or delete that folder"
    with pytest.raises(ConfigError, match=message):
        run_training(Line(), EXAMPLES, CONFIG, Place(world_size=3), Hooks(), Checkpoints(folder))


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of 1 MB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(folder)]
    if os.geteuid() != 0 or subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("mounting is not permitted here")
    yield folder
    subprocess.run(["umount", "--lazy", str(folder)], check=True)


@pytest.mark.parametrize("part", ["state.json", "model.safetensors", "optimizer.safetensors"])
def test_a_full_disk_fails_the_step_and_the_earlier_checkpoint_stays(
    small_disk: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, part: str
) -> None:
    make = functools.partial(Line, 10_000)
    undisturbed = run(make, tmp_path / "undisturbed", monkeypatch)
    folder = small_disk / "training"
    run(make, folder, monkeypatch, stop_after=4)
    space = {"state.json": 0, "model.safetensors": 30_000, "optimizer.safetensors": 90_000}[part]
    free = shutil.disk_usage(small_disk).free
    (small_disk / "other").write_bytes(bytes(free - free % 4096 - space))
    message = (
        r"No space left in .*training for (checkpoints|the checkpoint of step 5)\. "
        r"The checkpoint of step 4 is complete\. Free space, and run the same command again: it continues from there"
    )
    for _ in range(2):
        with pytest.raises(ArtifactError, match=message):
            run(make, folder, monkeypatch)
    assert not list(folder.glob(".*draft*"))
    (small_disk / "other").unlink()
    run(make, folder, monkeypatch).assert_equals(undisturbed)


def test_a_second_writer_waits_for_the_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import rag_core.training.checkpoint

    monkeypatch.setattr(rag_core.training.checkpoint, "WAIT_SECONDS", 0.3)
    first, second = Checkpoints(tmp_path / "training"), Checkpoints(tmp_path / "training")
    with first.sole_writer(), pytest.raises(ArtifactError, match="being written by another run"), second.sole_writer():
        pass
    with second.sole_writer():
        pass


def test_without_a_number_of_steps_checkpoints_come_after_ten_minutes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import rag_core.training.checkpoint

    clock = Clock()
    monkeypatch.setattr(rag_core.training.checkpoint, "time", clock)
    checkpoints = Checkpoints(tmp_path)
    assert [step for step in range(1, 10) if checkpoints.due(step, 3)] == [3, 6, 9]
    assert not checkpoints.due(3, None)
    clock.now += 599
    assert not checkpoints.due(4, None)
    clock.now += 1
    assert checkpoints.due(5, None)
