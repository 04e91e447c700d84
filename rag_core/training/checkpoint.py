"""Checkpoints of training: all that the next step depends on, so that a killed run continues as if undisturbed.

A training folder holds the last two checkpoints, and the best weights that they refer to:

    step-00000120/   state.json, and, unless training is over, model.safetensors and optimizer.safetensors
    best-00000100/   the model as its owner saves it

Each is published like an artifact (`artifact.py`): written to a draft, flushed, described with checksums, renamed. So a
kill or a full disk leaves earlier checkpoints complete, and a damaged checkpoint is detected and skipped. There are no
pickles. The order of the data and the random state are not stored: both follow from seed and step.
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
# Interval between checkpoints if no number of steps is set. A checkpoint takes seconds, so the cost is below 1%.
SECONDS_BETWEEN = 600.0
# How long to wait for the previous writer. One that was killed, or whose machine was lost, is gone by then.
WAIT_SECONDS = 180.0


@dataclass(frozen=True)
class Checkpoint:
    """A complete checkpoint: its folder, the steps done, when it was written, and by how many workers."""

    folder: Path
    step: int
    written_at: str
    workers: int
    best_step: int


@dataclass
class SearchResult:
    """The newest complete checkpoint (None: there is none), and for each newer folder what is wrong with it."""

    newest: Checkpoint | None = None
    damaged: dict[Path, str] = field(default_factory=dict)


class Checkpoints:
    """The checkpoints of one training run. One process (rank 0) writes them; any process may read."""

    def __init__(self, folder: Path) -> None:
        self.folder = Path(folder)
        self.best_step = 0
        self._written = time.monotonic()

    def find(self) -> SearchResult:
        """Find the newest checkpoint whose files, and whose best weights, match their checksums."""
        result = SearchResult()
        for folder in sorted(self.folder.glob("step-*"), reverse=True):
            try:
                result.newest = self._open(folder, check_content=True)
                return result
            except ArtifactError as error:
                result.damaged[folder] = str(error)
        return result

    def resume_from(self) -> Checkpoint | None:
        """Return the checkpoint that `find` finds, and delete newer ones, which are damaged."""
        result = self.find()
        for folder in result.damaged:
            shutil.rmtree(folder)
        return result.newest

    def at(self, step: int) -> Checkpoint:
        """Return the checkpoint of a step that `find` has checked already."""
        return self._open(self.folder / f"step-{step:08d}", check_content=False)

    def best(self) -> Path:
        """Folder of the best weights so far."""
        return self.folder / f"best-{self.best_step:08d}"

    def due(self, step: int, every: int | None) -> bool:
        """Whether to write a checkpoint after `step`: after `every` steps, or, for None, every ten minutes."""
        if every is not None:
            return step % every == 0
        return time.monotonic() - self._written >= SECONDS_BETWEEN

    @contextlib.contextmanager
    def sole_writer(self) -> Iterator[None]:
        """Make this process the only writer. Wait for a former writer to end: a lost worker may still be running.

        Raises:
            ArtifactError: the former writer does not end in time.
        """
        with contextlib.ExitStack() as held:
            with self._room_for("checkpoints"):
                self.folder.mkdir(parents=True, exist_ok=True)
                held.enter_context(only_writer(self.folder / "writer", WAIT_SECONDS))
            for leftover in self.folder.glob(".*"):  # unfinished drafts of killed writers
                if leftover.is_dir():
                    shutil.rmtree(leftover)
                elif leftover != lock_file(self.folder / "writer"):
                    leftover.unlink()
            yield

    def keep_best(self, step: int, save: Callable[[Path], None]) -> None:
        """Keep the weights of `step` as the best so far; `save` writes them into a folder."""
        self.best_step = step
        with self._room_for(f"the best weights so far, those of step {step}"):
            shutil.rmtree(self.best(), ignore_errors=True)  # damaged, or left by a run that was killed after this step
            with publish(self.best(), BEST) as draft:
                save(draft.folder)
        self._delete_old()

    def write(self, step: int, objective: nn.Module, optimizer: torch.optim.Optimizer | None, state: Any) -> None:
        """Publish the checkpoint of `step`, and delete all but the last two.

        Args:
            step: steps done.
            objective: its trained parameters and its buffers are kept.
            optimizer: its moments are kept. None: training is over, so only `state` is needed.
            state: anything JSON; `run_training` decides what.
        """
        folder = self.folder / f"step-{step:08d}"
        with self._room_for(f"the checkpoint of step {step}"), publish(folder, CHECKPOINT) as draft:
            draft.counts = {"step": step, "best_step": self.best_step, "workers": len(state["workers"])}
            (draft.folder / STATE).write_text(json.dumps(state), encoding="utf-8")
            if optimizer is not None:
                save_file(_tensors_of(objective), draft.folder / MODEL)
                save_file(_moments_of(optimizer), draft.folder / OPTIMIZER)
        self._written = time.monotonic()
        self._delete_old()

    def read(self, checkpoint: Checkpoint, objective: nn.Module, optimizer: torch.optim.Optimizer) -> Any:
        """Load a checkpoint's weights into `objective` and its moments into `optimizer`; return its state."""
        self.best_step = checkpoint.best_step
        state = json.loads((checkpoint.folder / STATE).read_text(encoding="utf-8"))
        if (checkpoint.folder / MODEL).is_file():
            with safe_open(checkpoint.folder / MODEL, framework="pt") as file, torch.no_grad():
                for name, tensor in _tensors_of(objective, contiguous=False).items():
                    tensor.copy_(file.get_tensor(name))
            _load_moments(optimizer, checkpoint.folder / OPTIMIZER, state["parameter_groups"])
        return state

    def _open(self, folder: Path, *, check_content: bool) -> Checkpoint:
        manifest = open_artifact(folder, CHECKPOINT, check_content=check_content)
        counts = manifest.counts
        if counts["best_step"]:
            open_artifact(self.folder / f"best-{counts['best_step']:08d}", BEST, check_content=check_content)
        return Checkpoint(folder, counts["step"], manifest.created_at, counts["workers"], counts["best_step"])

    def _delete_old(self) -> None:
        """Delete older checkpoints, and best weights that no remaining checkpoint refers to."""
        folders = sorted(self.folder.glob("step-*"))
        for old in folders[:-KEPT]:
            shutil.rmtree(old)
        referenced = {
            open_artifact(folder, CHECKPOINT, check_content=False).counts["best_step"] for folder in folders[-KEPT:]
        }
        for best in self.folder.glob("best-*"):
            if best != self.best() and best.name not in {f"best-{step:08d}" for step in referenced}:
                shutil.rmtree(best)

    @contextlib.contextmanager
    def _room_for(self, content: str) -> Iterator[None]:
        """Turn an error about a full disk into an ArtifactError that says how to continue."""
        try:
            yield
        except (OSError, SafetensorError, ArtifactError) as error:
            if not (_is_full(error) or _is_full(error.__cause__)):
                raise
            earlier = self.find().newest
            remaining = (
                f"The checkpoint of step {earlier.step} is complete" if earlier else "There is no earlier checkpoint"
            )
            raise ArtifactError(
                f"No space left in {self.folder} for {content}. {remaining}. Free space, and run the same command again"
                f"{': it continues from there' if earlier else ''}."
            ) from error


def _tensors_of(objective: nn.Module, *, contiguous: bool = True) -> dict[str, torch.Tensor]:
    """Trained parameters and buffers by name. The other parameters never change, so they are not stored."""
    named = [(name, weight.detach()) for name, weight in objective.named_parameters() if weight.requires_grad]
    named += list(objective.named_buffers())
    # A buffer may be an expanded view, which a file cannot hold.
    return {name: tensor.contiguous() if contiguous else tensor for name, tensor in named}


def _moments_of(optimizer: torch.optim.Optimizer) -> dict[str, torch.Tensor]:
    states = optimizer.state_dict()["state"]
    return {f"{number}.{name}": value.contiguous() for number, state in states.items() for name, value in state.items()}


def _load_moments(optimizer: torch.optim.Optimizer, path: Path, groups: list[dict[str, Any]]) -> None:
    states: dict[int, dict[str, torch.Tensor]] = {}
    with safe_open(path, framework="pt") as file:
        for key in file.keys():  # noqa: SIM118  (a file, not a dict)
            number, _, name = key.partition(".")
            # Copy, because the file's tensor stays tied to the file and keeps its alignment there.
            states.setdefault(int(number), {})[name] = file.get_tensor(key).clone()
    optimizer.load_state_dict({"state": states, "param_groups": groups})


def _is_full(error: BaseException | None) -> bool:
    if isinstance(error, OSError):
        return error.errno in (errno.ENOSPC, errno.EDQUOT)
    return isinstance(error, SafetensorError) and any(
        f"os error {number}" in str(error) for number in (errno.ENOSPC, errno.EDQUOT)
    )
