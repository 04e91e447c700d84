"""Families of generators: read from GGUF, a model computes to the bit what it computed before it was written.

Transformers leaves settings of most families out (`rag_core/pretrained/gguf/configuration.py`).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf
import pytest
import torch
from transformers import AutoModelForCausalLM, T5Config, T5ForConditionalGeneration

from rag_core.model.reader import load_generator
from rag_core.pretrained.model_source import resolve_model_source
from tests.support.models.tiny_gguf import LLAMA3, ROTARY, tiny_model, write_gguf

WINDOW = {"sliding_window": 8}
GEMMA: dict[str, Any] = {"head_dim": 16, "query_pre_attn_scalar": 16, **WINDOW}
# Model type, GGUF's architecture, settings of the model, and how GGUF says them.
FAMILIES: dict[str, tuple[str, str, dict[str, Any], dict[str, Any]]] = {
    "llama": ("llama", "llama", {"head_dim": 8, "rope_parameters": ROTARY}, {}),
    "llama 3.2": ("llama", "llama", {"head_dim": 16, "rope_parameters": LLAMA3}, {}),
    "llama, linear": (
        "llama",
        "llama",
        {"head_dim": 8, "rope_parameters": ROTARY | {"rope_type": "linear", "factor": 4.0}},
        {"llama.rope.scaling.type": "linear", "llama.rope.scaling.factor": 4.0},
    ),
    "qwen2": ("qwen2", "qwen2", {"rope_parameters": ROTARY}, {}),
    "qwen3": ("qwen3", "qwen3", {"head_dim": 16, "rope_parameters": ROTARY}, {"qwen3.attention.key_length": 16}),
    "gemma2": (
        "gemma2",
        "gemma2",
        GEMMA | {"attn_logit_softcapping": 20.0, "final_logit_softcapping": 10.0},
        {
            "gemma2.attention.key_length": 16,
            "gemma2.attention.sliding_window": 8,
            "gemma2.attn_logit_softcapping": 20.0,
            "gemma2.final_logit_softcapping": 10.0,
        },
    ),
    "gemma2 27b": (
        "gemma2",
        "gemma2",
        GEMMA | {"num_hidden_layers": 46, "query_pre_attn_scalar": 8},
        {"gemma2.attention.key_length": 16, "gemma2.attention.sliding_window": 8},
    ),
    "gemma3": (
        "gemma3_text",
        "gemma3",
        GEMMA | {"num_hidden_layers": 6},
        {
            "gemma3.attention.key_length": 16,
            "gemma3.attention.sliding_window": 8,
            "gemma3.rope.freq_base": 1000000.0,
        },
    ),
    "phi3": (
        "phi3",
        "phi3",
        WINDOW | {"rope_parameters": ROTARY},
        {"phi3.attention.sliding_window": 8, "phi3.rope.dimension_count": 8},
    ),
}


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAG_CACHE", str(tmp_path / "cache"))


@pytest.mark.parametrize("family", FAMILIES)
def test_the_model_computes_what_it_computed_before_it_was_written(family: str, tmp_path: Path) -> None:
    model_type, architecture, settings, metadata = FAMILIES[family]
    original = tiny_model(model_type, **settings)
    file = write_gguf(tmp_path / "model.gguf", original, architecture=architecture, metadata=metadata)
    model = AutoModelForCausalLM.from_pretrained(resolve_model_source(file))
    assert type(model) is type(original)
    tokens = torch.arange(40)[None]  # longer than the windows
    # GGUF keeps epsilon in float32.
    with torch.no_grad():
        assert torch.equal(model(tokens).logits, original(tokens).logits)


def test_the_settings_are_those_that_matter_here() -> None:
    """Each family's model computes something else without them; otherwise the test above would show nothing."""
    tokens = torch.arange(40)[None]
    for family in ("llama 3.2", "llama, linear", "gemma2", "gemma2 27b", "gemma3", "phi3"):
        model_type, _, settings, _ = FAMILIES[family]
        plain = {"head_dim", "num_hidden_layers"}
        other = tiny_model(model_type, **{name: value for name, value in settings.items() if name in plain})
        with torch.no_grad():
            assert not torch.allclose(other(tokens).logits, tiny_model(model_type, **settings)(tokens).logits), family


def test_gemma_3_with_stretched_positions(tmp_path: Path) -> None:
    base = tiny_model("gemma3_text", **GEMMA, num_hidden_layers=6)
    rotary = {name: dict(part) for name, part in base.config.rope_parameters.items()}
    rotary["full_attention"] |= {"rope_type": "linear", "factor": 8.0}
    original = tiny_model("gemma3_text", **GEMMA, num_hidden_layers=6, rope_parameters=rotary)
    metadata = FAMILIES["gemma3"][3] | {"gemma3.rope.scaling.type": "linear", "gemma3.rope.scaling.factor": 8.0}
    file = write_gguf(tmp_path / "model.gguf", original, architecture="gemma3", metadata=metadata)
    model = AutoModelForCausalLM.from_pretrained(resolve_model_source(file))
    tokens = torch.arange(40)[None]
    with torch.no_grad():
        assert torch.equal(model(tokens).logits, original(tokens).logits)
        assert not torch.equal(original(tokens).logits, base(tokens).logits)


T5_TOKENS = ("<pad>", "</s>", "<unk>", "▁", "▁the", "▁Paris", "a", "b", "c")


def test_a_t5_is_a_generator_too(tmp_path: Path) -> None:
    config = T5Config(
        vocab_size=len(T5_TOKENS),
        d_model=32,
        d_kv=8,
        d_ff=64,
        num_layers=2,
        num_decoder_layers=2,
        num_heads=4,
        feed_forward_proj="gated-gelu",
        tie_word_embeddings=False,
        pad_token_id=0,
        eos_token_id=1,
        decoder_start_token_id=0,
    )
    torch.manual_seed(0)
    original = T5ForConditionalGeneration(config).eval()
    for parameter in original.parameters():
        parameter.data.normal_(std=0.2)
    model, tokenizer = load_generator(_write_t5(tmp_path / "model.gguf", original))
    inputs = {"input_ids": torch.tensor([[4, 5, 7, 1]]), "decoder_input_ids": torch.tensor([[0, 4, 6]])}
    with torch.no_grad():
        assert torch.equal(model(**inputs).logits, original(**inputs).logits)
    assert tokenizer("the Paris b")["input_ids"] == [4, 5, 3, 7, 1]


def _write_t5(file: Path, model: T5ForConditionalGeneration) -> Path:
    config, writer = model.config, gguf.GGUFWriter(file, "t5")
    writer.add_name("T5")
    writer.add_context_length(512)
    writer.add_embedding_length(config.d_model)
    writer.add_feed_forward_length(config.d_ff)
    writer.add_block_count(config.num_layers)
    writer.add_head_count(config.num_heads)
    writer.add_key_length(config.d_kv)
    writer.add_layer_norm_eps(config.layer_norm_epsilon)
    writer.add_relative_attn_buckets_count(config.relative_attention_num_buckets)
    writer.add_decoder_start_token_id(0)
    writer.add_tokenizer_model("t5")
    writer.add_token_list(list(T5_TOKENS))
    writer.add_token_scores([0.0, 0.0, 0.0, -2.0, -3.0, -3.5, -5.0, -5.1, -5.2])
    writer.add_token_types([3, 3, 2, 1, 1, 1, 1, 1, 1])
    writer.add_eos_token_id(1)
    writer.add_unk_token_id(2)
    writer.add_pad_token_id(0)
    writer.add_add_eos_token(True)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.T5, config.num_layers)
    for name, tensor in model.state_dict().items():
        if "embed_tokens" not in name:
            writer.add_tensor(str(names.get_name(name, (".weight",))), tensor.contiguous().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return file
