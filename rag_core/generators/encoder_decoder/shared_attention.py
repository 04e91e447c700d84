"""Attention for hypotheses that share a context: each context stores its keys and values once, not once per hypothesis.

Cross-attention: the hypotheses of a context are folded into the query's length, and read one set of keys and values.
Self-attention: every token that any hypothesis of a context ever had keeps its slot in that context's cache. A mask
limits each hypothesis to its own past. So re-ordering hypotheses moves a small mask, and no cache. The price is
attention over the slots of dead hypotheses, V and D times smaller than the rest of a step.

It works for every model whose attention goes through Transformers' `ALL_ATTENTION_FUNCTIONS`. This module registers a
function there, and its cache passes the slots to that function. The model makes no masks, as the function has its own.

Legend: N contexts, S context tokens, W hypotheses of each context, R rows (N·W), L slots, P prompt tokens, h heads,
d dimensions of a head.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface, EncoderDecoderCache
from transformers.cache_utils import Cache, CacheLayerMixin

from rag_core.generators.slots import SlotLayer, with_own_slot
from rag_core.pretrained.attention_choice import attention_chosen, can_choose_attention

NAME = "rag_shared_contexts"
_active: ContextVar[SharedCache] = ContextVar("the cache of the decoder pass that is running")


class SharedCache:
    """Keys and values of contexts and of their hypotheses' tokens.

    Args:
        prompt: Transformers' EncoderDecoderCache after a pass over the prompt, one row per context; it is not changed.
        mask_NS: 1 for a context's real tokens, 0 for padding.
    """

    def __init__(self, prompt: Any, mask_NS: Tensor) -> None:
        self.layers = [SlotLayer(layer.keys, layer.values) for layer in prompt.self_attention_cache.layers]
        # Contiguous, as every step reads them in this order.
        self._cross = [
            (layer.keys.contiguous(), layer.values.contiguous()) for layer in prompt.cross_attention_cache.layers
        ]
        self.cross_mask_N11S = mask_NS[:, None, None].bool()
        P = self.layers[0].slots
        self.positions_L = torch.arange(P, device=mask_NS.device)
        self.self_mask_N1WL = self.cross_mask_N11S.new_ones(len(mask_NS), 1, 1, P)

    def select(self, contexts_n: Tensor) -> None:
        """Keep some contexts only."""
        for layer in self.layers:
            layer.select(contexts_n)
        self._cross = [(keys[contexts_n], values[contexts_n]) for keys, values in self._cross]
        self.cross_mask_N11S = self.cross_mask_N11S[contexts_n]
        self.self_mask_N1WL = self.self_mask_N1WL[contexts_n]

    def branch(self, parents_NW: Tensor) -> EncoderDecoderCache:
        """Return the cache for one more token of W hypotheses; each continues its parent among the previous ones."""
        W = parents_NW.shape[1]
        self.self_mask_N1WL = with_own_slot(self.self_mask_N1WL.squeeze(1), parents_NW).unsqueeze(1)
        self.positions_L = torch.cat((self.positions_L, self.positions_L[-1:].expand(W) + 1))
        return EncoderDecoderCache(
            Cache(layers=list(self.layers)), Cache(layers=[_Fixed(*pair) for pair in self._cross])
        )

    def mask_of(self, module: Any, keys_NhLd: Tensor, bias_1h1L: Tensor | None, dtype: torch.dtype) -> Tensor:
        """The additive mask: 0, or the model's position bias if it has one, where a query may look; −inf elsewhere."""
        is_self = any(keys_NhLd is layer.handed_out for layer in self.layers)
        allowed = self.self_mask_N1WL if is_self else self.cross_mask_N11S
        if bias_1h1L is None:
            return torch.zeros((), dtype=dtype, device=allowed.device).masked_fill(~allowed, float("-inf"))
        # The model gives a bias per position; all slots at a position share it.
        bias = bias_1h1L[..., self.positions_L] if is_self else bias_1h1L
        return bias.to(dtype).masked_fill(~allowed, float("-inf"))

    @contextmanager
    def attached(self, decoder: Any) -> Iterator[None]:
        """Inside, the decoder's attention reads this cache."""
        token = _active.set(self)
        try:
            with attention_chosen([decoder.config], NAME):
                yield
        finally:
            _active.reset(token)


def can_share(decoder: Any) -> bool:
    """Whether the decoder's attention can be replaced. LED's, for example, cannot."""
    return can_choose_attention(decoder)


class _Fixed(CacheLayerMixin):
    """One layer's keys and values of the contexts."""

    def __init__(self, keys_NhSd: Tensor, values_NhSd: Tensor) -> None:
        super().__init__()
        self.keys, self.values = keys_NhSd, values_NhSd
        self.is_initialized = True

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Do nothing."""

    def update(self, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        # Transformers requires this method; a decoder that calls it would read other contexts than its own.
        raise RuntimeError("the generator's decoder tried to change the keys and values of contexts, which are fixed")

    def get_seq_length(self) -> int:
        return int(self.keys.shape[2])  # type: ignore[union-attr]

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.get_seq_length(), 0

    def get_max_length(self) -> int:
        return -1


def _attend(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    position_bias: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attention of R rows of one token each to the keys of N contexts; Transformers defines the arguments."""
    R, h, _, d = query.shape
    N = len(key)
    query_NhWd = query.reshape(N, R // N, h, d).transpose(1, 2)
    mask = _active.get().mask_of(module, key, position_bias, query.dtype)
    # Two products and a softmax: for so few queries PyTorch's fused attention is not faster on a CPU (40 contexts of
    # 128 tokens, 8 heads, 4 hypotheses: float32 2.2 ms against 2.1, bfloat16 0.8 against 1.2).
    scaled_NhWd = query_NhWd * (d**-0.5 if scaling is None else scaling)
    weights_NhWL = torch.softmax(scaled_NhWd @ key.transpose(2, 3) + mask, dim=3)
    read_NhWd = weights_NhWL.to(value.dtype) @ value
    return read_NhWd.transpose(1, 2).reshape(R, 1, h, -1), None


AttentionInterface.register(NAME, _attend)
