"""Gradient checkpointing changes no bit of loss or gradients, whatever is drawn and whichever kernels are used."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import pytest
import torch
from torch import nn

from rag_core.cpu.training_kernels import training_kernels
from rag_core.errors import ConfigError
from rag_core.pretrained.rounded_weights import round_weights
from rag_core.reading.likelihood import rag_nll
from rag_core.training.own_draws import own_draws, recomputes_activations
from rag_core.training.recomputation import recompute_layers
from tests.support.models.adapters import LORA, with_adapters
from tests.support.models.tiny_causal import CAUSAL_FAMILIES, tiny_causal
from tests.support.models.tiny_models import random_contexts, tiny_model
from tests.support.other_draws import draw_in_another_thread

LABELS_BT = torch.tensor([[3, 4, 2], [5, 2, -100]])
CPU = torch.device("cpu")


def prepare(model: Any, recomputes: bool, lora: bool, rounded: bool = False, dropout: float = 0.3) -> Any:
    """The model in training mode with dropout everywhere."""
    if rounded:
        round_weights(model)
    if lora:
        with_adapters(model, LORA.model_copy(update={"dropout": dropout}))
    if recomputes:
        recompute_layers(model)
    for module in model.modules():
        for name in ("p", "dropout", "attention_dropout", "activation_dropout", "dropout_rate"):
            if isinstance(getattr(module, name, None), float):
                setattr(module, name, dropout)
    return model.train()


def gradients(
    model: Any, loss: Callable[[Any], torch.Tensor], precision: str, held: AbstractContextManager[None] | None = None
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Loss and gradients of a step, with draws by another thread before and within."""
    model.zero_grad()
    draw_in_another_thread()
    with own_draws([3], CPU, recomputes=recomputes_activations(model)):
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=precision == "bfloat16"):
            held = held or training_kernels(model)
            held.__enter__()
            value = loss(model)
        draw_in_another_thread()
        value.backward()
        held.__exit__(None, None, None)
    return value.detach(), {name: weight.grad for name, weight in model.named_parameters() if weight.grad is not None}


def assert_equal(
    model: Any,
    other: Any,
    loss: Callable[[Any], torch.Tensor],
    precision: str,
    held: AbstractContextManager[None] | None = None,
) -> None:
    """`held` is what the model without checkpointing holds until the gradient."""
    expected = gradients(model, loss, precision, held)
    actual = gradients(other, loss, precision)
    assert torch.equal(actual[0], expected[0])
    assert actual[1].keys() == expected[1].keys()
    assert expected[1]
    assert all(torch.equal(actual[1][name], expected[1][name]) for name in expected[1])


def nll(model: Any) -> torch.Tensor:
    contexts = random_contexts(2, 3, 6, seed=0, dtype=torch.float32)
    result: torch.Tensor = rag_nll(model, *contexts, LABELS_BT, variant="token").sum()
    return result


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize("lora", [False, True])
@pytest.mark.parametrize("family", ["bart", "t5", "bert2bert", "llama", "gpt2"])
def test_loss_and_gradients_keep_every_bit(family: str, lora: bool, precision: str) -> None:
    build = tiny_causal if family in CAUSAL_FAMILIES else tiny_model
    models = (prepare(build(family, dtype=torch.float32), again, lora) for again in (False, True))
    assert_equal(*models, nll, precision, nullcontext())


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_a_decoder_only_model_with_rounded_weights_and_adapters_keeps_every_bit(precision: str) -> None:
    models = (prepare(tiny_causal("llama", dtype=torch.float32), again, True, True) for again in (False, True))
    assert_equal(*models, nll, precision, nullcontext())


def test_layers_run_twice_in_training_and_once_in_evaluation() -> None:
    model = prepare(tiny_model("bart", dtype=torch.float32), True, True)
    calls: list[None] = []
    layer = model.get_decoder().layers[0].fc1.base_layer
    layer.register_forward_pre_hook(lambda *_: calls.append(None))
    gradients(model, nll, "float32")
    assert len(calls) == 2
    nll(model.eval()).backward()
    assert len(calls) == 3


def test_without_the_same_kernels_the_second_pass_would_fail_or_differ() -> None:
    model = prepare(tiny_model("bart", dtype=torch.float32), True, False)
    with pytest.raises(Exception, match=r"Recomputed values|different number of tensors"):
        gradients(model, nll, "float32", nullcontext())


def test_a_model_that_asks_for_checkpointing_itself_uses_torchs_generator() -> None:
    model = tiny_model("bart", dtype=torch.float32)
    assert not recomputes_activations(model)
    model.activation_checkpointing_enable()
    assert recomputes_activations(model)
    recompute_layers(model)
    assert not recomputes_activations(model)


def test_a_model_that_cannot_is_refused() -> None:
    class Other(type(tiny_model("bart"))):  # type: ignore[misc]
        supports_gradient_checkpointing = False

    model = tiny_model("bart")
    model.__class__ = Other
    with pytest.raises(ConfigError, match=r"train\.gradient_checkpointing is set.*Other"):
        recompute_layers(model)
    assert isinstance(model, nn.Module)
