"""The optimisation loop: batches in a seeded order, AdamW with warm-up, clipping, accumulation, evaluation.

It trains any module whose forward pass returns the nll of a batch of examples (`objectives.py`). It knows nothing of
Ray or MLflow: the caller passes hooks, and wraps the objective for data-parallel training. With R workers, every global
batch is split over the ranks, so the examples of a step do not depend on R. With checkpoints (`checkpoint.py`), a run
continues after the last one; the result equals that of an undisturbed run, to the last bit on a CPU.

Shapes: B examples in a rank's part of a batch.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import nn

from rag_core.embeddings.text_encoder import Precision, autocast
from rag_core.errors import ConfigError
from rag_core.training.checkpoint import Checkpoints
from rag_core.training.divergence import FiniteChecks
from rag_core.training.own_draws import own_draws, recomputes_activations

# Settings that do not affect the result of training, so they are not part of an artifact's key.
NOT_IN_KEY = {"log_every", "checkpoint_every"}
# The number after the seed in a key of `own_draws`: it separates the two uses of random draws in a run.
DROPOUT, FRESH_WEIGHTS = 2, 3


class OptimizerConfig(BaseModel):
    """Settings of an optimisation run. Learning rates belong to the objective's parameter groups."""

    model_config = ConfigDict(extra="forbid")

    steps: int = Field(1000, ge=1, description="optimiser steps")
    batch_size: int = Field(16, ge=1, description="examples per optimiser step, over all workers and accumulated parts")
    accumulation: int = Field(1, ge=1, description="parts into which each worker's share of a batch is divided")
    warmup_steps: int = Field(
        0, ge=0, description="steps over which the learning rates rise from zero; then linear decay to zero"
    )
    weight_decay: float = Field(0.01, ge=0)
    max_grad_norm: float = Field(1.0, gt=0)
    precision: Precision = Field(
        "auto", description="bfloat16: autocast of the matrix products, weights stay float32; auto: if native"
    )
    seed: int = Field(0, ge=0, lt=2**63, description="decides the order of the data, dropout and fresh weights")
    log_every: int = Field(10, ge=1)
    eval_every: int = Field(
        100, ge=1, description="steps between evaluations on the dev questions; there is always one at the end"
    )
    checkpoint_every: int | None = Field(
        None, ge=1, description="steps between checkpoints, from which a killed run continues; empty: every ten minutes"
    )


class Objective(Protocol):
    """A module that the loop can train: its call returns nll_B for a list of examples."""

    def __call__(self, examples: Sequence[Any]) -> torch.Tensor: ...
    def parameter_groups(self) -> list[dict[str, Any]]: ...
    def train(self, mode: bool = True) -> nn.Module: ...


@dataclass
class Hooks:
    """Functions of the caller that the loop calls.

    `log` gets training metrics, `evaluate` returns dev metrics, `keep` is called after each evaluation, and `batch` may
    replace the examples of a step. `stop` decides after every step whether to end there, with a checkpoint. `state`
    returns what a worker wants to store in a checkpoint, as JSON; `restore` gets it back.
    """

    log: Callable[[int, dict[str, float]], None] = lambda step, metrics: None
    evaluate: Callable[[int], dict[str, float]] = lambda step: {}
    keep: Callable[[int, dict[str, float]], None] = lambda step, metrics: None
    batch: Callable[[int, Sequence[Any]], Sequence[Any]] = lambda step, examples: examples
    stop: Callable[[], bool] = lambda: False
    state: Callable[[], dict[str, Any]] = dict
    restore: Callable[[int, dict[str, Any]], None] = lambda step, state: None


@dataclass
class Place:
    """This worker's rank, the number of workers, and the function that wraps a module for data-parallel training."""

    rank: int = 0
    world_size: int = 1
    wrap: Callable[[nn.Module], nn.Module] = field(default=lambda module: module)


def run_training(
    objective: nn.Module,
    examples: Sequence[Any],
    config: OptimizerConfig,
    place: Place,
    hooks: Hooks,
    checkpoints: Checkpoints | None = None,
) -> int:
    """Train `objective` for `config.steps` steps on `examples`, continuing after the newest of `checkpoints`.

    Returns:
        Steps done: `config.steps`, or fewer if `hooks.stop` ended the run.

    Raises:
        ConfigError: the batch does not divide into workers and parts, there are no examples, every learning rate is 0,
            loss, gradient, weights or dev scores are not finite, or another number of workers made the checkpoint.
        ArtifactError: the disk is full, so a checkpoint could not be written; earlier ones stay complete.
    """
    part = part_size(config, place)
    if not examples:
        raise ConfigError("There is nothing to train on: the training set is empty.")
    run = _Run(objective, config, place, hooks)
    with contextlib.ExitStack() as held:
        if checkpoints and place.rank == 0:
            held.enter_context(checkpoints.sole_writer())
        wrapped = place.wrap(objective)
        done = run.resume(checkpoints) if checkpoints else 0
        steps = range(done + 1, config.steps + 1)
        for step, batch in zip(steps, global_batches(examples, config, skip=done), strict=False):
            run.step(wrapped, step, hooks.batch(step, batch), part)
            if checkpoints and run.checkpoint(checkpoints, step):
                return step
    return config.steps


class _Run:
    """The state of a run that changes from step to step."""

    def __init__(self, objective: nn.Module, config: OptimizerConfig, place: Place, hooks: Hooks) -> None:
        self._groups = objective.parameter_groups()  # type: ignore[operator]
        if not self._groups:
            raise ConfigError("There is nothing to train: every learning rate is 0. Set at least one above 0.")
        self._objective, self._config, self._place, self._hooks = objective, config, place, hooks
        self._device = self._groups[0]["params"][0].device
        self._recomputes = recomputes_activations(objective)
        self._optimizer = torch.optim.AdamW(self._groups, weight_decay=config.weight_decay, fused=True)
        self._schedule = torch.optim.lr_scheduler.LambdaLR(self._optimizer, lambda done: _rate_factor(done, config))
        self._meter = _Meter()

    def step(self, wrapped: nn.Module, step: int, batch: Sequence[Any], part: int) -> None:
        """Do one optimiser step on this worker's share of `batch`; then log and evaluate if due."""
        config, hooks = self._config, self._hooks
        self._objective.train()
        share = batch[self._place.rank :: self._place.world_size]
        rates = [float(group["lr"]) for group in self._optimizer.param_groups]
        finite = FiniteChecks(self._objective, step, rates)
        # A step's dropout follows from seed, rank and step only, whatever was drawn before.
        draws = own_draws([config.seed, DROPOUT, self._place.rank, step], self._device, recomputes=self._recomputes)
        with draws, finite.naming_the_step():
            parts = [share[start : start + part] for start in range(0, len(share), part)]
            nll = _backward(wrapped, parts, self._device, config, getattr(self._objective, "until_backward", None))
        trained = (weight for group in self._groups for weight in group["params"])
        norm = torch.nn.utils.clip_grad_norm_(trained, config.max_grad_norm)
        finite.loss_and_gradient(nll, float(norm))
        self._optimizer.step()
        self._schedule.step()
        self._optimizer.zero_grad(set_to_none=True)
        self._meter.add(nll, float(norm), len(batch))
        if step % config.log_every == 0 or step == config.steps:
            hooks.log(step, {**self._meter.take(), "learning_rate": rates[0]})
        if step % config.eval_every == 0 or step == config.steps:
            self._objective.eval()
            with self._meter.paused(), finite.naming_the_step():
                finite.weights()
                scores = hooks.evaluate(step)
                finite.dev_scores(scores)
                hooks.keep(step, scores)

    def checkpoint(self, checkpoints: Checkpoints, step: int) -> bool:
        """Write a checkpoint if one is due; return whether to stop here. Rank 0 decides for all."""
        ended = step == self._config.steps
        decision = {"stop": 0.0, "checkpoint": 0.0}
        if self._place.rank == 0:
            stop = self._hooks.stop()
            due = stop or ended or checkpoints.due(step, self._config.checkpoint_every)
            decision = {"stop": float(stop), "checkpoint": float(due)}
        decision = sum_over_workers(decision)
        if decision["checkpoint"]:
            with self._meter.paused():
                # After the last step only the state is needed, in case the run is killed while the model is published.
                self._write(checkpoints, step, None if ended else self._optimizer)
        return bool(decision["stop"])

    def _write(self, checkpoints: Checkpoints, step: int, optimizer: torch.optim.Optimizer | None) -> None:
        own_state = {"meter": self._meter.state(), "caller": self._hooks.state()}
        workers = gather_from_workers(own_state)
        if self._place.rank == 0:
            groups = self._optimizer.state_dict()["param_groups"]
            state = {"parameter_groups": groups, "schedule": self._schedule.state_dict(), "workers": workers}
            checkpoints.write(step, self._objective, optimizer, state)

    def resume(self, checkpoints: Checkpoints) -> int:
        """Load the newest complete checkpoint; return the steps done."""
        newest = checkpoints.resume_from() if self._place.rank == 0 else None
        step = int(sum_over_workers({"step": float(newest.step if newest else 0)})["step"])
        if not step:
            return 0
        checkpoint = checkpoints.at(step)
        if checkpoint.workers != self._place.world_size:
            raise ConfigError(
                f"The unfinished training in {checkpoints.folder} ran with {checkpoint.workers} workers, but this run "
                f"has {self._place.world_size}, which would add numbers up in another order. Set num_workers to "
                f"{checkpoint.workers}, or delete that folder to start again."
            )
        state = checkpoints.read(checkpoint, self._objective, self._optimizer)
        self._schedule.load_state_dict(state["schedule"])
        own_state = state["workers"][self._place.rank]
        self._hooks.restore(step, own_state["caller"])
        self._meter.restore(own_state["meter"])
        return step


def global_batches(examples: Sequence[Any], config: OptimizerConfig, skip: int = 0) -> Iterator[list[Any]]:
    """Yield batches of `batch_size` examples without end; each epoch has a new order that follows from the seed alone.

    A batch may continue into the next epoch, so that every batch is full. The first `skip` batches are left out, at no
    cost.
    """
    batch: list[Any] = []
    epoch, start = divmod(skip * config.batch_size, len(examples))
    while True:
        for row in np.random.default_rng([config.seed, epoch]).permutation(len(examples))[start:]:
            batch.append(examples[row])
            if len(batch) == config.batch_size:
                yield batch
                batch = []
        epoch, start = epoch + 1, 0


def sum_over_workers(values: dict[str, float]) -> dict[str, float]:
    """Add each value up over all workers. A single process gets its values back."""
    if not torch.distributed.is_available() or not torch.distributed.is_initialized():
        return values
    on_gpu = torch.distributed.get_backend() == "nccl"
    sums = torch.tensor(list(values.values()), dtype=torch.float64, device="cuda" if on_gpu else "cpu")
    torch.distributed.all_reduce(sums)
    return dict(zip(values, sums.tolist(), strict=True))


def gather_from_workers(value: dict[str, Any]) -> list[dict[str, Any]]:
    """Return the values of all workers, by rank. A single process gets a list of its own value."""
    if not torch.distributed.is_available() or not torch.distributed.is_initialized():
        return [value]
    values: list[Any] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(values, value)
    return values


def _backward(
    wrapped: nn.Module,
    parts: list[Sequence[Any]],
    device: torch.device,
    config: OptimizerConfig,
    until_backward: Callable[[], contextlib.AbstractContextManager[None]] | None,
) -> float:
    """Accumulate the gradients of the mean nll over this worker's examples; return that mean in nats."""
    count = sum(len(part) for part in parts)
    total = 0.0
    for number, part in enumerate(parts):
        last = number == len(parts) - 1
        # DDP sums gradients over workers at every backward pass unless told that more parts follow.
        no_sync = getattr(wrapped, "no_sync", None)
        with contextlib.ExitStack() as held:
            held.enter_context(contextlib.nullcontext() if last or no_sync is None else no_sync())
            with autocast(device, config.precision):
                held.enter_context(until_backward() if until_backward else contextlib.nullcontext())
                nll_B = wrapped(part)
            (nll_B.sum() / count).backward()
        total += float(nll_B.detach().sum())
    return total / count


def part_size(config: OptimizerConfig, place: Place) -> int:
    """Examples per forward pass of a worker; ConfigError if the batch does not divide into workers and parts."""
    share, rest = divmod(config.batch_size, place.world_size)
    part, more = divmod(share, config.accumulation)
    if rest or more or not part:
        raise ConfigError(
            f"batch_size {config.batch_size} cannot be divided into {place.world_size} workers × {config.accumulation} "
            "accumulated parts. Make it a multiple of their product."
        )
    return part


def _rate_factor(done: int, config: OptimizerConfig) -> float:
    if done < config.warmup_steps:
        return (done + 1) / config.warmup_steps
    return max(0.0, (config.steps - done) / max(1, config.steps - config.warmup_steps))


class _Meter:
    """Means since the last report, and examples per second."""

    def __init__(self) -> None:
        self._nll: list[float] = []
        self._norm: list[float] = []
        self._examples = 0
        self._since = time.perf_counter()

    def add(self, nll: float, norm: float, examples: int) -> None:
        self._nll.append(nll)
        self._norm.append(norm)
        self._examples += examples

    def take(self) -> dict[str, float]:
        seconds = time.perf_counter() - self._since
        metrics = {
            "train_nll": float(np.mean(self._nll)),
            "grad_norm": float(np.mean(self._norm)),
            "examples_per_second": self._examples / seconds,
        }
        self.__init__()  # type: ignore[misc]
        return metrics

    def state(self) -> dict[str, Any]:
        """For a checkpoint."""
        seconds = time.perf_counter() - self._since
        return {"nll": self._nll, "norm": self._norm, "examples": self._examples, "seconds": seconds}

    def restore(self, state: dict[str, Any]) -> None:
        """Continue the means of an earlier `state`."""
        self._nll, self._norm, self._examples = list(state["nll"]), list(state["norm"]), state["examples"]
        self._since = time.perf_counter() - state["seconds"]

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Exclude the time of the block from the examples per second."""
        before = time.perf_counter()
        yield
        self._since += time.perf_counter() - before
