"""Complete a configuration that Transformers has read from a GGUF file.

Transformers takes sizes from the file, but for some settings it keeps its default, whatever the file says: Qwen3's width
of a head, Phi-3's sliding window, Gemma's scale of the scores, T5's activation function, stretched rotary positions.
The model would compute something else. What the file says is put in here, and a file that cannot be completed is
refused.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from rag_core.errors import ConfigError
from rag_core.pretrained.gguf.file import GgufFile

# Settings of GGUF, and the attribute of a configuration that must have the same value if it has the attribute at all.
SAME = {
    "attention.key_length": "head_dim",
    "attention.sliding_window": "sliding_window",
    "attn_logit_softcapping": "attn_logit_softcapping",
    "final_logit_softcapping": "final_logit_softcapping",
}
# Architectures whose `attention.key_length` is a width of some heads only.
MIXED_HEADS = ("gemma4",)
# Models of 27 billion weights scale scores by the width of a model's share for a head, all others by that of a head.
# A GGUF file does not say so; llama.cpp goes by the number of layers, too.
LAYERS_OF_27B = {"gemma2": 46, "gemma3": 62}
# One factor for each pair of dimensions: how much slower it turns. Llama 3.1 and newer have it.
FACTORS = "rope_freqs.weight"
# The settings of Llama 3.1, 3.2 and 3.3, besides the largest factor, which is in the file.
LLAMA3 = {"rope_type": "llama3", "low_freq_factor": 1.0, "high_freq_factor": 4.0}
LLAMA3 |= {"original_max_position_embeddings": 8192}
LONG_FACTORS = ("rope_factors_long.weight", "rope_factors_short.weight")


def complete(config: Any, source: GgufFile) -> None:
    """Put settings of the file into the configuration that Transformers left out.

    Raises:
        ConfigError: the file stretches positions, or limits attention, in a way that the configuration cannot say.
    """
    for name, attribute in SAME.items():
        value = source.setting(name)
        if value is None or source.architecture in MIXED_HEADS:
            continue
        if hasattr(config, attribute):
            setattr(config, attribute, value)
        elif name == "attention.sliding_window" and value < source.setting("context_length", math.inf):
            raise _left_out(source, f"limits attention to {value} tokens")
    if source.architecture in LAYERS_OF_27B:
        is_27b = config.num_hidden_layers == LAYERS_OF_27B[source.architecture]
        config.query_pre_attn_scalar = config.hidden_size // config.num_attention_heads if is_27b else config.head_dim
    if config.model_type in ("t5", "umt5"):
        # Only T5's with gates can be read from GGUF, and all of them have this function.
        config.feed_forward_proj, config.dense_act_fn, config.is_gated_act = "gated-gelu", "gelu_new", True
    _stretch_positions(config, source)


def _stretch_positions(config: Any, source: GgufFile) -> None:
    way = source.setting("rope.scaling.type", "none")
    factors = next((tensor.data for tensor in source.reader.tensors if tensor.name == FACTORS), None)
    if any(name in source.tensors for name in LONG_FACTORS):
        raise _left_out(source, f"stretches its rotary positions ({LONG_FACTORS[0]})")
    if factors is not None:
        theta = float(config.rope_parameters["rope_theta"])
        config.rope_parameters = LLAMA3 | {"factor": float(factors.max()), "rope_theta": theta}
        slower, _ = ROPE_INIT_FUNCTIONS["llama3"](config, torch.device("cpu"))
        pairs = torch.arange(0, 2 * len(slower), 2) / (2 * len(slower))
        expected = theta**-pairs / slower
        if len(slower) != len(factors) or not torch.allclose(expected, torch.tensor(factors), rtol=1e-4):
            raise _left_out(source, f"stretches its rotary positions in an unknown way ({FACTORS})")
    elif way == "linear":
        stretched = {"rope_type": "linear", "factor": float(source.setting("rope.scaling.factor", 1.0))}
        everywhere = config.rope_parameters
        # Gemma 3 stretches the positions of its layers without a window.
        part = everywhere.get("full_attention", everywhere)
        part |= stretched
    elif way != "none" and source.architecture != "gpt-oss":
        raise _left_out(source, f"stretches its rotary positions ({way})")


def _left_out(source: GgufFile, what: str) -> ConfigError:
    return ConfigError(
        f"{source.name} {what}, which cannot be read from GGUF, so the model would compute something else. Give the "
        "model's Transformers folder or hub name."
    )
