"""Training runs that can be stopped and resumed, with their results, for comparisons to the last bit."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from rag_core.questions.questions import Question
from rag_core.training.checkpoint import Checkpoints
from rag_core.training.loop import Hooks, OptimizerConfig, Place, run_training
from tests.support.small_corpus import QUESTIONS

EXAMPLES = [Question(str(n), text, (answer,), kind, (gold,)) for n, (text, answer, gold, kind) in enumerate(QUESTIONS)]
STEPS = 7
CONFIG = OptimizerConfig(
    steps=STEPS, batch_size=6, accumulation=2, warmup_steps=3, log_every=2, eval_every=3, checkpoint_every=1, seed=5
)


@dataclass
class Caller:
    """A caller of the loop: it keeps the curves, and the weights with the best dev nll so far."""

    checkpoints: Checkpoints
    objective: Any
    stop_after: int = 0
    curves: dict[str, list[Any]] = field(default_factory=lambda: {"history": [], "dev": []})
    best: float = float("inf")
    stop_checks: int = 0

    def hooks(self) -> Hooks:
        return Hooks(
            log=self._log,
            evaluate=self._evaluate,
            keep=self._keep,
            stop=self._stop,
            state=lambda: {"curves": self.curves, "best": self.best, "stop_checks": self.stop_checks},
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
        self.stop_checks += 1
        return self.stop_checks == self.stop_after

    def _restore(self, step: int, state: dict[str, Any]) -> None:
        self.curves, self.best, self.stop_checks = state["curves"], state["best"], state["stop_checks"]


@dataclass
class Outcome:
    """The results of a run: weights, moments, curves."""

    done: int
    weights: dict[str, torch.Tensor]
    moments: dict[str, torch.Tensor]
    caller: Caller

    def assert_equals(self, other: Outcome) -> None:
        assert self.caller.curves == other.caller.curves
        assert self.caller.best == other.caller.best
        for own, others in ((self.weights, other.weights), (self.moments, other.moments)):
            assert own.keys() == others.keys()
            assert all(torch.equal(tensor, others[name]) for name, tensor in own.items())
        assert self.moments


class Line(nn.Module):
    """A model small enough for many checkpoints."""

    def __init__(self, size: int = 3) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.linspace(-1, 1, size))

    def forward(self, examples: list[Question]) -> torch.Tensor:
        x_B = torch.tensor([float(len(example.question)) for example in examples])
        return (self.weight.mean() * x_B - 1).square()

    def parameter_groups(self) -> list[dict[str, Any]]:
        return [{"params": [self.weight], "lr": 0.01}]


def run(
    make: Callable[[], Any],
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    config: OptimizerConfig = CONFIG,
    stop_after: int = 0,
) -> Outcome:
    """Train the objective that `make` returns, with checkpoints in `folder`; 0 for `stop_after` runs to the end."""
    made: list[torch.optim.Optimizer] = []
    plain = torch.optim.AdamW
    with monkeypatch.context() as patch:
        patch.setattr(
            torch.optim, "AdamW", lambda *arguments, **options: made.append(plain(*arguments, **options)) or made[-1]
        )
        checkpoints, objective = Checkpoints(folder), make()
        caller = Caller(checkpoints, objective, stop_after)
        done = run_training(objective, EXAMPLES, config, Place(), caller.hooks(), checkpoints)
    states = made[0].state_dict()["state"]
    moments = {f"{number}.{name}": tensor for number, state in states.items() for name, tensor in state.items()}
    weights = {name: tensor.clone() for name, tensor in objective.state_dict().items()}
    return Outcome(done, weights, moments, caller)
