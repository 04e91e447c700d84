"""LoRA adapters: what they compute, what they train, where they start, and what is refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from pydantic import ValidationError
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from rag_core.cpu.packed_linears import packed_linears
from rag_core.decoding import decode_rag_sequence, decode_rag_token
from rag_core.embeddings.text_encoder import fingerprint_of_weights
from rag_core.errors import ConfigError
from rag_core.model.adapters.lora import LoraSettings, adapted_layers, add_adapters, check_lora, is_adapter
from rag_core.model.adapters.merging import plain_weights
from rag_core.reading.likelihood import Variant, rag_nll
from rag_core.training.own_draws import own_draws
from tests.support.models.adapters import LORA, merged, with_adapters
from tests.support.models.tiny_models import FAMILIES, random_contexts, tiny_model
from tests.support.other_draws import draw_in_another_thread, torchs_own_generator_untouched

LABELS_BT = torch.tensor([[3, 4, 2], [5, 2, -100]])
PLAIN_LORA = LoraSettings(rank=2, alpha=4)


def tiny_llama() -> Any:
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=40,
            hidden_size=16,
            intermediate_size=32,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            bos_token_id=1,
            eos_token_id=2,
        )
    ).eval()


def tiny_gpt2() -> Any:
    sizes = {"vocab_size": 40, "n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 32}
    return GPT2LMHeadModel(GPT2Config(**sizes, bos_token_id=1, eos_token_id=2)).eval()


@pytest.mark.parametrize(("family", "variant"), [("bart", "sequence"), ("t5", "token"), ("bert2bert", "sequence")])
def test_the_likelihood_is_that_of_the_merged_weights(family: str, variant: Variant) -> None:
    contexts = random_contexts(2, 3, 6, seed=0, dtype=torch.float32)
    base = tiny_model(family, dtype=torch.float32)
    without = rag_nll(base, *contexts, LABELS_BT, variant=variant)
    adapted = with_adapters(tiny_model(family, dtype=torch.float32))
    with_them = rag_nll(adapted, *contexts, LABELS_BT, variant=variant)
    torch.testing.assert_close(
        with_them, rag_nll(merged(adapted), *contexts, LABELS_BT, variant=variant), rtol=1e-4, atol=1e-4
    )
    assert not torch.allclose(with_them, without, rtol=1e-2)


@pytest.mark.parametrize("family", ["bart", "t5"])
def test_decoding_gives_the_answers_of_the_merged_weights(family: str) -> None:
    contexts = random_contexts(2, 3, 6, seed=0, dtype=torch.float32)
    adapted = with_adapters(tiny_model(family, dtype=torch.float32), std=0.15)
    options: dict[str, Any] = {"num_beams": 3, "max_new_tokens": 4, "num_return_sequences": 2}
    for decode in (decode_rag_sequence, decode_rag_token):
        expected = decode(merged(adapted), *contexts, **options)
        actual = decode(adapted, *contexts, **options)
        assert [[h.token_ids for h in row] for row in actual] == [[h.token_ids for h in row] for row in expected]
        for row, others in zip(actual, expected, strict=True):
            assert [h.log_prob for h in row] == pytest.approx([h.log_prob for h in others], abs=1e-3)


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_packed_weights_give_what_the_layers_give(precision: str) -> None:
    model = with_adapters(tiny_model("bart", dtype=torch.float32))
    ids_BS = torch.tensor([[3, 4, 5, 2], [6, 5, 4, 3]])
    with torch.inference_mode(), torch.autocast("cpu", dtype=torch.bfloat16, enabled=precision == "bfloat16"):
        plain = model(input_ids=ids_BS, decoder_input_ids=ids_BS).logits
        with packed_linears(model):
            packed = model(input_ids=ids_BS, decoder_input_ids=ids_BS).logits
    tolerance = 2e-2 if precision == "bfloat16" else 1e-5
    torch.testing.assert_close(packed, plain, rtol=tolerance, atol=tolerance * float(plain.abs().max()))


@pytest.mark.parametrize("build", [tiny_llama, tiny_gpt2, lambda: tiny_model("t5", dtype=torch.float32)])
def test_merging_changes_the_logits_by_rounding_alone_and_the_generator_not_at_all(build: Any) -> None:
    adapted, ids_BS = with_adapters(build()), torch.tensor([[3, 4, 5, 2]])
    inputs = {"input_ids": ids_BS} | ({"decoder_input_ids": ids_BS} if adapted.config.is_encoder_decoder else {})
    with torch.inference_mode():
        expected, base = adapted(**inputs).logits, build()(**inputs).logits
        plain = merged(adapted)(**inputs).logits
        weights, others = plain_weights(adapted), merged(adapted).state_dict()
        assert torch.equal(adapted(**inputs).logits, expected)
    torch.testing.assert_close(weights, others)
    torch.testing.assert_close(plain, expected, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(plain, base, rtol=1e-2)


@pytest.mark.parametrize("family", FAMILIES)
def test_fresh_adapters_change_nothing_and_alone_are_trainable(family: str) -> None:
    contexts = random_contexts(2, 3, 6, seed=0, dtype=torch.float32)
    generator = tiny_model(family, dtype=torch.float32)
    before = rag_nll(generator, *contexts, LABELS_BT, variant="token")
    state = {name: weight.clone() for name, weight in generator.state_dict().items()}
    add_adapters(generator, PLAIN_LORA, "/base")
    after = rag_nll(generator, *contexts, LABELS_BT, variant="token")
    torch.testing.assert_close(before, after)
    after.sum().backward()
    trained = {name for name, weight in generator.named_parameters() if weight.requires_grad}
    assert trained == {name for name, _ in generator.named_parameters() if is_adapter(name)}
    assert len(trained) == 2 * len(adapted_layers(tiny_model(family), None))
    assert {name for name, weight in generator.named_parameters() if weight.grad is not None} == trained
    plain = plain_weights(generator)
    assert plain.keys() == state.keys()
    assert all(torch.equal(plain[name], state[name]) for name in state)


def test_fresh_adapters_follow_from_the_seed_alone() -> None:
    prints = []
    for key in ([1], [1], [2]):
        draw_in_another_thread()
        generator = tiny_model("bart", dtype=torch.float32)
        with own_draws(key, torch.device("cpu")), torchs_own_generator_untouched():
            add_adapters(generator, PLAIN_LORA, "/base")
        prints.append(fingerprint_of_weights(generator))
    assert prints[0] == prints[1] != prints[2]


def test_the_dropout_of_adapters_is_drawn_by_own_draws() -> None:
    generator = with_adapters(tiny_model("bart", dtype=torch.float32), LORA.model_copy(update={"dropout": 0.5}))
    add_adapters(generator, LORA.model_copy(update={"dropout": 0.5}), "/base")
    generator.train()
    contexts = random_contexts(2, 3, 6, seed=0, dtype=torch.float32)
    losses = []
    for key in ([1], [1], [2]):
        with own_draws(key, torch.device("cpu")), torchs_own_generator_untouched():
            losses.append(rag_nll(generator, *contexts, LABELS_BT, variant="token"))
    assert torch.equal(losses[0], losses[1])
    assert not torch.equal(losses[0], losses[2])


def test_default_targets_are_those_of_peft_or_the_usual_ones() -> None:
    def ends(generator: Any) -> set[str]:
        return {name.rpartition(".")[2] for name in adapted_layers(generator, None)}

    assert ends(tiny_llama()) == ends(tiny_model("bart")) == ends(tiny_model("pegasus")) == {"q_proj", "v_proj"}
    assert ends(tiny_model("t5")) == {"q", "v"}
    assert ends(tiny_model("bert2bert")) == {"query", "value"}
    assert ends(tiny_gpt2()) == {"c_attn"}
    assert "lm_head" not in adapted_layers(tiny_llama(), "all-linear")


@pytest.mark.parametrize(
    ("targets", "words"),
    [
        (["q_prj"], ["'q_prj' matches no layer", "LlamaForCausalLM", "q_proj, k_proj, v_proj"]),
        (["q_proj", "norm"], ["'norm' matches model.norm, a LlamaRMSNorm", "linear layers other than the head"]),
        (["embed_tokens"], ["a Embedding", "not to embeddings"]),
        (["lm_head"], ["'lm_head' matches lm_head", "other than the head"]),
    ],
)
def test_targets_that_match_no_linear_layer_are_refused(targets: list[str], words: list[str]) -> None:
    with pytest.raises(ConfigError) as caught:
        check_lora(tiny_llama(), LoraSettings(targets=targets), 1e-4)
    assert all(word in str(caught.value) for word in [*words, "train.lora.targets"]), str(caught.value)


def test_an_architecture_without_usual_targets_needs_some_named() -> None:
    model = tiny_gpt2()
    model.config.model_type = "unheard-of"
    with pytest.raises(ConfigError, match=r"peft knows no usual LoRA targets.*unheard-of.*c_attn"):
        check_lora(model, LoraSettings(), 1e-4)
    check_lora(model, LoraSettings(targets=["attn.c_attn"]), 1e-4)


@pytest.mark.parametrize(
    "wrong", [{"rank": 0}, {"alpha": 0}, {"dropout": 1.0}, {"targets": []}, {"targets": [""]}, {"targets": "some"}]
)
def test_settings_out_of_range_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        LoraSettings.model_validate(wrong)


def test_rounded_weights_are_not_trained() -> None:
    check_lora(tiny_llama(), None, 1e-4)
    check_lora(tiny_llama(), LoraSettings(), 1e-4, "bfloat16")
    with pytest.raises(ConfigError, match=r"generator_dtype is bfloat16, but train\.lora is not set"):
        check_lora(tiny_llama(), None, 1e-4, "bfloat16")


def test_adapters_that_would_never_learn_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"train\.lora is set, but train\.rates\.generator is 0"):
        check_lora(tiny_llama(), LoraSettings(), 0.0)


def test_a_generator_with_adapters_is_trained_further_with_equal_settings_only() -> None:
    settings = LoraSettings(rank=2, alpha=4, targets=["q_proj", "v_proj"])
    adapted = with_adapters(tiny_llama(), settings)
    before = fingerprint_of_weights(adapted)
    same = [settings, settings.model_copy(update={"targets": None}), settings.model_copy(update={"dropout": 0.3})]
    for equal in same:
        check_lora(adapted, equal, 1e-4)
        add_adapters(adapted, equal, "/elsewhere")
        assert fingerprint_of_weights(adapted) == before
    check_lora(adapted, None, 0.0)  # frozen as it is
    for other in ({"rank": 3}, {"alpha": 5.0}, {"targets": ["q_proj"]}, {"targets": "all-linear"}):
        with pytest.raises(ConfigError, match=r"has LoRA adapters already \(rank 2, alpha 4"):
            check_lora(adapted, settings.model_copy(update=other), 1e-4)
    with pytest.raises(ConfigError, match=r"has LoRA adapters.*but train\.lora is not set.*rag export"):
        check_lora(adapted, None, 1e-4)
