"""Training that goes on from its checkpoint: what follows is what would have followed, to the last bit."""

from __future__ import annotations

import contextlib
import os
import random
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import count, islice
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from rag_core.errors import ArtifactError, ConfigError
from rag_core.index.passage_index import PassageIndex
from rag_core.model.rag_model import RagModel
from rag_core.questions.questions import Question
from rag_core.training.checkpoint import Checkpoints
from rag_core.training.loop import Hooks, OptimizerConfig, Place, global_batches, run_training
from rag_core.training.objectives import EndToEnd, EndToEndRates
from tests.support.clock import Clock
from tests.support.other_draws import draw_in_another_thread
from tests.support.small_corpus import QUESTIONS, make_encoder, make_generator, make_index, model_config

EXAMPLES = [Question(str(n), text, (answer,), kind, (gold,)) for n, (text, answer, gold, kind) in enumerate(QUESTIONS)]
STEPS = 7
CONFIG = OptimizerConfig(
    steps=STEPS, batch_size=6, accumulation=2, warmup_steps=3, log_every=2, eval_every=3, checkpoint_every=1, seed=5
)


@dataclass
class Told:
    """A caller: it keeps the curves, and the weights whose nll on dev is the best so far."""

    checkpoints: Checkpoints
    objective: Any
    stop_after: int = 0
    curves: dict[str, list[Any]] = field(default_factory=lambda: {"history": [], "dev": []})
    best: float = float("inf")
    asked: int = 0

    def hooks(self) -> Hooks:
        return Hooks(
            log=self._log,
            evaluate=self._evaluate,
            keep=self._keep,
            stop=self._stop,
            state=lambda: {"curves": self.curves, "best": self.best, "asked": self.asked},
            restore=self._restore,
        )

    def _log(self, step: int, metrics: dict[str, float]) -> None:
        assert metrics.pop("examples_per_second") > 0
        self.curves["history"].append({"step": step, **metrics})

    def _evaluate(self, step: int) -> dict[str, float]:
        with torch.no_grad():
            return {"nll": float(self.objective(EXAMPLES[:3]).mean())}

    def _keep(self, step: int, dev: dict[str, float]) -> None:
        self.curves["dev"].append({"step": step, **dev})
        if dev["nll"] < self.best:
            self.best = dev["nll"]
            self.checkpoints.keep_best(step, lambda folder: (folder / "best").write_text(f"{step}"))

    def _stop(self) -> bool:
        self.asked += 1
        return self.asked == self.stop_after

    def _restore(self, step: int, state: dict[str, Any]) -> None:
        self.curves, self.best, self.asked = state["curves"], state["best"], state["asked"]


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, PassageIndex]:
    folder = tmp_path_factory.mktemp("checkpoint")
    encoder = make_encoder(folder / "encoder")
    return encoder, make_generator(folder / "generator", encoder), make_index(folder / "index", encoder)


def _objective(parts: tuple[Path, Path, PassageIndex], dropout: float = 0.2) -> EndToEnd:
    """With dropout, on whose masks every step after the first depends."""
    model = RagModel.from_parts(model_config(parts[0], parts[1]))
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = dropout
    return EndToEnd(model, parts[2], "token", EndToEndRates(question_encoder=1e-3, generator=2e-3))


@dataclass
class Outcome:
    """All that a run leaves: weights, moments, curves."""

    done: int
    weights: dict[str, torch.Tensor]
    moments: dict[str, torch.Tensor]
    told: Told

    def assert_equals(self, other: Outcome) -> None:
        assert self.told.curves == other.told.curves
        assert self.told.best == other.told.best
        for mine, others in ((self.weights, other.weights), (self.moments, other.moments)):
            assert mine.keys() == others.keys()
            assert all(torch.equal(one, others[name]) for name, one in mine.items())
        assert self.moments


def _run(
    parts: tuple[Path, Path, PassageIndex] | None,
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    config: OptimizerConfig = CONFIG,
    stop_after: int = 0,
    make: Callable[..., Any] = _objective,
) -> Outcome:
    made: list[torch.optim.Optimizer] = []
    plain = torch.optim.AdamW
    with monkeypatch.context() as patch:
        patch.setattr(torch.optim, "AdamW", lambda *given, **more: made.append(plain(*given, **more)) or made[-1])
        checkpoints, objective = Checkpoints(folder), make(parts)
        told = Told(checkpoints, objective, stop_after)
        done = run_training(objective, EXAMPLES, config, Place(), told.hooks(), checkpoints)
    states = made[0].state_dict()["state"]
    moments = {f"{number}.{name}": one for number, state in states.items() for name, one in state.items()}
    return Outcome(done, {name: one.clone() for name, one in objective.state_dict().items()}, moments, told)


@pytest.fixture(scope="module")
def undisturbed(parts: tuple[Path, Path, PassageIndex], tmp_path_factory: pytest.TempPathFactory) -> Outcome:
    return _run(parts, tmp_path_factory.mktemp("undisturbed") / "training", pytest.MonkeyPatch())


@pytest.mark.parametrize("stopped_at", range(1, STEPS))
def test_a_run_stopped_after_any_step_goes_on_to_the_same_bits(
    parts: tuple[Path, Path, PassageIndex],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    undisturbed: Outcome,
    stopped_at: int,
) -> None:
    first = _run(parts, tmp_path / "training", monkeypatch, stop_after=stopped_at)
    assert first.done == stopped_at
    draw_in_another_thread()  # another process's shared generators would not stand where these do
    second = _run(parts, tmp_path / "training", monkeypatch)
    assert second.done == STEPS
    second.assert_equals(undisturbed)


def test_a_run_without_checkpoints_is_the_same_run(
    parts: tuple[Path, Path, PassageIndex], undisturbed: Outcome, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    rare = CONFIG.model_copy(update={"checkpoint_every": None})
    _run(parts, tmp_path / "training", monkeypatch, rare).assert_equals(undisturbed)
    assert sorted(file.name for file in (tmp_path / "training" / "step-00000007").iterdir()) == [
        "manifest.json",
        "state.json",
    ], "when all steps are done only what they led to is wanted"


@pytest.mark.chaos(short=False)
def test_with_two_threads_too_a_run_is_repeated_and_resumed_to_the_same_bits(
    parts: tuple[Path, Path, PassageIndex], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    torch.set_num_threads(2)
    try:
        first = _run(parts, tmp_path / "one", monkeypatch)
        first.assert_equals(_run(parts, tmp_path / "two", monkeypatch))
        _run(parts, tmp_path / "three", monkeypatch, stop_after=4)
        first.assert_equals(_run(parts, tmp_path / "three", monkeypatch))
    finally:
        torch.set_num_threads(1)


def _objective_among_others(parts: tuple[Path, Path, PassageIndex]) -> EndToEnd:
    """Before every dropout of every pass other threads draw, now more, now less."""
    objective, chance = _objective(parts), random.Random(time.monotonic_ns())
    layers = [module for module in objective.modules() if isinstance(module, nn.Dropout)]
    assert len(layers) > 5
    for layer in layers:
        layer.register_forward_pre_hook(lambda *_: draw_in_another_thread(chance.randrange(1, 4)))
    return objective


def test_draws_of_other_threads_from_shared_generators_change_no_bit(
    parts: tuple[Path, Path, PassageIndex], undisturbed: Outcome, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    for stop_after in (3, 0):
        run = _run(parts, tmp_path / "training", monkeypatch, stop_after=stop_after, make=_objective_among_others)
    run.assert_equals(undisturbed)


def test_weights_and_curves_depend_on_dropout(
    parts: tuple[Path, Path, PassageIndex], undisturbed: Outcome, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Else equal bits would prove nothing of it."""
    dev = undisturbed.told.curves["dev"]
    assert [point["step"] for point in dev] == [3, 6, 7]
    assert [point["step"] for point in undisturbed.told.curves["history"]] == [2, 4, 6, 7]
    without = _run(parts, tmp_path / "training", monkeypatch, make=lambda parts: _objective(parts, dropout=0.0))
    assert without.told.curves["history"][0]["train_nll"] != undisturbed.told.curves["history"][0]["train_nll"]
    assert without.told.curves["dev"] != dev


def test_each_step_and_each_rank_draws_its_own_masks() -> None:
    masks: list[torch.Tensor] = []

    class Dropped(_Line):
        def forward(self, examples: list[Question]) -> torch.Tensor:
            masks.append(nn.functional.dropout(torch.ones(40), 0.5))
            return super().forward(examples)

    for place in (Place(0, 2), Place(1, 2)):
        run_training(Dropped(), EXAMPLES, CONFIG.model_copy(update={"batch_size": 4}), place, Hooks())
    assert len({tuple(mask.tolist()) for mask in masks}) == len(masks) == 2 * 2 * STEPS


def test_a_checkpoint_of_before_with_random_states_in_it_is_taken_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    undisturbed = _run(None, tmp_path / "undisturbed", monkeypatch, make=_line())
    write = Checkpoints.write

    def write_as_before(*given: Any) -> None:
        state = given[-1]
        for worker in state["workers"]:
            worker["random"] = {"python": [3, [0] * 625, None], "numpy": {}, "torch": "00"}
        write(*given)

    with monkeypatch.context() as patch:
        patch.setattr(Checkpoints, "write", write_as_before)
        _run(None, tmp_path / "training", monkeypatch, stop_after=4, make=_line())
    assert '"random"' in (tmp_path / "training" / "step-00000004" / "state.json").read_text()
    _run(None, tmp_path / "training", monkeypatch, make=_line()).assert_equals(undisturbed)


@pytest.mark.parametrize("skip", range(12))
def test_batches_that_are_skipped_change_nothing_of_those_that_follow(skip: int) -> None:
    config = OptimizerConfig(batch_size=4, seed=3)
    examples = list(range(10))
    whole = list(islice(global_batches(examples, config), 20))
    assert list(islice(global_batches(examples, config, skip=skip), 20 - skip)) == whole[skip:]


class _Line(nn.Module):
    """Small enough for many checkpoints."""

    def __init__(self, size: int = 3) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.linspace(-1, 1, size))

    def forward(self, examples: list[Question]) -> torch.Tensor:
        x_B = torch.tensor([float(len(example.question)) for example in examples])
        return (self.weight.mean() * x_B - 1).square()

    def parameter_groups(self) -> list[dict[str, Any]]:
        return [{"params": [self.weight], "lr": 0.01}]


def _line(size: int = 3) -> Callable[..., Any]:
    return lambda _: _Line(size)


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
    from tasks.on_ray.training import _say_where_it_goes_on

    undisturbed = _run(None, tmp_path / "undisturbed", monkeypatch, make=_line())
    folder = tmp_path / "training"
    _run(None, folder, monkeypatch, stop_after=6, make=_line())
    assert sorted(one.name for one in folder.glob("[sb]*-*")) == [
        "best-00000003",
        "best-00000006",
        "step-00000005",
        "step-00000006",
    ], "the last two checkpoints, and the best weights that each speaks of"
    damage(folder / name)
    _say_where_it_goes_on("train", folder, STEPS)
    said = capsys.readouterr().err
    assert "train: the checkpoint step-00000006 is damaged, so it is not used" in said
    assert "train: going on after step 5 of 7 (checkpoint of 20" in said
    second = _run(None, folder, monkeypatch, make=_line())
    second.assert_equals(undisturbed)
    assert second.told.asked == 7
    assert (second.told.checkpoints.best() / "best").read_text() == (
        undisturbed.told.checkpoints.best() / "best"
    ).read_text()


def test_with_no_checkpoint_whole_training_begins_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    undisturbed = _run(None, tmp_path / "undisturbed", monkeypatch, make=_line())
    folder = tmp_path / "training"
    _run(None, folder, monkeypatch, stop_after=6, make=_line())
    for manifest in folder.glob("step-*/manifest.json"):
        manifest.unlink()
    (folder / ".step-00000007.draft-1234").mkdir()
    _run(None, folder, monkeypatch, make=_line()).assert_equals(undisturbed)
    assert not list(folder.glob(".*")), "what a killed writer left is gone"


class _Killed(BaseException):
    """The process does nothing more, not even clean up behind it."""


@contextlib.contextmanager
def _killed_at(moment: int, folder: Path) -> Iterator[list[int]]:
    """In the block the first so many writes, flushes, renames and deletions after step 1 happen; yields how many are left."""
    import rag_core.training.checkpoint

    left = [moment]

    def counted(plain: Callable[..., Any]) -> Callable[..., Any]:
        def call(*given: Any, **more: Any) -> Any:
            if (folder / "step-00000001").exists():
                left[0] -= 1
                if left[0] <= 0:
                    raise _Killed
            return plain(*given, **more)

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
    undisturbed = _run(None, tmp_path / "undisturbed", monkeypatch, config, make=_line())
    for moment in count(1):
        folder = tmp_path / f"killed-{moment}"
        with _killed_at(moment, folder) as left:
            _run(None, folder, monkeypatch, config, stop_after=2, make=_line())
        if left[0] > 0:
            break
        second = _run(None, folder, monkeypatch, config, make=_line())
        second.assert_equals(undisturbed)
    assert moment > 12


def test_another_number_of_workers_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "training"
    _run(None, folder, monkeypatch, stop_after=2, make=_line())
    wanted = "was done by 1 workers, and now there are 3, .* Go on with num_workers 1, or delete that folder"
    with pytest.raises(ConfigError, match=wanted):
        run_training(_Line(), EXAMPLES, CONFIG, Place(world_size=3), Hooks(), Checkpoints(folder))


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
def test_a_full_disk_fails_the_step_and_the_checkpoint_before_stands(
    small_disk: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, part: str
) -> None:
    make = _line(10_000)
    undisturbed = _run(None, tmp_path / "undisturbed", monkeypatch, make=make)
    folder = small_disk / "training"
    _run(None, folder, monkeypatch, stop_after=4, make=make)
    room = {"state.json": 0, "model.safetensors": 30_000, "optimizer.safetensors": 90_000}[part]
    free = shutil.disk_usage(small_disk).free
    (small_disk / "other").write_bytes(bytes(free - free % 4096 - room))
    wanted = (
        r"No space left in .*training for (checkpoints|the checkpoint of step 5)\. The checkpoint of step 4 stands\. "
        "Free space, and run the same command again: it goes on from there"
    )
    for _ in range(2):
        with pytest.raises(ArtifactError, match=wanted):
            _run(None, folder, monkeypatch, make=make)
    assert not list(folder.glob(".*draft*"))
    (small_disk / "other").unlink()
    _run(None, folder, monkeypatch, make=make).assert_equals(undisturbed)


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
