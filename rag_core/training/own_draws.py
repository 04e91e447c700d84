"""Random draws that other code cannot disturb: dropout and fresh weights come from a separate generator.

PyTorch's modules draw from its default generator, which the whole process shares: a draw by another thread, or by an
evaluation, would change every mask that follows. Inside `own_draws` this thread's draws come from a generator that
depends on a key alone (in training: seed, rank and step). So a checkpoint needs no random state.

On a CPU, dropout, attention with dropout and functions that take a generator use ours. Other draws on a CPU, and all
draws on a GPU, use the default generator, which is seeded for the block and restored after it. Draws before the block
then change nothing, but draws of another thread during the block do. The price is a few microseconds per call of a
PyTorch function (docs/log.md).

Shapes: B texts, H heads, S tokens, F features of a head.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from contextvars import ContextVar
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode

_DROPOUT = {functional.dropout, torch.dropout, torch.dropout_}
# Functions that make or fill a tensor, and take an argument `generator`. Functions of `nn.init` are recognised by that
# argument instead, because Transformers replaces them while it loads a model.
_FILLING = {
    *(torch.rand, torch.randn, torch.randint, torch.randperm, torch.rand_like, torch.randn_like, torch.randint_like),
    *(torch.normal, torch.bernoulli, torch.multinomial),
    *(torch.Tensor.uniform_, torch.Tensor.normal_, torch.Tensor.random_, torch.Tensor.exponential_),
    *(torch.Tensor.bernoulli, torch.Tensor.bernoulli_, torch.Tensor.multinomial),
}

# The generator of the innermost `own_draws` of this thread.
_in_use: ContextVar[torch.Generator | None] = ContextVar("generator of own_draws", default=None)


@contextmanager
def own_draws(key: Sequence[int], device: torch.device, *, recomputes: bool = False) -> Iterator[None]:
    """Inside the block, this thread's random draws depend on `key` alone.

    Args:
        key: numbers ≥ 0: a seed, and numbers that separate the draws of a run.
        device: the model's device.
        recomputes: the model runs its layers again in the backward pass, and does not use `repeated_draws` for it
            (`recomputes_activations`). To get the same masks, PyTorch restores its default generator, and no other. So
            only that generator is used.
    """
    number = int(np.random.SeedSequence(list(key)).generate_state(1, np.uint64)[0])
    gpus = []
    if device.type == "cuda":
        gpus = [torch.cuda.current_device() if device.index is None else device.index]
    with ExitStack() as held:
        held.enter_context(torch.random.fork_rng(devices=gpus))
        torch.default_generator.manual_seed(number)
        for gpu in gpus:
            torch.cuda.default_generators[gpu].manual_seed(number)
        if not recomputes:
            generator = torch.Generator().manual_seed(number)
            held.callback(_in_use.reset, _in_use.set(generator))
            held.enter_context(_OwnGenerator(generator))
        yield


def repeated_draws() -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
    """A `context_fn` for PyTorch's gradient checkpointing: a layer's second pass draws what its first pass drew."""
    generator = _in_use.get()
    if generator is None:
        return nullcontext(), nullcontext()
    return nullcontext(), _at_state(generator, generator.get_state())


@contextmanager
def _at_state(generator: torch.Generator, state: torch.Tensor) -> Iterator[None]:
    before = generator.get_state()
    generator.set_state(state)
    try:
        # PyTorch switches the mode off inside `Tensor.backward`, as inside every function that a mode handles.
        with _OwnGenerator(generator):
            yield
    finally:
        generator.set_state(before)


def recomputes_activations(module: nn.Module) -> bool:
    """Whether a part of a model uses gradient checkpointing without `repeated_draws`, as its own settings may ask."""
    return any(
        getattr(part, "gradient_checkpointing", False)
        and getattr(getattr(part, "_gradient_checkpointing_func", None), "keywords", {}).get("context_fn")
        is not repeated_draws
        for part in module.modules()
    )


class _OwnGenerator(TorchFunctionMode):
    """Passes our generator to draws on a CPU. PyTorch keeps such a mode per thread."""

    def __init__(self, generator: torch.Generator) -> None:
        super().__init__()
        self._generator = generator

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        options = kwargs or {}
        if func in _DROPOUT:
            return self._dropout(func, *args, **options)
        if func is functional.scaled_dot_product_attention:
            return self._attention(*args, **options)
        draws = func in _FILLING or "generator" in options
        if draws and options.get("generator") is None and _on_cpu(args, options):
            options = options | {"generator": self._generator}
        return func(*args, **options)

    def _dropout(
        self, func: Callable[..., Any], input: torch.Tensor, p: float = 0.5, *flags: Any, **options: Any
    ) -> torch.Tensor:
        """Dropout as PyTorch computes it on a CPU. Calls that need no draw on a CPU go to PyTorch."""
        # functional.dropout(input, p, training, inplace); torch.dropout(input, p, train)
        training = flags[0] if flags else options.get("training", options.get("train", True))
        in_place = func is torch.dropout_ or options.get("inplace", len(flags) > 1 and flags[1])
        if not training or not 0 < p < 1 or input.device.type != "cpu":
            return func(input, p, *flags, **options)
        kept = torch.empty_like(input).bernoulli_(1 - p, generator=self._generator).div_(1 - p)
        return input.mul_(kept) if in_place else input * kept

    def _attention(
        self,
        query_BHSF: torch.Tensor,
        key_BHSF: torch.Tensor,
        value_BHSF: torch.Tensor,
        attn_mask: torch.Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> torch.Tensor:
        """PyTorch's attention, except where it would draw on a CPU. There, the same steps as PyTorch's."""
        if not dropout_p or query_BHSF.device.type != "cpu":
            return functional.scaled_dot_product_attention(
                query_BHSF,
                key_BHSF,
                value_BHSF,
                attn_mask=attn_mask,
                dropout_p=dropout_p,
                is_causal=is_causal,
                scale=scale,
                enable_gqa=enable_gqa,
            )
        if enable_gqa:
            times = query_BHSF.shape[-3] // key_BHSF.shape[-3]
            key_BHSF, value_BHSF = (states.repeat_interleave(times, dim=-3) for states in (key_BHSF, value_BHSF))
        scaled_BHSF = query_BHSF * (query_BHSF.shape[-1] ** -0.5 if scale is None else scale)
        scores_BHSS = scaled_BHSF @ key_BHSF.transpose(-2, -1)
        if is_causal:
            attn_mask = torch.ones(scores_BHSS.shape[-2:], dtype=torch.bool).tril()
        if attn_mask is not None and attn_mask.dtype == torch.bool:
            scores_BHSS = scores_BHSS.masked_fill(~attn_mask, torch.finfo(scores_BHSS.dtype).min)
        elif attn_mask is not None:
            scores_BHSS = scores_BHSS + attn_mask
        weights_BHSS = self._dropout(torch.dropout, scores_BHSS.softmax(-1), dropout_p, True)
        return weights_BHSS.to(value_BHSF.dtype) @ value_BHSF


def _on_cpu(args: Sequence[Any], options: dict[str, Any]) -> bool:
    tensors = [value for value in (*args, *options.values()) if isinstance(value, torch.Tensor)]
    if tensors:
        return all(tensor.device.type == "cpu" for tensor in tensors)
    return torch.device(options.get("device") or torch.get_default_device()).type == "cpu"
