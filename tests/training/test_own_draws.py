"""Other threads cannot disturb `own_draws`; apart from that, the draws equal PyTorch's."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional

from rag_core.embeddings.text_encoder import fingerprint_of_weights
from rag_core.training.own_draws import own_draws, recomputes_activations
from rag_core.training.pretraining import PretrainConfig, build_generator
from tests.support.models.tiny_models import ALL_FAMILIES, random_contexts, tiny_model
from tests.support.other_draws import draw_in_another_thread, torchs_own_generator_untouched
from tests.support.small_corpus import make_encoder

CPU = torch.device("cpu")
X_BF = torch.linspace(-1, 1, 24).reshape(4, 6)
Q_BHSF, K_BHSF, V_BHSF = torch.randn(3, 2, 2, 5, 4, generator=torch.Generator().manual_seed(0)).unbind()
SEEN_SS = torch.ones(5, 5, dtype=torch.bool).tril()

DRAWS: dict[str, Callable[[], torch.Tensor]] = {
    "a dropout layer": lambda: nn.Dropout(0.4)(X_BF),
    "functional.dropout": lambda: functional.dropout(X_BF, 0.4, True),
    "functional.dropout in bfloat16": lambda: functional.dropout(X_BF.bfloat16(), p=0.4),
    "functional.dropout in place": lambda: functional.dropout(X_BF.clone(), 0.4, training=True, inplace=True),
    "torch.dropout": lambda: torch.dropout(X_BF, 0.4, True),
    "torch.dropout in place": lambda: torch.dropout_(X_BF.clone(), 0.4, train=True),
    "attention": lambda: functional.scaled_dot_product_attention(Q_BHSF, K_BHSF, V_BHSF, dropout_p=0.4),
    "causal attention": lambda: functional.scaled_dot_product_attention(
        Q_BHSF, K_BHSF, V_BHSF, dropout_p=0.4, is_causal=True, scale=0.3
    ),
    "attention with a mask": lambda: functional.scaled_dot_product_attention(Q_BHSF, K_BHSF, V_BHSF, SEEN_SS, 0.4),
    "attention with a bias": lambda: functional.scaled_dot_product_attention(
        Q_BHSF, K_BHSF, V_BHSF, attn_mask=SEEN_SS * 2.0, dropout_p=0.4
    ),
    "attention with fewer keys than queries": lambda: functional.scaled_dot_product_attention(
        Q_BHSF, K_BHSF[:, :1], V_BHSF[:, :1], dropout_p=0.4, enable_gqa=True
    ),
    "a layer dropped": lambda: torch.rand([]),
    "noise": lambda: torch.randn_like(X_BF),
    "fresh weights": lambda: nn.Linear(6, 3).weight.detach(),
    "fresh embeddings": lambda: nn.Embedding(5, 3).weight.detach(),
    "weights filled in place": lambda: nn.init.trunc_normal_(torch.empty(4, 4)),
}


@contextmanager
def seeded(number: int) -> Iterator[None]:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(number)
        yield


def number_of(*key: int) -> int:
    return int(np.random.SeedSequence(key).generate_state(1, np.uint64)[0])


@pytest.mark.parametrize("name", DRAWS)
def test_a_draw_follows_from_its_key_whatever_another_thread_draws_meanwhile(name: str) -> None:
    draw, drawn = DRAWS[name], []
    for key in ([7, 1], [7, 1], [7, 2]):
        with own_draws(key, CPU):
            draw()
            draw_in_another_thread(times=len(drawn) + 1)
            drawn.append(draw())
    assert torch.equal(drawn[0], drawn[1])
    assert not torch.equal(drawn[0], drawn[2])


@pytest.mark.parametrize("name", DRAWS)
def test_a_draw_is_the_one_that_pytorch_makes_of_the_same_seed(name: str) -> None:
    with own_draws([7, 1], CPU):
        actual = DRAWS[name]()
    with seeded(number_of(7, 1)):
        expected = DRAWS[name]()
    torch.testing.assert_close(actual, expected)
    assert actual.dtype == expected.dtype


def test_functions_that_draw_nothing_do_as_before() -> None:
    with own_draws([1], CPU):
        assert torch.equal(functional.dropout(X_BF, 0.4, training=False), X_BF)
        assert torch.equal(nn.Dropout(0.4).eval()(X_BF), X_BF)
        assert torch.equal(functional.dropout(X_BF, 0.0), X_BF)
        assert not functional.dropout(X_BF, 1.0).any()
        plain = functional.scaled_dot_product_attention(Q_BHSF, K_BHSF, V_BHSF, is_causal=True)
        own = torch.Generator().manual_seed(3)
        drawn = torch.rand(3, generator=own)
    assert torch.equal(plain, functional.scaled_dot_product_attention(Q_BHSF, K_BHSF, V_BHSF, is_causal=True))
    assert torch.equal(drawn, torch.rand(3, generator=torch.Generator().manual_seed(3))), "a caller's own generator"


def test_torchs_own_generator_is_restored() -> None:
    with torchs_own_generator_untouched(), contextlib.suppress(ZeroDivisionError), own_draws([1], CPU):
        torch.rand(3), functional.alpha_dropout(X_BF, 0.4, training=True)
        1 / 0  # noqa: B018


def _drop_all(model: nn.Module) -> None:
    """Dropout wherever the model's code has it, whole layers too."""
    for module in model.modules():
        for name in ("p", "dropout", "attention_dropout", "activation_dropout", "dropout_rate", "layerdrop"):
            if isinstance(getattr(module, name, None), float):
                setattr(module, name, 0.3)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("family", ALL_FAMILIES)
def test_a_model_in_training_draws_nothing_from_torchs_own_generator(family: str, attention: str) -> None:
    if family == "led" and attention == "sdpa":
        pytest.skip("LED has an attention of its own")
    generator = tiny_model(family, dtype=torch.float32).train()
    generator.set_attn_implementation(attention)
    _drop_all(generator)
    ids_BKS, mask_BKS, _ = random_contexts(3, 1, 6, seed=0, pad=generator.config.pad_token_id)
    ids_BS, mask_BS = ids_BKS[:, 0], mask_BKS[:, 0]
    passes = []
    for key in ([1], [1], [2]):
        with own_draws(key, CPU), torchs_own_generator_untouched():
            output = generator(input_ids=ids_BS, attention_mask=mask_BS, labels=ids_BS)
            output.loss.backward()
        passes.append(output.logits.detach())
    assert torch.equal(passes[0], passes[1])
    assert not torch.equal(passes[0], passes[2])


def test_a_generator_made_of_an_encoder_draws_its_fresh_weights_from_ours(tmp_path: Path) -> None:
    encoder = make_encoder(tmp_path)
    config = PretrainConfig(encoder=str(encoder), encoder_layers=2, decoder_layers=1)
    prints = []
    for key in ([1], [1], [2]):
        draw_in_another_thread()
        with own_draws(key, CPU), torchs_own_generator_untouched():
            prints.append(fingerprint_of_weights(build_generator(config)[0]))
    assert prints[0] == prints[1] != prints[2]


def test_draws_that_take_no_generator_do_not_depend_on_draws_before() -> None:
    drawn = []
    for _ in range(2):
        draw_in_another_thread()
        with own_draws([5], CPU):
            drawn.append(functional.alpha_dropout(X_BF, 0.4, training=True))
    assert torch.equal(*drawn)


def test_gradients_are_those_of_the_masks_that_were_drawn() -> None:
    grads = []
    for block in (lambda: own_draws([7, 1], CPU), lambda: seeded(number_of(7, 1))):
        q, k, v = (states.clone().requires_grad_() for states in (Q_BHSF, K_BHSF, V_BHSF))
        with block():
            functional.dropout(
                functional.scaled_dot_product_attention(q, k, v, dropout_p=0.4), 0.2
            ).square().sum().backward()
        grads.append((q.grad, k.grad, v.grad))
    torch.testing.assert_close(*grads)


def test_a_model_that_computes_its_layers_again_for_the_gradient_gets_the_same_masks() -> None:
    """With another generator the second pass would draw other masks, and the gradient would be wrong."""
    from torch.utils.checkpoint import checkpoint

    layer = nn.Dropout(0.5)
    assert not recomputes_activations(layer)
    layer.gradient_checkpointing = True
    assert recomputes_activations(nn.Sequential(layer))
    weight = torch.ones(40, requires_grad=True)
    with own_draws([3], CPU, recomputes=True):
        output = checkpoint(layer, weight, use_reentrant=False)
        output.sum().backward()
    assert torch.equal(weight.grad, output.detach())
