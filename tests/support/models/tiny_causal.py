"""Tiny decoder-only models with random weights, one of each family, peaked like the encoder-decoders of `tiny_models`.

All end answers with token 2 and pad with 0. Sliding windows are 4 tokens wide, shorter than the contexts of tests.

Legend: T tokens, V vocabulary, D hidden size.
"""

from __future__ import annotations

from typing import Any

import torch
import transformers
from torch import Tensor

END, PAD = 2, 0
_SIZES: dict[str, Any] = {
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 32,
    "max_position_embeddings": 64,
}
_HEADS = {"head_dim": 4}
_WINDOWS = {"sliding_window": 4, "layer_types": ["sliding_attention", "full_attention"]}
_LINEAR = {
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 2,
    "linear_key_head_dim": 4,
    "linear_value_head_dim": 4,
}

# Each family's configuration class, and what its configuration has beyond the sizes.
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "gpt2": ("GPT2", {"n_embd": 16, "n_layer": 2, "n_head": 4, "n_positions": 64}),
    "gpt-neox": ("GPTNeoX", _SIZES | {"rotary_pct": 0.5, "use_parallel_residual": True}),
    "llama": ("Llama", _SIZES),
    "mistral": ("Mistral", _SIZES | {"sliding_window": 4}),
    "qwen2": ("Qwen2", _SIZES | _WINDOWS | {"use_sliding_window": True}),
    "qwen3": ("Qwen3", _SIZES | _HEADS),
    "gemma2": ("Gemma2", _SIZES | _HEADS | _WINDOWS | {"attn_logit_softcapping": 2.0, "final_logit_softcapping": 5.0}),
    "gemma3": ("Gemma3Text", _SIZES | _HEADS | _WINDOWS),
    "smollm3": ("SmolLM3", _SIZES | {"no_rope_layers": [1, 0], "use_sliding_window": False}),
    "phi3": ("Phi3", _SIZES | {"partial_rotary_factor": 0.5}),
    "olmo2": ("Olmo2", _SIZES),
    "falcon": ("Falcon", {key: _SIZES[key] for key in ("hidden_size", "num_hidden_layers", "num_attention_heads")}),
    "bloom": ("Bloom", {"hidden_size": 16, "n_layer": 2, "n_head": 4}),
    "gpt-oss": ("GptOss", _SIZES | _HEADS | _WINDOWS | {"num_local_experts": 2, "num_experts_per_tok": 1}),
    "olmo-hybrid": ("OlmoHybrid", _SIZES | _LINEAR | {"layer_types": ["linear_attention", "full_attention"]}),
}
CAUSAL_FAMILIES = tuple(FAMILIES)


def tiny_causal(family: str, vocab_size: int = 7, seed: int = 0, dtype: torch.dtype = torch.float64) -> Any:
    """A model of `CAUSAL_FAMILIES`, in evaluation mode."""
    name, sizes = FAMILIES[family]
    config = getattr(transformers, f"{name}Config")(
        **sizes, vocab_size=vocab_size, bos_token_id=1, eos_token_id=END, pad_token_id=PAD
    )
    class_name = {"GPT2": "GPT2LMHeadModel", "Gemma3Text": "Gemma3ForCausalLM"}.get(name, f"{name}ForCausalLM")
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        # The fused kernel of experts knows no float64.
        config._experts_implementation = "eager"
        model = getattr(transformers, class_name)(config).to(dtype).eval()
        _peak(model, vocab_size)
    return model


@torch.no_grad()
def _peak(model: Any, V: int) -> None:
    """Make next-token distributions peaked and different from context to context."""
    for parameter in model.parameters():
        # The library's default of 0.02 gives uniform answers. Matrices only: layer norms keep their gain.
        if parameter.dim() >= 2 and parameter.is_floating_point():
            parameter.normal_(std=0.7 if parameter.dim() == 2 else 0.3)
    # Untie the head, or it would repeat the last token. Make it orthogonal to the mean hidden state, or the same token
    # would be likely for every passage.
    head, captured = model.get_output_embeddings(), []
    hook = head.register_forward_pre_hook(lambda _, inputs: captured.append(inputs[0].flatten(0, -2)))
    model(input_ids=torch.randint(0, V, (64, 8)))
    hook.remove()
    states_ND: Tensor = captured[0]
    mean_D = torch.nn.functional.normalize(states_ND.mean(dim=0), dim=0)
    spread = (states_ND - states_ND.mean(dim=0)).square().sum(dim=1).mean().sqrt()
    weight_VD = torch.randn_like(head.weight) * 2.5 / spread
    head.weight = torch.nn.Parameter(weight_VD - (weight_VD @ mean_D).outer(mean_D))
