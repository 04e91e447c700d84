"""Tiny GGUF files, written as llama.cpp's converter writes them, from models of Transformers.

The model that a file was written from is the reference for what is read from it.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.convert_slow_tokenizer import bytes_to_unicode

START, END, END_OF_TURN = "<|im_start|>", "<|endoftext|>", "<|im_end|>"
SPECIAL = (END, START, END_OF_TURN)
MERGES = ("t h", "th e", "Ġ the", "Ġ c", "Ġ Ġ", "1 9")
TOKENS = (*SPECIAL, *bytes_to_unicode().values(), *(merge.replace(" ", "") for merge in MERGES))
CHAT = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
HEADS, GROUPS = 4, 2


def tiny_llama(*, tied: bool = True, seed: int = 0) -> LlamaForCausalLM:
    """A Llama with random weights: 2 layers, 32 wide, grouped-query attention, rotary base 50,000."""
    config = LlamaConfig(
        vocab_size=len(TOKENS),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=HEADS,
        num_key_value_heads=GROUPS,
        head_dim=8,
        max_position_embeddings=128,
        rms_norm_eps=1e-6,
        rope_parameters={"rope_type": "default", "rope_theta": 50000.0},
        tie_word_embeddings=tied,
        bos_token_id=1,
        eos_token_id=0,
        pad_token_id=0,
    )
    torch.manual_seed(seed)
    model = LlamaForCausalLM(config).eval()
    for parameter in model.parameters():
        parameter.data.normal_(std=0.2)
    return model


def write_gguf(
    file: Path,
    model: LlamaForCausalLM | None = None,
    *,
    kind: gguf.GGMLQuantizationType = gguf.GGMLQuantizationType.F32,
    architecture: str = "llama",
    split: str = "smollm",
    metadata: dict[str, Any] | None = None,
    change: Callable[[dict[str, np.ndarray]], None] | None = None,
) -> Path:
    """Write a Llama as a GGUF file and return the file.

    Args:
        file: where to write.
        model: default `tiny_llama()`.
        kind: how matrices are stored; norms are always float32.
        architecture: llama.cpp's name, for files that lie about it.
        split: how the tokenizer splits text, `tokenizer.ggml.pre`.
        metadata: further integers and strings.
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
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    _add_tokenizer(writer, split)
    for name, value in (metadata or {}).items():
        (writer.add_string if isinstance(value, str) else writer.add_uint32)(name, value)
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


def gguf_tensors(model: LlamaForCausalLM) -> dict[str, torch.Tensor]:
    """The model's weights under GGUF's names, rows of queries and keys in llama.cpp's order."""
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, model.config.num_hidden_layers)
    tensors = {}
    for name, tensor in model.state_dict().items():
        if name == "lm_head.weight" and model.config.tie_word_embeddings:
            continue
        heads = HEADS if "q_proj" in name else GROUPS if "k_proj" in name else None
        if heads:
            rows = tensor.shape[0] // heads // 2
            tensor = tensor.reshape(heads, 2, rows, -1).transpose(1, 2).reshape(tensor.shape)
        tensors[names.get_name(name, (".weight",))] = tensor.detach().contiguous()
    return tensors


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
