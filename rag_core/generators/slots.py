"""Slots: the keys and values of every token that any hypothesis of a context ever had, stored once per context.

A mask limits each hypothesis to its own past. So re-ordering hypotheses moves a small mask, and no cache. The price is
attention over the slots of dead hypotheses, V and D times smaller than the rest of a step.

Legend: N contexts, W hypotheses of each context, R rows (N·W), L slots, P slots before the first step, h heads,
d dimensions of a head.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import CacheLayerMixin

# Slots by which a full buffer grows, at most.
_MOST_ROOM = 128


def with_own_slot(mask_NWL: Tensor, parents_NW: Tensor) -> Tensor:
    """The mask of the next W hypotheses, bool (N, W, L + W): what their parents see, and each one's own new slot."""
    N, W = parents_NW.shape
    past_NWL = mask_NWL.gather(1, parents_NW.unsqueeze(2).expand(-1, -1, mask_NWL.shape[2]))
    own_NWW = torch.eye(W, dtype=torch.bool, device=parents_NW.device).expand(N, -1, -1)
    return torch.cat((past_NWL, own_NWW), dim=2)


class SlotLayer(CacheLayerMixin):
    """One layer's keys and values of all slots; a step appends W slots.

    Args:
        keys_NhPd: keys that are there before the first step.
        values_NhPd: their values.
        slots: how many of the P are in use; the others are room for steps, which write into it. Default: all.
    """

    def __init__(self, keys_NhPd: Tensor, values_NhPd: Tensor, slots: int | None = None) -> None:
        super().__init__()
        self._keys, self._values = keys_NhPd, values_NhPd
        self.slots = keys_NhPd.shape[2] if slots is None else slots
        self._positions = self.slots
        self.handed_out = keys_NhPd[:, :, : self.slots]
        self.is_initialized = True

    def select(self, contexts_n: Tensor) -> None:
        """Keep some contexts only."""
        self._keys, self._values = self._keys[contexts_n], self._values[contexts_n]

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        N = len(self._keys)
        W, end = len(key_states) // N, self.slots + len(key_states) // N
        if end > self._keys.shape[2]:
            room = end + min(end, _MOST_ROOM)
            self._keys, self._values = _with_room(self._keys, room), _with_room(self._values, room)
        for buffer, new_Rh1d in ((self._keys, key_states), (self._values, value_states)):
            buffer[:, :, self.slots : end] = new_Rh1d.reshape(N, W, *new_Rh1d.shape[1::2]).transpose(1, 2)
        self.slots = end
        self._positions += 1
        self.handed_out = self._keys[:, :, :end]
        return self.handed_out, self._values[:, :, :end]

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Do nothing: the prompt's keys and values are there already."""

    def get_seq_length(self) -> int:
        return self._positions

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self._positions + query_length, 0

    def get_max_length(self) -> int:
        return -1


def _with_room(states_NhLd: Tensor, slots: int) -> Tensor:
    N, h, L, d = states_NhLd.shape
    grown_NhLd = states_NhLd.new_empty(N, h, slots, d)
    grown_NhLd[:, :, :L] = states_NhLd
    return grown_NhLd
