"""The optimisation loop: batches in a seeded order, AdamW with warm-up, clipping, accumulation, evaluation.

It trains anything whose forward pass returns the nll of a batch of examples (`objectives.py`). It knows nothing of Ray
or MLflow: whoever runs it hands in hooks, and wraps the objective for data-parallel training. With R workers every
global batch is dealt out over the ranks, so the examples of a step do not depend on R.

Shapes: B examples in a rank's part of a batch.
"""

from __future__ import annotations

import contextlib
import math
import random
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import nn

from rag_core.errors import ConfigError
from rag_core.text_encoder import Precision, autocast


class OptimizerConfig(BaseModel):
    """One optimisation run. Learning rates belong to the objective's parameter groups."""

    model_config = ConfigDict(extra="forbid")

    steps: int = Field(1000, ge=1, description="optimiser steps")
    batch_size: int = Field(16, ge=1, description="examples per optimiser step, over all workers and accumulated parts")
    accumulation: int = Field(1, ge=1, description="parts into which each worker's share of a batch is cut")
    warmup_steps: int = Field(
        0, ge=0, description="steps over which the learning rates rise from zero; then linear decay to zero"
    )
    weight_decay: float = Field(0.01, ge=0)
    max_grad_norm: float = Field(1.0, gt=0)
    precision: Precision = Field(
        "auto", description="bfloat16: autocast of the matrix products, weights stay float32; auto: if native"
    )
    seed: int = 0
    log_every: int = Field(10, ge=1)
    eval_every: int = Field(
        100, ge=1, description="steps between evaluations on the dev questions; one comes at the end, too"
    )


class Objective(Protocol):
    """What the loop trains: an nn.Module whose call returns nll_B for a list of examples."""

    def __call__(self, examples: Sequence[Any]) -> torch.Tensor: ...
    def parameter_groups(self) -> list[dict[str, Any]]: ...
    def train(self, mode: bool = True) -> nn.Module: ...


@dataclass
class Hooks:
    """What the caller wants to hear. `evaluate` returns dev metrics; `keep` is called after each evaluation."""

    log: Callable[[int, dict[str, float]], None] = lambda step, metrics: None
    evaluate: Callable[[int], dict[str, float]] = lambda step: {}
    keep: Callable[[int, dict[str, float]], None] = lambda step, metrics: None
    batch: Callable[[int, Sequence[Any]], Sequence[Any]] = lambda step, examples: examples


@dataclass
class Place:
    """Which worker this is, and how a module is wrapped for data-parallel training."""

    rank: int = 0
    world_size: int = 1
    wrap: Callable[[nn.Module], nn.Module] = field(default=lambda module: module)


def run_training(
    objective: nn.Module, examples: Sequence[Any], config: OptimizerConfig, place: Place, hooks: Hooks
) -> None:
    """Train `objective` for `config.steps` steps on `examples`.

    Raises:
        ConfigError: the batch cannot be dealt out over workers and parts, there are no examples, every learning rate is 0, or the
            loss is not finite.
    """
    part = _part_size(config, place)
    if not examples:
        raise ConfigError("There is nothing to train on: the training set is empty.")
    seed_everything(config.seed + place.rank)
    groups = objective.parameter_groups()  # type: ignore[operator]
    if not groups:
        raise ConfigError("There is nothing to train: every learning rate is 0. Set at least one above 0.")
    device = groups[0]["params"][0].device
    optimizer = torch.optim.AdamW(groups, weight_decay=config.weight_decay, fused=True)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda done: _rate_factor(done, config))
    wrapped = place.wrap(objective)
    meter = _Meter()
    for step, batch in zip(range(1, config.steps + 1), global_batches(examples, config), strict=False):
        objective.train()
        mine = hooks.batch(step, batch)[place.rank :: place.world_size]
        nll = _backward(wrapped, [mine[at : at + part] for at in range(0, len(mine), part)], device, config)
        norm = torch.nn.utils.clip_grad_norm_((p for group in groups for p in group["params"]), config.max_grad_norm)
        if not math.isfinite(nll) or not torch.isfinite(norm):
            raise ConfigError(
                f"Training diverged at step {step}: loss {nll}, gradient norm {float(norm)}. Lower the learning rates, "
                "lengthen the warm-up, or train in float32."
            )
        rate = float(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
        optimizer.zero_grad(set_to_none=True)
        meter.add(nll, float(norm), len(batch))
        if step % config.log_every == 0 or step == config.steps:
            hooks.log(step, {**meter.take(), "learning_rate": rate})
        if step % config.eval_every == 0 or step == config.steps:
            objective.eval()
            hooks.keep(step, hooks.evaluate(step))
            meter.restart_clock()


def global_batches(examples: Sequence[Any], config: OptimizerConfig) -> Iterator[list[Any]]:
    """Endless batches of `batch_size` examples: every epoch in a new order that follows from the seed alone.

    A batch may run over from one epoch into the next, so that every batch is full.
    """
    batch: list[Any] = []
    epoch = 0
    while True:
        for row in np.random.default_rng([config.seed, epoch]).permutation(len(examples)):
            batch.append(examples[row])
            if len(batch) == config.batch_size:
                yield batch
                batch = []
        epoch += 1


def sum_over_workers(values: dict[str, float]) -> dict[str, float]:
    """Add each value up over all workers (or return them as they are in a single process)."""
    if not torch.distributed.is_available() or not torch.distributed.is_initialized():
        return values
    on_gpu = torch.distributed.get_backend() == "nccl"
    sums = torch.tensor(list(values.values()), dtype=torch.float64, device="cuda" if on_gpu else "cpu")
    torch.distributed.all_reduce(sums)
    return dict(zip(values, sums.tolist(), strict=True))


def seed_everything(seed: int) -> None:
    """Seed Python, NumPy and PyTorch (dropout and sampling follow from it)."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


def _backward(wrapped: nn.Module, parts: list[Sequence[Any]], device: torch.device, config: OptimizerConfig) -> float:
    """Accumulate the gradients of the mean nll over this worker's examples; returns that mean in nats."""
    count = sum(len(part) for part in parts)
    total = 0.0
    for number, part in enumerate(parts):
        last = number == len(parts) - 1
        # DDP sums gradients over workers at every backward pass unless told that more parts follow.
        waits = getattr(wrapped, "no_sync", None)
        with contextlib.nullcontext() if last or waits is None else waits():
            with autocast(device, config.precision):
                nll_B = wrapped(part)
            (nll_B.sum() / count).backward()
        total += float(nll_B.detach().sum())
    return total / count


def _part_size(config: OptimizerConfig, place: Place) -> int:
    share, rest = divmod(config.batch_size, place.world_size)
    part, more = divmod(share, config.accumulation)
    if rest or more or not part:
        raise ConfigError(
            f"batch_size {config.batch_size} cannot be cut into {place.world_size} workers × {config.accumulation} "
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

    def restart_clock(self) -> None:
        self._since = time.perf_counter()
