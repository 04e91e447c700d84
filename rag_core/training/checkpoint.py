"""Where a training run stands, on disk: all that its next step depends on, so that a killed run goes on as if it had not been.

A training folder holds the last two checkpoints and the best weights that one of them speaks of:

    step-00000120/   state.json, and, unless training is over, model.safetensors and optimizer.safetensors
    best-00000100/   the model as its owner saves it

Each is published as artifacts are (`artifact.py`): written aside, flushed, described with checksums, renamed. So a kill
or a full disk in the middle of one leaves those before it whole, and one that is damaged is recognised and passed over.
Nothing in them is a pickle. Neither the order of the data nor a random state is in them: both follow from seed and step.
"""

from __future__ import annotations

import contextlib
import errno
import json
import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn

from rag_core.errors import ArtifactError
from rag_core.storage.artifact import open_artifact, publish
from rag_core.storage.writer_lock import lock_file, only_writer

CHECKPOINT, BEST = "training-checkpoint", "training-best"
STATE, MODEL, OPTIMIZER = "state.json", "model.safetensors", "optimizer.safetensors"
KEPT = 2
# Between checkpoints where no number of steps is set. One takes seconds, so this costs less than a hundredth.
SECONDS_BETWEEN = 600.0
# A writer that was killed, or whose machine was lost, is gone before this.
WAIT_SECONDS = 180.0


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint that was found whole: its folder, the steps done, when it was written and by how many workers."""

    folder: Path
    step: int
    written_at: str
    workers: int
    best_step: int


@dataclass
class Found:
    """The newest checkpoint that is whole (None: there is none), and what is wrong with newer ones."""

    newest: Checkpoint | None = None
    damaged: dict[Path, str] = field(default_factory=dict)


class Checkpoints:
    """The checkpoints of one training run. One process writes them (rank 0); any may read."""

    def __init__(self, folder: Path) -> None:
        self.folder = Path(folder)
        self.best_step = 0
        self._written = time.monotonic()

    def find(self) -> Found:
        """The newest checkpoint whose files, and whose best weights, have the checksums that were written with them."""
        found = Found()
        for folder in sorted(self.folder.glob("step-*"), reverse=True):
            try:
                found.newest = self._described(folder, check_content=True)
                return found
            except ArtifactError as error:
                found.damaged[folder] = str(error)
        return found

    def take_up(self) -> Checkpoint | None:
        """The checkpoint that `find` finds; newer ones, which are damaged, are deleted."""
        found = self.find()
        for folder in found.damaged:
            shutil.rmtree(folder)
        return found.newest

    def at(self, step: int) -> Checkpoint:
        """The checkpoint of a step, which `find` has found whole."""
        return self._described(self.folder / f"step-{step:08d}", check_content=False)

    def best(self) -> Path:
        """Folder of the best weights so far."""
        return self.folder / f"best-{self.best_step:08d}"

    def due(self, step: int, every: int | None) -> bool:
        """Whether a checkpoint is to be written after `step`: every so many steps, or, for None, after ten minutes."""
        if every is not None:
            return step % every == 0
        return time.monotonic() - self._written >= SECONDS_BETWEEN

    @contextlib.contextmanager
    def sole_writer(self) -> Iterator[None]:
        """This process alone writes here; waits until a former one, which may not know yet that it is lost, has ended.

        Raises:
            ArtifactError: it does not end.
        """
        with contextlib.ExitStack() as held:
            with self._room_for("checkpoints"):
                self.folder.mkdir(parents=True, exist_ok=True)
                held.enter_context(only_writer(self.folder / "writer", WAIT_SECONDS))
            for left in self.folder.glob(".*"):  # what a killed writer did not finish
                if left.is_dir():
                    shutil.rmtree(left)
                elif left != lock_file(self.folder / "writer"):
                    left.unlink()
            yield

    def keep_best(self, step: int, save: Callable[[Path], None]) -> None:
        """Keep the weights that `save` writes into a folder as the best so far, found at `step`."""
        self.best_step = step
        with self._room_for(f"the best weights so far, those of step {step}"):
            shutil.rmtree(self.best(), ignore_errors=True)  # of a run that was killed after this step, or damaged
            with publish(self.best(), BEST) as draft:
                save(draft.folder)
        self._clear_up()

    def write(self, step: int, objective: nn.Module, optimizer: torch.optim.Optimizer | None, state: Any) -> None:
        """Publish the checkpoint of `step`, and delete those before the last two.

        Args:
            step: steps done.
            objective: its parameters that are trained, and its buffers, are kept.
            optimizer: its moments are kept. None: training is over, so `state` is all that will be wanted.
            state: anything JSON; `run_training` says what.
        """
        folder = self.folder / f"step-{step:08d}"
        with self._room_for(f"the checkpoint of step {step}"), publish(folder, CHECKPOINT) as draft:
            draft.counts = {"step": step, "best_step": self.best_step, "workers": len(state["workers"])}
            (draft.folder / STATE).write_text(json.dumps(state), encoding="utf-8")
            if optimizer is not None:
                save_file(_tensors_of(objective), draft.folder / MODEL)
                save_file(_moments_of(optimizer), draft.folder / OPTIMIZER)
        self._written = time.monotonic()
        self._clear_up()

    def read(self, checkpoint: Checkpoint, objective: nn.Module, optimizer: torch.optim.Optimizer) -> Any:
        """Put the weights and moments of a checkpoint into `objective` and `optimizer`; returns its state."""
        self.best_step = checkpoint.best_step
        state = json.loads((checkpoint.folder / STATE).read_text(encoding="utf-8"))
        if (checkpoint.folder / MODEL).is_file():
            with safe_open(checkpoint.folder / MODEL, framework="pt") as file, torch.no_grad():
                for name, tensor in _tensors_of(objective, contiguous=False).items():
                    tensor.copy_(file.get_tensor(name))
            _load_moments(optimizer, checkpoint.folder / OPTIMIZER, state["parameter_groups"])
        return state

    def _described(self, folder: Path, *, check_content: bool) -> Checkpoint:
        manifest = open_artifact(folder, CHECKPOINT, check_content=check_content)
        counts = manifest.counts
        if counts["best_step"]:
            open_artifact(self.folder / f"best-{counts['best_step']:08d}", BEST, check_content=check_content)
        return Checkpoint(folder, counts["step"], manifest.created_at, counts["workers"], counts["best_step"])

    def _clear_up(self) -> None:
        """Older checkpoints go, and best weights that none of the others speaks of."""
        folders = sorted(self.folder.glob("step-*"))
        for old in folders[:-KEPT]:
            shutil.rmtree(old)
        spoken_of = {open_artifact(one, CHECKPOINT, check_content=False).counts["best_step"] for one in folders[-KEPT:]}
        for best in self.folder.glob("best-*"):
            if best != self.best() and best.name not in {f"best-{step:08d}" for step in spoken_of}:
                shutil.rmtree(best)

    @contextlib.contextmanager
    def _room_for(self, what: str) -> Iterator[None]:
        try:
            yield
        except (OSError, SafetensorError, ArtifactError) as error:
            if not (_is_full(error) or _is_full(error.__cause__)):
                raise
            standing = self.find().newest
            stands = (
                f"The checkpoint of step {standing.step} stands" if standing else "There is no checkpoint before it"
            )
            raise ArtifactError(
                f"No space left in {self.folder} for {what}. {stands}. Free space, and run the same command again"
                f"{': it goes on from there' if standing else ''}."
            ) from error


def _tensors_of(objective: nn.Module, *, contiguous: bool = True) -> dict[str, torch.Tensor]:
    """Parameters that are trained, and buffers, by name. The others are as they were when training began."""
    named = [(name, one.detach()) for name, one in objective.named_parameters() if one.requires_grad]
    named += list(objective.named_buffers())
    # A buffer may be an expanded view, which a file cannot hold.
    return {name: one.contiguous() if contiguous else one for name, one in named}


def _moments_of(optimizer: torch.optim.Optimizer) -> dict[str, torch.Tensor]:
    states = optimizer.state_dict()["state"]
    return {f"{number}.{name}": value.contiguous() for number, state in states.items() for name, value in state.items()}


def _load_moments(optimizer: torch.optim.Optimizer, path: Path, groups: list[dict[str, Any]]) -> None:
    states: dict[int, dict[str, torch.Tensor]] = {}
    with safe_open(path, framework="pt") as file:
        for key in file.keys():  # noqa: SIM118  (a file, not a dict)
            number, _, name = key.partition(".")
            # A copy: the tensor of the file stays tied to it, and lies where it lies in it.
            states.setdefault(int(number), {})[name] = file.get_tensor(key).clone()
    optimizer.load_state_dict({"state": states, "param_groups": groups})


def _is_full(error: BaseException | None) -> bool:
    if isinstance(error, OSError):
        return error.errno in (errno.ENOSPC, errno.EDQUOT)
    return isinstance(error, SafetensorError) and any(
        f"os error {number}" in str(error) for number in (errno.ENOSPC, errno.EDQUOT)
    )
