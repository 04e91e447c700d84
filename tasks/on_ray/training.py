"""Runs a training function on every worker with Ray Train; a lost worker is replaced, from the last checkpoint on.

Checkpoints are in a hidden folder beside the artifact that is trained. The folder is named after the work's key, so the
same command finds them again. `rag_core/training/checkpoint.py` owns the folder's contents. The training loop
(`rag_core/training/loop.py`) knows neither Ray nor MLflow; it talks to a `Reporter` (`tasks/tracking/reporter.py`).
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

from rag_core.cpu.heap import keep_freed_blocks
from rag_core.errors import RagError
from rag_core.reading.contexts import ContextCount
from rag_core.storage.artifact import MANIFEST
from rag_core.training.checkpoint import Checkpoints
from rag_core.training.loop import Place
from tasks.environment.ray_cluster import cluster_address
from tasks.on_ray.runtime import Share, ensure_ray, limit_threads, progress, share_of_cluster
from tasks.on_ray.stopping import stopping_gently
from tasks.on_ray.train_internals import TorchBackend, set_torch_distributed_env_vars
from tasks.on_ray.workers import LOST, REPLACEMENTS, close_workers, run_on_worker
from tasks.terminal import say


@dataclass
class TrainedModel:
    """Folder of the best weights, the curves, and how many contexts training read and cut, over all workers."""

    folder: Path
    best_step: int
    history: list[dict[str, float]]
    dev: list[dict[str, float]]
    contexts: ContextCount

    def counts(self) -> dict[str, int]:
        """Counts for the artifact's manifest."""
        return {"best_step": self.best_step, **asdict(self.contexts)}

    def best_scores(self) -> dict[str, float]:
        """Dev scores of the best weights."""
        at_best = [point for point in self.dev if point["step"] == self.best_step]
        return {name: value for point in at_best for name, value in point.items() if name != "step"}

    def copy_to(self, folder: Path) -> None:
        """Copy the files of the best weights, except their manifest, into an artifact's draft."""
        shutil.copytree(self.folder, folder, dirs_exist_ok=True, ignore=shutil.ignore_patterns(MANIFEST))


def this_device() -> torch.device:
    """Called in a worker: its GPU, or the CPU."""
    return ray.train.torch.get_device()


def this_place(cpus: int, meter: Any) -> Place:
    """Called in a worker before it loads a model: set its threads and hub access; return its place among them."""
    limit_threads(cpus)
    if access := ray.get(meter.hub_access.remote()):
        access.use()
    context = ray.train.get_context()

    def wrap(module: Any) -> Any:
        # Not before the model is loaded: what loading frees (float32 weights that were rounded) would be kept as well.
        keep_freed_blocks()
        # Some parameters of a generator may get no gradient in a batch (a position table, a pooler).
        return ray.train.torch.prepare_model(module, parallel_strategy_kwargs={"find_unused_parameters": True})

    return Place(rank=context.get_world_rank(), world_size=context.get_world_size(), wrap=wrap)


def training_folder(out: Path, key: str) -> Path:
    """The folder for unfinished training of the artifact `out`, for the work with this key."""
    out = Path(out).resolve()
    return out.parent / f".{out.name}.training-{key[:16]}"


@contextlib.contextmanager
def deleted_when_done(folder: Path) -> Iterator[None]:
    """Delete a training folder after the block, which publishes the trained model, has ended without an error."""
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

    A lost worker is replaced, up to `REPLACEMENTS` times, and training resumes from the last checkpoint. The first
    Ctrl-C or SIGTERM stops the workers with a checkpoint.

    Args:
        stage: name for the progress bar.
        loop: the function that each worker runs; it gets `settings` with `cpus`, `meter` and `checkpoints` added and
            returns its reporter's `result`.
        steps: length of the progress bar.
        num_workers: 0 means one for each GPU, or without GPUs one for each machine.
        folder: `training_folder` of the artifact, locked by `publish` against other writers. Training folders of other
            work for the same artifact are deleted. On a cluster it must be on shared storage.

    Raises:
        RagError: a worker met bad input; the message is the worker's. Other failures come as Ray raises them.
    """
    ensure_ray()
    share = share_of_cluster(num_workers)
    for other in folder.parent.glob(f"{folder.name.rpartition('-')[0]}-*"):
        if other != folder:
            shutil.rmtree(other)
    _announce_resume(stage, folder, steps)
    with progress(stage, steps) as meter, stopping_gently(stage, meter):
        settings = {**settings, "cpus": share.cpus, "meter": meter, "checkpoints": str(folder)}
        fit = _fit_one_worker if share.num_workers == 1 else _fit_several_workers
        result = fit(loop, settings, share, meter)
    if result.pop("done") < steps:
        raise KeyboardInterrupt  # a signal that another thread received stopped training
    checkpoints = Checkpoints(folder)
    checkpoints.best_step = result["best_step"]
    return TrainedModel(checkpoints.best(), **result)


def _announce_resume(stage: str, folder: Path, steps: int) -> None:
    """Say which step training resumes from, and which checkpoints are damaged."""
    existing = Checkpoints(folder).find()
    for damaged, reason in existing.damaged.items():
        text = f"{stage}: the checkpoint {damaged.name} is damaged, so it is not used ({reason.partition('. ')[0]})"
        say(text)
    if newest := existing.newest:
        text = f"{stage}: resuming after step {newest.step} of {steps} (checkpoint of {newest.written_at})"
        say(text)


def _fit_one_worker(
    loop: Callable[..., dict[str, Any]], settings: dict[str, Any], share: Share, meter: Any
) -> dict[str, Any]:
    """Train with one worker: Ray Train's local mode in a long-lived worker.

    Ray Train's controller would start four processes for it.
    """
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
    return _return_value(trainer.fit())


def _return_value(result: Any) -> dict[str, Any]:
    # `Result.metrics` lacks the curves. Ray's type annotation lacks `return_value`, but the object has it.
    value: dict[str, Any] = result.return_value
    return value


def _fit_several_workers(
    loop: Callable[..., dict[str, Any]], settings: dict[str, Any], share: Share, meter: Any
) -> dict[str, Any]:
    """Train with several workers under Ray Train's controller, which restarts all of them if one is lost.

    The number of workers stays the same, because it decides the order in which gradients are added up.
    """
    close_workers()
    # Ray Train needs a folder for its own state. A new name keeps it from resuming the state of a killed run.
    ray_state = Path(settings["checkpoints"]) / f"ray-{uuid.uuid4().hex[:8]}"
    for old in ray_state.parent.glob("ray-*"):
        shutil.rmtree(old)
    trainer = _Trainer(
        loop,  # type: ignore[arg-type]  # in Ray's type the function returns nothing
        train_loop_config=settings,
        torch_config=_torch_config(ray_state),
        scaling_config=ScalingConfig(
            num_workers=share.num_workers, use_gpu=share.gpus > 0, resources_per_worker=share.resources
        ),
        run_config=RunConfig(
            name="run",
            storage_path=str(ray_state),
            failure_config=FailureConfig(max_failures=REPLACEMENTS),
            callbacks=[_RetryOnlyLostWorkers(meter)],  # type: ignore[list-item]  # its type is Tune's
        ),
    )
    try:
        return _return_value(trainer.fit())
    except ray.train.TrainingFailedError as error:
        failures = [getattr(error, "controller_failure", None), *getattr(error, "worker_failures", {}).values()]
        for cause in map(_user_error, failures):
            if cause:
                raise type(cause)(str(cause)) from error
        raise
    finally:
        trainer.end()
        shutil.rmtree(ray_state, ignore_errors=True)


def _torch_config(folder: Path) -> TorchConfig:
    """How workers find one another: on a cluster as Ray does it, on this machine through a file and without a port."""
    return TorchConfig() if cluster_address() else _FileRendezvous(folder=str(folder))


@dataclass
class _FileRendezvous(TorchConfig):
    """Workers of one machine meet through a file in `folder`; PyTorch's `TCPStore` would listen on every interface."""

    folder: str = ""

    @property
    def backend_cls(self) -> type[TorchBackend]:
        return _FileRendezvousBackend


class _FileRendezvousBackend(TorchBackend):
    """Ray Train's backend for PyTorch, except that the workers meet through a file."""

    def on_start(self, worker_group: Any, backend_config: Any) -> None:
        Path(backend_config.folder).mkdir(parents=True, exist_ok=True)
        # A new file each time: restarted workers must not read what the lost ones wrote.
        file = Path(backend_config.folder) / f"meeting-{uuid.uuid4().hex[:8]}"
        backend = "nccl" if worker_group.get_resources_per_worker().get("GPU", 0) else "gloo"
        size = len(worker_group)
        ray.get(
            [
                worker_group.execute_single_async(rank, _join_group, str(file), backend, rank, size)
                for rank in range(size)
            ]
        )


def _join_group(file: str, backend: str, rank: int, size: int) -> None:
    set_torch_distributed_env_vars()
    store = torch.distributed.FileStore(file, size)
    torch.distributed.init_process_group(backend, store=store, rank=rank, world_size=size)


class _Trainer(TorchTrainer):
    """Leaves Ctrl-C to `stopping_gently`; Ray Train's own handler would end the workers in the middle of a step."""

    _controller: Any = None

    def _register_sigint_handler(self, controller: Any) -> None:
        self._controller = controller

    def end(self) -> None:
        """End the workers if they still run, as after a second signal."""
        if self._controller is not None:
            ray.kill(self._controller)


class _RetryOnlyLostWorkers(UserCallback):
    """Keeps Ray Train from retrying a `RagError`: it means bad input or configuration, so a retry cannot help."""

    def __init__(self, meter: Any) -> None:
        self._meter = meter

    def after_exception(self, run_context: Any, worker_exceptions: dict[int, Exception]) -> None:
        for failure in worker_exceptions.values():
            cause = _user_error(failure)
            if cause:
                raise cause
        self._meter.lose_worker.remote()


def _user_error(failure: BaseException | None) -> RagError | None:
    """The RagError that caused a failure, if there is one."""
    while failure is not None:
        if isinstance(failure, RagError):
            return failure
        failure = getattr(failure, "cause", None) or failure.__cause__
    return None
