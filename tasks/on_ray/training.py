"""Ray Train: runs one training function on every worker, again from its last checkpoint where a worker was lost.

Checkpoints lie in a hidden folder beside the artifact that is trained, named after the work's key, so that the same
command finds them again (`rag_core/training/checkpoint.py` owns what is in it). The loop itself (`rag_core/training/loop.py`) knows
neither Ray nor MLflow; it talks to a `Reporter` (`reporter.py`).
"""

from __future__ import annotations

import contextlib
import shutil
import uuid
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import ray.train
import ray.train.torch
import torch
from ray.train import FailureConfig, RunConfig, ScalingConfig, UserCallback
from ray.train.torch import TorchConfig, TorchTrainer
from ray.train.torch.config import _set_torch_distributed_env_vars, _TorchBackend

from rag_core.cpu.heap import keep_freed_blocks
from rag_core.errors import RagError
from rag_core.reading.contexts import ContextCount
from rag_core.storage.artifact import MANIFEST
from rag_core.training.checkpoint import Checkpoints
from rag_core.training.loop import Place
from tasks.environment.ray_cluster import cluster_address
from tasks.on_ray.runtime import Share, ensure_ray, limit_threads, progress, share_of_cluster
from tasks.on_ray.stopping import stopping_gently
from tasks.on_ray.workers import LOST, REPLACEMENTS, close_workers, run_on_worker
from tasks.terminal import say


@dataclass
class TrainedModel:
    """Where the best weights lie, the curves, and how many contexts training read and cut, over all workers."""

    folder: Path
    best_step: int
    history: list[dict[str, float]]
    dev: list[dict[str, float]]
    contexts: ContextCount

    def counts(self) -> dict[str, int]:
        """For the artifact's manifest."""
        return {"best_step": self.best_step, **asdict(self.contexts)}

    def best_scores(self) -> dict[str, float]:
        """Dev scores of the weights that were kept."""
        at_best = [point for point in self.dev if point["step"] == self.best_step]
        return {name: value for point in at_best for name, value in point.items() if name != "step"}

    def copy_to(self, folder: Path) -> None:
        """Copy the weights' files into an artifact's draft, which gets a manifest of its own."""
        shutil.copytree(self.folder, folder, dirs_exist_ok=True, ignore=shutil.ignore_patterns(MANIFEST))


def this_device() -> torch.device:
    """Called in a worker: its GPU, or the CPU."""
    return ray.train.torch.get_device()


def this_place(cpus: int, meter: Any) -> Place:
    """Called in a worker, before it loads a model: its rank, threads, access to the hub, and how its module is wrapped."""
    limit_threads(cpus)
    keep_freed_blocks()
    if access := ray.get(meter.hub_access.remote()):
        access.use()
    context = ray.train.get_context()

    def wrap(module: Any) -> Any:
        # A generator may own parameters that a batch leaves without a gradient (a position table, a pooler).
        return ray.train.torch.prepare_model(module, parallel_strategy_kwargs={"find_unused_parameters": True})

    return Place(rank=context.get_world_rank(), world_size=context.get_world_size(), wrap=wrap)


def training_folder(out: Path, key: str) -> Path:
    """Where unfinished training of the artifact `out` lies, for the work of that key."""
    out = Path(out).resolve()
    return out.parent / f".{out.name}.training-{key[:16]}"


@contextlib.contextmanager
def deleted_when_done(folder: Path) -> Iterator[None]:
    """Delete a training folder once the block, which publishes what was trained, has ended without an error."""
    yield
    shutil.rmtree(folder, ignore_errors=True)


def train_on_ray(
    stage: str,
    loop: Callable[[dict[str, Any]], dict[str, Any]],
    settings: dict[str, Any],
    *,
    steps: int,
    num_workers: int,
    folder: Path,
) -> TrainedModel:
    """Run `loop` on every worker, from the newest checkpoint in `folder`, until all steps are done.

    A lost worker is made good from the last checkpoint, `REPLACEMENTS` times. The first Ctrl-C or SIGTERM stops the
    workers with a checkpoint.

    Args:
        stage: name for the progress bar.
        loop: the function of a worker; it gets `settings` with `cpus`, `meter` and `checkpoints` added and returns its
            reporter's `result`.
        steps: length of the bar.
        num_workers: 0 means one for each GPU, or one for each machine.
        folder: `training_folder` of the artifact, held by `publish` against other writers; that of other work for the same
            artifact is deleted. On a cluster it must be on shared storage.

    Raises:
        RagError: a worker met bad input; its own message. Other failures of workers come as Ray raises them.
    """
    ensure_ray()
    share = share_of_cluster(num_workers)
    for other in folder.parent.glob(f"{folder.name.rpartition('-')[0]}-*"):
        if other != folder:
            shutil.rmtree(other)
    _say_where_it_goes_on(stage, folder, steps)
    with progress(stage, steps) as meter, stopping_gently(stage, meter):
        settings = {**settings, "cpus": share.cpus, "meter": meter, "checkpoints": str(folder)}
        run = _fit_alone if share.num_workers == 1 else _fit_together
        found = run(loop, settings, share, meter)
    if found.pop("done") < steps:
        raise KeyboardInterrupt  # stopped by a signal that another thread was given
    checkpoints = Checkpoints(folder)
    checkpoints.best_step = found["best_step"]
    return TrainedModel(checkpoints.best(), **found)


def _say_where_it_goes_on(stage: str, folder: Path, steps: int) -> None:
    found = Checkpoints(folder).find()
    for damaged, why in found.damaged.items():
        text = f"{stage}: the checkpoint {damaged.name} is damaged, so it is not used ({why.partition('. ')[0]})"
        say(text)
    if found.newest:
        text = f"{stage}: going on after step {found.newest.step} of {steps} (checkpoint of {found.newest.written_at})"
        say(text)


def _fit_alone(
    loop: Callable[..., dict[str, Any]], settings: dict[str, Any], share: Share, meter: Any
) -> dict[str, Any]:
    """One worker: Ray Train's local mode in a long-lived process; a controller would start four for it."""
    losses = 0
    while True:
        try:
            return run_on_worker(share, _train_locally, loop, settings, share.gpus > 0)
        except LOST:
            losses += 1
            if losses > REPLACEMENTS:
                raise
            meter.lose_worker.remote()


def _train_locally(loop: Callable[..., dict[str, Any]], settings: dict[str, Any], use_gpu: bool) -> dict[str, Any]:
    scaling = ScalingConfig(num_workers=0, use_gpu=use_gpu)
    trainer = TorchTrainer(loop, train_loop_config=settings, scaling_config=scaling)  # type: ignore[arg-type]
    return _returned(trainer.fit())


def _returned(result: Any) -> dict[str, Any]:
    # Not `Result.metrics`, which lacks the curves. Ray's type has no return value; its Result has.
    found: dict[str, Any] = result.return_value
    return found


def _fit_together(
    loop: Callable[..., dict[str, Any]], settings: dict[str, Any], share: Share, meter: Any
) -> dict[str, Any]:
    """Several workers, side by side under Ray Train's controller, all anew where one is lost.

    Their number stays, since it decides in which order gradients are added up.
    """
    close_workers()
    # Ray Train wants a place for its own notes. A new name, or it would take up those of a killed run.
    notes = Path(settings["checkpoints"]) / f"ray-{uuid.uuid4().hex[:8]}"
    for old in notes.parent.glob("ray-*"):
        shutil.rmtree(old)
    trainer = _Trainer(
        loop,  # type: ignore[arg-type]  # Ray's type returns nothing
        train_loop_config=settings,
        torch_config=_meeting(notes),
        scaling_config=ScalingConfig(
            num_workers=share.num_workers, use_gpu=share.gpus > 0, resources_per_worker=share.resources
        ),
        run_config=RunConfig(
            name="run",
            storage_path=str(notes),
            failure_config=FailureConfig(max_failures=REPLACEMENTS),
            callbacks=[_OnlyLossesAgain(meter)],  # type: ignore[list-item]  # its type is Tune's
        ),
    )
    try:
        return _returned(trainer.fit())
    except ray.train.TrainingFailedError as error:
        failures = [getattr(error, "controller_failure", None), *getattr(error, "worker_failures", {}).values()]
        for cause in map(_user_error, failures):
            if cause:
                raise type(cause)(str(cause)) from error
        raise
    finally:
        trainer.end()
        shutil.rmtree(notes, ignore_errors=True)


def _meeting(folder: Path) -> TorchConfig:
    """How workers find one another: on a cluster as Ray has it; on this machine alone without a port for strangers."""
    return TorchConfig() if cluster_address() else _MeetInFolder(folder=str(folder))


@dataclass
class _MeetInFolder(TorchConfig):
    """Workers of one machine meet through a file in `folder`: PyTorch's `TCPStore` would listen on every interface."""

    folder: str = ""

    @property
    def backend_cls(self) -> type[_TorchBackend]:
        return _FileBackend


class _FileBackend(_TorchBackend):
    """Ray Train's backend for PyTorch but for the address at which the workers meet."""

    def on_start(self, worker_group: Any, backend_config: Any) -> None:
        Path(backend_config.folder).mkdir(parents=True, exist_ok=True)
        # A new one each time: workers that start again must not find what the lost ones left.
        file = Path(backend_config.folder) / f"meeting-{uuid.uuid4().hex[:8]}"
        backend = "nccl" if worker_group.get_resources_per_worker().get("GPU", 0) else "gloo"
        size = len(worker_group)
        ray.get(
            [worker_group.execute_single_async(rank, _meet, str(file), backend, rank, size) for rank in range(size)]
        )


def _meet(file: str, backend: str, rank: int, size: int) -> None:
    _set_torch_distributed_env_vars()
    store = torch.distributed.FileStore(file, size)
    torch.distributed.init_process_group(backend, store=store, rank=rank, world_size=size)


class _Trainer(TorchTrainer):
    """Leaves Ctrl-C to `stopping_gently`: Ray Train's own handler ends the workers in the middle of a step."""

    _controller: Any = None

    def _register_sigint_handler(self, controller: Any) -> None:
        self._controller = controller

    def end(self) -> None:
        """End the workers, if a second signal left them at work."""
        if self._controller is not None:
            ray.kill(self._controller)


class _OnlyLossesAgain(UserCallback):
    """Ray Train tries every failure again. What a `RagError` tells of will not be better the second time."""

    def __init__(self, meter: Any) -> None:
        self._meter = meter

    def after_exception(self, run_context: Any, worker_exceptions: dict[int, Exception]) -> None:
        for failure in worker_exceptions.values():
            cause = _user_error(failure)
            if cause:
                raise cause
        self._meter.lose_worker.remote()


def _user_error(failure: BaseException | None) -> RagError | None:
    """The RagError that a failure stems from."""
    while failure is not None:
        if isinstance(failure, RagError):
            return failure
        failure = getattr(failure, "cause", None) or failure.__cause__
    return None
