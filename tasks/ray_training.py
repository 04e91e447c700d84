"""Ray Train: runs one training function on every worker and hands back the best checkpoint.

`Reporter` is what a worker's loop talks to: live metrics go to the stage's MLflow run (rank 0 only), checkpoints to
Ray Train's storage, steps to the progress bar. The loop itself (`rag_core.training`) knows none of them.
"""

from __future__ import annotations

import shutil
import tempfile
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import ray.train
import ray.train.torch
import torch
from ray.train import Checkpoint, CheckpointConfig, RunConfig, ScalingConfig
from ray.train.torch import TorchTrainer

from rag_core.contexts import ContextCount
from rag_core.errors import RagError
from rag_core.heap import keep_freed_blocks
from rag_core.training import Place, sum_over_workers
from tasks.ray_runtime import Share, ensure_ray, limit_threads, progress, share_of_cluster
from tasks.ray_workers import close_workers, run_on_worker
from tasks.tracking import RunAddress


@dataclass
class TrainedModel:
    """Where the best checkpoint lies, the curves, and how many contexts training read and cut, over all workers."""

    folder: Path
    best_step: int
    history: list[dict[str, float]]
    dev: list[dict[str, float]]
    contexts: ContextCount

    def counts(self) -> dict[str, int]:
        """For the artefact's manifest."""
        return {"best_step": self.best_step, **asdict(self.contexts)}

    def best_scores(self) -> dict[str, float]:
        """Dev scores of the checkpoint that was kept."""
        at_best = [point for point in self.dev if point["step"] == self.best_step]
        return {name: value for point in at_best for name, value in point.items() if name != "step"}

    def copy_to(self, folder: Path) -> None:
        """Copy the checkpoint's files into an artefact's draft."""
        shutil.copytree(self.folder, folder, dirs_exist_ok=True)


@dataclass
class Reporter:
    """A worker's way out: metrics, checkpoints, progress. Only rank 0 writes. `count` is its reader's, as it grows.

    `alone` is the folder in which a worker that has no others beside it keeps the best weights; the weights of several
    go to Ray Train's storage.
    """

    address: RunAddress
    meter: Any
    save: Callable[[Path], None]
    better: Callable[[dict[str, float]], float]
    rank: int
    count: ContextCount
    alone: Path | None
    history: list[dict[str, float]] = field(default_factory=list)
    dev: list[dict[str, float]] = field(default_factory=list)
    contexts: ContextCount = field(default_factory=ContextCount)
    _seen: int = 0
    _best: float = float("-inf")
    _best_step: int = 0

    def log(self, step: int, metrics: dict[str, float]) -> None:
        """A point of the training curves, with the share of contexts cut since the last one, over all workers.

        All ranks must call it. The other metrics are those of rank 0.
        """
        before, self.contexts = self.contexts, count_over_workers(self.count)
        metrics = {**metrics, "contexts_cut_share": (self.contexts - before).cut_share}
        if self.rank == 0:
            self.history.append({"step": step, **metrics})
            self.address.log_metrics(metrics, step)
            self.meter.advance.remote(step - self._seen, f"nll {metrics['train_nll']:.3f}")
            self._seen = step

    def keep(self, step: int, dev: dict[str, float]) -> None:
        """A point of the dev curves; the weights are kept if they are the best so far. All ranks must call it."""
        self.dev.append({"step": step, **dev})
        score = self.better(dev)
        is_best = score > self._best
        if is_best:
            self._best, self._best_step = score, step
        if self.rank == 0 and dev:
            self.address.log_metrics(dev, step)
        if self.alone:
            if is_best:
                self._keep_alone(self.alone)
            return
        with tempfile.TemporaryDirectory() as folder:
            checkpoint = None
            if is_best and self.rank == 0:
                self.save(Path(folder))
                checkpoint = Checkpoint.from_directory(folder)
            ray.train.report(dict(dev), checkpoint=checkpoint)

    def _keep_alone(self, folder: Path) -> None:
        draft = folder.with_name("draft")
        self.save(draft)
        shutil.rmtree(folder, ignore_errors=True)
        draft.rename(folder)

    def result(self) -> dict[str, Any]:
        """What a worker's loop returns: all of a `TrainedModel` but its folder."""
        return {
            "best_step": self._best_step,
            "history": self.history,
            "dev": self.dev,
            "contexts": self.contexts,
        }


def count_over_workers(count: ContextCount) -> ContextCount:
    """The sum of all workers' counts. All ranks must call it."""
    sums = sum_over_workers({name: float(value) for name, value in asdict(count).items()})
    return ContextCount(**{name: int(value) for name, value in sums.items()})


def this_device() -> torch.device:
    """Called in a worker: its GPU, or the CPU."""
    return ray.train.torch.get_device()


def this_place(cpus: int) -> Place:
    """Called in a worker: its rank, its threads, and how its module is wrapped for data-parallel training."""
    limit_threads(cpus)
    keep_freed_blocks()
    context = ray.train.get_context()

    def wrap(module: Any) -> Any:
        # A generator may own parameters that a batch leaves without a gradient (a position table, a pooler).
        return ray.train.torch.prepare_model(module, parallel_strategy_kwargs={"find_unused_parameters": True})

    return Place(rank=context.get_world_rank(), world_size=context.get_world_size(), wrap=wrap)


@contextmanager
def train_on_ray(
    stage: str,
    loop: Callable[[dict[str, Any]], dict[str, Any]],
    settings: dict[str, Any],
    *,
    steps: int,
    num_workers: int,
    near: Path,
) -> Iterator[TrainedModel]:
    """Run `loop` on every worker; yields the best model's folder, which is deleted on leaving.

    Args:
        stage: name for the progress bar.
        loop: the function of a worker; it gets `settings` with `cpus` and `meter` added and returns its reporter's
            `result`.
        steps: length of the bar.
        num_workers: 0 means one for each GPU, or one for each machine.
        near: checkpoints are stored beside this path (on a cluster it must be on shared storage).

    Raises:
        RagError: a worker met bad input; its own message. Other failures of workers come as Ray raises them.
    """
    ensure_ray()
    share = share_of_cluster(num_workers)
    storage = Path(near).resolve().parent / f".{Path(near).name}.training-{uuid.uuid4().hex[:8]}"
    try:
        with progress(stage, steps) as meter:
            settings = {**settings, "cpus": share.cpus, "meter": meter, "alone": None}
            run = _fit_alone if share.num_workers == 1 else _fit_together
            folder, found = run(loop, settings, share, storage)
        # Not Ray's `Result.metrics`: it keeps there what came with the last checkpoint; the curves go on after the best.
        yield TrainedModel(folder, **found)
    finally:
        shutil.rmtree(storage, ignore_errors=True)


def _fit_alone(
    loop: Callable[..., dict[str, Any]], settings: dict[str, Any], share: Share, storage: Path
) -> tuple[Path, dict[str, Any]]:
    """One worker: Ray Train's local mode in a long-lived process; a controller would start four for it."""
    best = storage / "best"
    storage.mkdir(parents=True)
    return best, run_on_worker(share, _train_locally, loop, settings | {"alone": best}, share.gpus > 0)


def _train_locally(loop: Callable[..., dict[str, Any]], settings: dict[str, Any], use_gpu: bool) -> dict[str, Any]:
    scaling = ScalingConfig(num_workers=0, use_gpu=use_gpu)
    trainer = TorchTrainer(loop, train_loop_config=settings, scaling_config=scaling)  # type: ignore[arg-type]
    found: dict[str, Any] = _fit(trainer).return_value
    return found


def _fit_together(
    loop: Callable[..., dict[str, Any]], settings: dict[str, Any], share: Share, storage: Path
) -> tuple[Path, dict[str, Any]]:
    """Several workers, side by side under Ray Train's controller."""
    close_workers()
    trainer = TorchTrainer(
        loop,  # type: ignore[arg-type]  # Ray's type has no return value; its Result has.
        train_loop_config=settings,
        scaling_config=ScalingConfig(
            num_workers=share.num_workers, use_gpu=share.gpus > 0, resources_per_worker=share.resources
        ),
        run_config=RunConfig(name="run", storage_path=str(storage), checkpoint_config=CheckpointConfig(num_to_keep=1)),
    )
    result = _fit(trainer)
    assert result.checkpoint is not None, "the first evaluation always keeps a checkpoint"
    return Path(result.checkpoint.path), result.return_value


def _fit(trainer: TorchTrainer) -> Any:
    try:
        return trainer.fit()
    except SystemExit as error:
        # Ray Train answers Ctrl-C by leaving the process; the stages above want to hear of it.
        raise KeyboardInterrupt from error
    except ray.train.TrainingFailedError as error:
        for failure in getattr(error, "worker_failures", {}).values():
            cause: BaseException | None = failure
            while cause is not None:
                if isinstance(cause, RagError):
                    raise type(cause)(str(cause)) from error
                cause = getattr(cause, "cause", None) or cause.__cause__
        raise
