"""A frozen base in bfloat16: the same results as float32 weights of the same values, in half the memory."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from rag_core.decoding import decode_rag_token
from rag_core.embeddings.text_encoder import fingerprint_of_weights
from rag_core.model.adapters.lora import base_of
from rag_core.model.reader import load_generator
from rag_core.pretrained.rounded_weights import RoundedLinear, round_weights, stored_type
from rag_core.reading.likelihood import rag_nll
from tests.support.models.adapters import make_adapters, with_adapters
from tests.support.models.tiny_models import random_contexts, tiny_model
from tests.support.small_corpus import make_encoder, make_generator

LABELS_BT = torch.tensor([[3, 4, 2], [5, 2, -100]])


def pair(family: str) -> tuple[Any, Any]:
    """Two generators with the same adapters and base weights, which bfloat16 can hold: in float32, and rounded."""
    models = []
    for rounds in (False, True):
        model = tiny_model(family, dtype=torch.bfloat16).float()
        if rounds:
            round_weights(model)
        models.append(with_adapters(model))
    return models[0], models[1]


def gradients(model: Any, precision: str) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    contexts = random_contexts(2, 3, 6, seed=0, dtype=torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=precision == "bfloat16"):
        nll_B = rag_nll(model, *contexts, LABELS_BT, variant="token")
    nll_B.sum().backward()
    return nll_B.detach(), {name: weight.grad for name, weight in model.named_parameters() if weight.grad is not None}


@pytest.mark.parametrize("family", ["bart", "t5", "bert2bert"])
def test_matrices_are_bfloat16_and_all_else_is_float32(family: str) -> None:
    model = pair(family)[1]
    for name, module in model.named_modules():
        if type(module) is nn.Linear:
            assert ".lora_" in name
        if isinstance(module, RoundedLinear):
            assert module.weight.dtype == torch.bfloat16
            assert not module.weight.requires_grad
    for side in (model.get_encoder(), model.get_decoder()):
        assert side.get_input_embeddings().weight.dtype == torch.bfloat16
        assert side.get_input_embeddings()(torch.tensor([3])).dtype == torch.float32
    others = {name for name, weight in model.named_parameters() if weight.dtype == torch.float32}
    assert {name for name, _ in model.named_parameters() if "norm" in name.lower() or ".lora_" in name} <= others


@pytest.mark.parametrize("precision", ["bfloat16", "float32"])
@pytest.mark.parametrize("family", ["bart", "bert2bert"])
def test_loss_and_gradients_equal_those_of_float32_weights_to_the_last_bit(family: str, precision: str) -> None:
    whole, rounded = pair(family)
    expected, actual = gradients(whole, precision), gradients(rounded, precision)
    assert torch.equal(actual[0], expected[0])
    assert actual[1].keys() == expected[1].keys()
    assert all(torch.equal(actual[1][name], expected[1][name]) for name in expected[1])


def test_t5_rounds_what_its_last_layers_read_as_its_own_code_says() -> None:
    whole, rounded = pair("t5")
    torch.testing.assert_close(*(gradients(model, "float32")[0] for model in (rounded, whole)), rtol=2e-2, atol=2e-2)
    assert torch.equal(*(gradients(model, "bfloat16")[0] for model in (rounded, whole)))


@pytest.mark.parametrize("precision", ["bfloat16", "float32"])
def test_decoding_equals_that_of_float32_weights(precision: str) -> None:
    contexts = random_contexts(2, 3, 6, seed=0, dtype=torch.float32)
    found = []
    for model in pair("bart"):
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=precision == "bfloat16"):
            found.append(decode_rag_token(model, *contexts, num_beams=3, max_new_tokens=4))
    pairs = [(h.token_ids, h.log_prob) for row in found[0] for h in row]
    assert pairs == [(h.token_ids, h.log_prob) for row in found[1] for h in row]


def test_without_autocast_the_backward_pass_keeps_no_converted_matrix() -> None:
    layer = RoundedLinear(64, 64)
    layer.weight.data = layer.weight.data.bfloat16()
    layer.requires_grad_(False)
    saved: list[torch.Tensor] = []
    x_ND = torch.ones(2, 64, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: saved.append(tensor) or tensor, lambda tensor: tensor):
        layer(x_ND).sum().backward()
    assert [(tensor.dtype, tuple(tensor.shape)) for tensor in saved] == [(torch.bfloat16, (64, 64))]
    torch.testing.assert_close(x_ND.grad, layer.weight.float().sum(0).expand(2, -1))


def test_the_fingerprint_of_a_base_does_not_depend_on_how_it_is_held(tmp_path: Path) -> None:
    base = make_generator(tmp_path / "base", make_encoder(tmp_path / "encoder"))
    expected = fingerprint_of_weights(load_generator(base)[0])
    adapters = make_adapters(tmp_path / "adapters", base)
    rounded, _ = load_generator(adapters, dtype="bfloat16")
    assert any(weight.dtype == torch.bfloat16 for weight in rounded.parameters())
    found = base_of(rounded)
    assert found is not None
    assert (found.fingerprint, found.dtype) == (expected, "bfloat16")


def test_weights_are_loaded_in_bfloat16_only_if_all_are_stored_so(tmp_path: Path) -> None:
    model = tiny_model("bart", dtype=torch.bfloat16)
    model.save_pretrained(tmp_path / "all", max_shard_size="5KB")
    assert len(list((tmp_path / "all").glob("*.safetensors"))) > 1
    model.get_encoder().layers[0].self_attn_layer_norm.float()
    model.save_pretrained(tmp_path / "some")
    assert stored_type(str(tmp_path / "all")) == torch.bfloat16
    assert stored_type(str(tmp_path / "some")) == torch.float32
    assert stored_type(str(tmp_path)) == torch.float32
