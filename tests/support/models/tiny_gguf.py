"""Tiny GGUF files, written as llama.cpp's converter writes them, from models of Transformers.

The model that a file was written from is the reference for what is read from it.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from transformers import AutoConfig, AutoModelForCausalLM, LlamaForCausalLM
from transformers.convert_slow_tokenizer import bytes_to_unicode

START, END, END_OF_TURN = "<|im_start|>", "<|endoftext|>", "<|im_end|>"
SPECIAL = (END, START, END_OF_TURN)
MERGES = ("t h", "th e", "Ġ the", "Ġ c", "Ġ Ġ", "1 9")
TOKENS = (*SPECIAL, *bytes_to_unicode().values(), *(merge.replace(" ", "") for merge in MERGES))
CHAT = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
POSITIONS = 128
ROTARY = {"rope_type": "default", "rope_theta": 50000.0}
LLAMA3 = {"rope_type": "llama3", "factor": 32.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
LLAMA3 |= {"original_max_position_embeddings": 8192, "rope_theta": 500000.0}


def tiny_model(model_type: str, seed: int = 0, **settings: Any) -> Any:
    """A decoder-only model of Transformers with random weights, 32 wide, with grouped-query attention.

    Two layers and heads of width 8, if `settings` say nothing else.
    """
    sizes: dict[str, Any] = {
        "vocab_size": len(TOKENS),
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": POSITIONS,
        "rms_norm_eps": 1e-6,
        "bos_token_id": 1,
        "eos_token_id": 0,
        "pad_token_id": 0,
    }
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(model_type, **sizes | settings)).eval()
    for parameter in model.parameters():
        parameter.data.normal_(std=0.2)
    return model


def tiny_llama(*, tied: bool = True, seed: int = 0) -> LlamaForCausalLM:
    """A Llama with rotary base 50,000."""
    model: LlamaForCausalLM = tiny_model(
        "llama", seed, head_dim=8, rope_parameters=dict(ROTARY), tie_word_embeddings=tied
    )
    return model


def write_gguf(
    file: Path,
    model: Any = None,
    *,
    kind: gguf.GGMLQuantizationType = gguf.GGMLQuantizationType.F32,
    architecture: str = "llama",
    split: str = "smollm",
    metadata: dict[str, Any] | None = None,
    change: Callable[[dict[str, np.ndarray]], None] | None = None,
) -> Path:
    """Write a decoder-only model as a GGUF file and return the file.

    Args:
        file: where to write.
        model: default `tiny_llama()`.
        kind: how matrices are stored; norms are always float32.
        architecture: llama.cpp's name, for models other than Llama and for files that lie about it.
        split: how the tokenizer splits text, `tokenizer.ggml.pre`.
        metadata: further integers, floats and strings.
        change: called with the tensors by their GGUF names.
    """
    model = model or tiny_llama()
    config = model.config
    file.parent.mkdir(parents=True, exist_ok=True)
    writer = gguf.GGUFWriter(file, architecture)
    writer.add_name("tiny")
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    if architecture == "llama":
        writer.add_rope_dimension_count(config.head_dim)
    if "rope_theta" in config.rope_parameters:
        writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    _add_tokenizer(writer, split)
    adders: dict[type, Callable[..., None]] = {str: writer.add_string, float: writer.add_float32}
    for name, value in (metadata or {}).items():
        adders.get(type(value), writer.add_uint32)(name, value)
    tensors = {name: tensor.numpy() for name, tensor in gguf_tensors(model).items()}
    if change:
        change(tensors)
    for name, values in tensors.items():
        if values.ndim == 1 or kind == gguf.GGMLQuantizationType.F32:
            writer.add_tensor(name, values)
        else:
            writer.add_tensor(name, gguf.quantize(values, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return file


def gguf_tensors(model: Any) -> dict[str, torch.Tensor]:
    """The model's weights as llama.cpp stores them: its names, its order of rows, Gemma's norms plus one."""
    config = model.config
    family = config.model_type.removesuffix("_text")
    architecture = next(arch for arch, name in gguf.MODEL_ARCH_NAMES.items() if name == family)
    names = gguf.get_tensor_name_map(architecture, config.num_hidden_layers)
    tensors = {}
    for name, weights in model.state_dict().items():
        if name == "lm_head.weight" and config.tie_word_embeddings:
            continue
        tensor = weights
        is_query, is_key = "q_proj" in name, "k_proj" in name
        if family == "llama" and (is_query or is_key):
            heads = config.num_attention_heads if is_query else config.num_key_value_heads
            halves = tensor.reshape(heads, 2, tensor.shape[0] // heads // 2, -1)
            tensor = halves.transpose(1, 2).reshape(tensor.shape)
        elif family.startswith("gemma") and name.endswith("norm.weight"):
            tensor = tensor + 1
        tensors[names.get_name(name, (".weight", ".bias"))] = tensor.detach().contiguous()
    if config.rope_parameters.get("rope_type") == "llama3":
        tensors["rope_freqs.weight"] = torch.tensor(_llama3_factors(config.head_dim, config.rope_parameters))
    return tensors


def _llama3_factors(head_dim: int, settings: dict[str, Any]) -> list[float]:
    """How many times slower each pair of dimensions turns; Llama 3.1, as llama.cpp's converter computes it."""
    factors, length = [], settings["original_max_position_embeddings"]
    low, high, most = (settings[name] for name in ("low_freq_factor", "high_freq_factor", "factor"))
    for pair in range(head_dim // 2):
        wave = 2 * math.pi * settings["rope_theta"] ** (2 * pair / head_dim)
        smooth = (length / wave - low) / (high - low)
        factors.append(
            1.0 if wave < length / high else most if wave > length / low else 1 / ((1 - smooth) / most + smooth)
        )
    return factors


def _add_tokenizer(writer: gguf.GGUFWriter, split: str) -> None:
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(split)
    writer.add_token_list(list(TOKENS))
    writer.add_token_types([gguf.TokenType.CONTROL if token in SPECIAL else gguf.TokenType.NORMAL for token in TOKENS])
    writer.add_token_merges(list(MERGES))
    writer.add_eos_token_id(TOKENS.index(END))
    writer.add_eot_token_id(TOKENS.index(END_OF_TURN))
    writer.add_bos_token_id(TOKENS.index(START))
    writer.add_pad_token_id(TOKENS.index(END))
    writer.add_chat_template(CHAT)
