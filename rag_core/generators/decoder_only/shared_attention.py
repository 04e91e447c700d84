"""Attention for hypotheses that continue one context: its keys and values are stored once, not once per hypothesis.

The hypotheses of a context, and the query heads that share a key head, are folded into the query's length. The tokens
that hypotheses have written are slots (`slots.py`) behind the context's. Models put the position into keys before they
store them, so a slot's place does not matter; where a layer sees a window only, the mask counts distances.

It works for every model whose attention goes through Transformers' `ALL_ATTENTION_FUNCTIONS`. This module registers a
function there, and its cache passes the slots to that function. The model makes no masks, as the function has its own.

Legend: N contexts, S context tokens, W hypotheses of each context, R rows (N·W), L slots (S and one per hypothesis and
step), h heads of keys, g query heads of each of them, d dimensions of a head.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface
from transformers.cache_utils import Cache, DynamicLayer

from rag_core.generators.slots import SlotLayer, with_own_slot
from rag_core.pretrained.attention_choice import attention_chosen, can_choose_attention

NAME = "rag_shared_prompts"
# What models pass to attention and what does not change its result here: positions are in the keys already.
_WITHOUT_EFFECT = {"position_ids", "cache_position", "use_cache", "output_attentions", "is_causal", "dropout"}
_active: ContextVar[SharedContexts] = ContextVar("the contexts of the decoder pass that is running")


class NotShareableError(Exception):
    """A layer's attention needs something that shared contexts do not have; the contexts must be copied."""


class SharedContexts:
    """Keys and values of contexts and of their hypotheses' tokens.

    Args:
        layers: keys (N, h, S + room, d) and values of each layer. The first S are not changed; steps write into the
            room behind them.
        S: tokens of the longest context.
        lengths_N: int64, real tokens of each context; its keys behind them are ignored.
    """

    def __init__(self, layers: Sequence[tuple[Tensor, Tensor]], S: int, lengths_N: Tensor) -> None:
        self.layers = [SlotLayer(keys, values, slots=S) for keys, values in layers]
        places_S = torch.arange(S, device=lengths_N.device)
        self.mask_NWL = (places_S < lengths_N.unsqueeze(1)).unsqueeze(1)
        self.positions_NL = places_S.expand(len(lengths_N), -1)
        self.next_N = lengths_N
        self._masks: dict[Any, Tensor] = {}

    def select(self, contexts_n: Tensor) -> None:
        """Keep some contexts only."""
        for layer in self.layers:
            layer.select(contexts_n)
        self.mask_NWL, self.positions_NL = self.mask_NWL[contexts_n], self.positions_NL[contexts_n]
        self.next_N = self.next_N[contexts_n]

    def branch(self, parents_NW: Tensor) -> tuple[Cache, Tensor]:
        """Make room for one more token of W hypotheses; each continues its parent among the previous ones.

        Returns:
            The cache for the model, and the positions of the new tokens, shape (R, 1).
        """
        W = parents_NW.shape[1]
        positions_NW = self.next_N.unsqueeze(1).expand(-1, W)
        self.mask_NWL = with_own_slot(self.mask_NWL, parents_NW)
        self.positions_NL = torch.cat((self.positions_NL, positions_NW), dim=1)
        self.next_N = self.next_N + 1
        self._masks = {}
        return Cache(layers=list(self.layers)), positions_NW.reshape(-1, 1)

    def mask_of(self, window: int | None, dtype: torch.dtype) -> Tensor:
        """The additive mask, shape (N, 1, W, 1, L): 0 where a hypothesis may look, −inf elsewhere."""
        key = window, dtype
        if key not in self._masks:
            allowed_NWL = self.mask_NWL
            if window is not None:
                # The token that is read is the last one, at next − 1.
                near_NL = self.positions_NL > self.next_N.unsqueeze(1) - 1 - window
                allowed_NWL = allowed_NWL & near_NL.unsqueeze(1)
            mask_NWL = torch.zeros((), dtype=dtype, device=allowed_NWL.device).masked_fill(~allowed_NWL, float("-inf"))
            self._masks[key] = mask_NWL[:, None, :, None]
        return self._masks[key]

    @contextmanager
    def attached(self, model: Any) -> Iterator[None]:
        """Inside, the model's attention reads these contexts."""
        token = _active.set(self)
        try:
            with attention_chosen(_configurations(model), NAME):
                yield
        finally:
            _active.reset(token)


def can_share(model: Any) -> bool:
    """Whether the model's attention can be replaced, and all its layers look at all tokens or at a window of them."""
    kinds = set(getattr(model.config.get_text_config(decoder=True), "layer_types", None) or ())
    return can_choose_attention(model) and kinds <= {"full_attention", "sliding_attention"}


def can_share_layers(layers: Sequence[Any]) -> bool:
    """Whether a cache, filled by a pass over the contexts, holds keys and values of every token in each layer."""
    return all(type(layer) is DynamicLayer and layer.keys is not None and layer.keys.dim() == 4 for layer in layers)


def _configurations(model: Any) -> list[Any]:
    return list({id(config): config for config in (model.config, model.config.get_text_config(decoder=True))}.values())


def _attend(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    **options: Any,
) -> tuple[Tensor, None]:
    """Attention of R rows of one token each to the slots of N contexts; Transformers defines the arguments."""
    unknown = [name for name, option in options.items() if option is not None and name not in _WITHOUT_EFFECT]
    if unknown or attention_mask is not None or (sliding_window is None and _looks_at_a_window(module)):
        raise NotShareableError(", ".join(unknown) or "its mask")
    R, heads, _, d = query.shape
    N, h = key.shape[:2]
    W, g = R // N, heads // h
    query_NhWgd = query.reshape(N, W, h, g, d).transpose(1, 2)
    scaled_NhQd = (query_NhWgd * (d**-0.5 if scaling is None else scaling)).reshape(N, h, W * g, d)
    scores_NhQL = scaled_NhQd @ key.transpose(2, 3)
    if softcap is not None:
        scores_NhQL = torch.tanh(scores_NhQL / softcap) * softcap
    mask_N1W1L = _active.get().mask_of(sliding_window, query.dtype)
    weights_NhWgL = torch.softmax(scores_NhQL.view(N, h, W, g, -1) + mask_N1W1L, dim=4)
    read_NhQd = weights_NhWgL.view(N, h, W * g, -1).to(value.dtype) @ value
    return read_NhQd.view(N, h, W, g, -1).transpose(1, 2).reshape(R, 1, heads, -1), None


def _looks_at_a_window(module: Any) -> bool:
    kinds: list[str] = getattr(module.config, "layer_types", None) or []
    return bool(kinds) and kinds[module.layer_idx] == "sliding_attention"


AttentionInterface.register(NAME, _attend)
