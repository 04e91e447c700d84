"""Stop training when a number is not finite; report the step, the learning rates, the part that failed and a remedy.

The checks are placed so that the failing part is known: question vectors before the search (an index cannot rank NaN),
the loss and the gradient before the update, the weights and dev scores before they are kept.
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
        """Turn a `NotFiniteError` inside the block into a ConfigError that names the step."""
        try:
            yield
        except NotFiniteError as error:
            raise self._diverged(f"not finite: {error.part}{self._when()}") from error

    def loss_and_gradient(self, nll: float, norm: float) -> None:
        """Raise ConfigError unless the loss and the gradient norm are finite."""
        if not math.isfinite(nll):
            part = getattr(self._objective, "loss_comes_from", "the loss")
            raise self._diverged(f"loss {nll}, gradient norm {norm}; not finite: {part}")
        if not math.isfinite(norm):
            weights = self._objective.named_parameters()
            gradients = {name: weight.grad for name, weight in weights if weight.grad is not None}
            part = f"the gradient{_where(gradients) or ' (its norm)'}, while the loss is"
            raise self._diverged(f"loss {nll}, gradient norm {norm}; not finite: {part}")

    def weights(self) -> None:
        """After the update: raise ConfigError unless all trained weights are finite."""
        self._updated = True
        weights = self._objective.named_parameters()
        trained = {name: weight.detach() for name, weight in weights if weight.requires_grad}
        if where := _where(trained):
            raise self._diverged(f"not finite: the weights{where}{self._when()}")

    def dev_scores(self, scores: Mapping[str, float]) -> None:
        """Raise ConfigError unless all dev scores are finite."""
        for name, value in scores.items():
            if not math.isfinite(value):
                raise self._diverged(f"not finite: the dev score {name} ({value})")

    def _when(self) -> str:
        return " after the update" if self._updated else ""

    def _diverged(self, finding: str) -> ConfigError:
        first = self._step == 1 and not self._updated
        damaged = " Nothing was learnt yet, so the model that training starts from may be damaged." if first else ""
        return ConfigError(
            f"Training diverged at step {self._step}: {finding}. The learning rate was {self._rates}.{damaged} Lower "
            "the learning rates, lengthen the warm-up, or train in float32."
        )


def _where(tensors: Mapping[str, torch.Tensor]) -> str:
    """Describe the tensors that are not finite by their number and the first name; empty if all are finite."""
    bad = [name for name, tensor in tensors.items() if not torch.isfinite(tensor).all()]
    return f" ({len(bad)} of {len(tensors)} tensors, first {bad[0]})" if bad else ""
