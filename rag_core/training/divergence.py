"""What is said when training leaves the finite numbers: at which step, at which rates, which part, what to do.

A run is checked where it can still be told which part failed: question vectors before the search (an index can only
find nothing for them), the loss and the gradient before the update, the weights and dev scores before they are kept.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterable, Iterator, Mapping

import torch
from torch import nn

from rag_core.errors import ConfigError, NotFiniteError


class FiniteChecks:
    """The checks of one optimiser step.

    Args:
        step: counted from 1.
        rates: learning rate of each group of parameters.
    """

    def __init__(self, objective: nn.Module, step: int, rates: Iterable[float]) -> None:
        self._objective, self._step, self._updated = objective, step, False
        self._rates = ", ".join(f"{rate:.3g}" for rate in dict.fromkeys(rates))

    @contextlib.contextmanager
    def naming_the_step(self) -> Iterator[None]:
        """A `NotFiniteError` inside the block becomes the ConfigError of a run that diverged."""
        try:
            yield
        except NotFiniteError as error:
            raise self._diverged(f"not finite: {error.part}{self._when()}") from error

    def loss_and_gradient(self, nll: float, norm: float) -> None:
        """Raise ConfigError unless both are finite."""
        if not math.isfinite(nll):
            part = getattr(self._objective, "loss_comes_from", "the loss")
            raise self._diverged(f"loss {nll}, gradient norm {norm}; not finite: {part}")
        if not math.isfinite(norm):
            gradients = {name: one.grad for name, one in self._objective.named_parameters() if one.grad is not None}
            part = f"the gradient{_where(gradients) or ' (its norm)'}, while the loss is"
            raise self._diverged(f"loss {nll}, gradient norm {norm}; not finite: {part}")

    def weights(self) -> None:
        """After the update: raise ConfigError unless all trained weights are finite."""
        self._updated = True
        trained = {name: one.detach() for name, one in self._objective.named_parameters() if one.requires_grad}
        if where := _where(trained):
            raise self._diverged(f"not finite: the weights{where}{self._when()}")

    def dev_scores(self, scores: Mapping[str, float]) -> None:
        """Raise ConfigError unless all dev scores are finite."""
        for name, value in scores.items():
            if not math.isfinite(value):
                raise self._diverged(f"not finite: the dev score {name} ({value})")

    def _when(self) -> str:
        return " after the update" if self._updated else ""

    def _diverged(self, what: str) -> ConfigError:
        first = self._step == 1 and not self._updated
        damaged = " Nothing was learnt yet, so the model that training starts from may be damaged." if first else ""
        return ConfigError(
            f"Training diverged at step {self._step}: {what}. The learning rate was {self._rates}.{damaged} Lower the "
            "learning rates, lengthen the warm-up, or train in float32."
        )


def _where(tensors: Mapping[str, torch.Tensor]) -> str:
    """Which of the tensors are not finite, by number and first name; empty if all are finite."""
    bad = [name for name, one in tensors.items() if not torch.isfinite(one).all()]
    return f" ({len(bad)} of {len(tensors)} tensors, first {bad[0]})" if bad else ""
