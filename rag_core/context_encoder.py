"""Contexts through the generator's encoder, in groups of like length, so that little padding is multiplied.

A batch of contexts is as wide as its longest; groups of like length are each as wide as theirs. The price is a pass of
the encoder for each group. This module knows nothing of passages or questions.

Legend: N contexts, S context tokens, D hidden size.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

# A group is closed when the next context is an eighth shorter than its first, but not before it has so many tokens: a
# pass over fewer costs as much in overhead as the padding that it saves.
MIN_GROUP_TOKENS = 768


def encode_contexts(generator: Any, input_ids_NS: Tensor, attention_mask_NS: Tensor) -> Tensor:
    """The encoder's states of contexts, shape (N, S, D); zeros behind a group's longest context.

    Args:
        generator: a transformers encoder-decoder model.
        input_ids_NS: int64 token ids, padded.
        attention_mask_NS: 1 for real tokens, 0 for padding.
    """
    encoder, (N, S) = generator.get_encoder(), input_ids_NS.shape
    places_S = torch.arange(1, S + 1, device=attention_mask_NS.device)
    widths = (attention_mask_NS * places_S).amax(dim=1).tolist()
    groups = groups_by_width(widths)
    states = []
    for rows in groups:
        part = (torch.tensor(rows, device=input_ids_NS.device), slice(0, max(1, widths[rows[0]])))
        output = encoder(input_ids=input_ids_NS[part], attention_mask=attention_mask_NS[part], return_dict=True)
        states_nwD = output.last_hidden_state
        states.append(torch.nn.functional.pad(states_nwD, (0, 0, 0, S - states_nwD.shape[1])))
    order_N = torch.tensor([row for rows in groups for row in rows], device=input_ids_NS.device)
    return torch.cat(states)[order_N.argsort()]


def groups_by_width(widths: list[int]) -> list[list[int]]:
    """Rows in groups of like width, widest first."""
    groups: list[list[int]] = []
    for row in sorted(range(len(widths)), key=lambda row: -widths[row]):
        first = widths[groups[-1][0]] if groups else 0
        if groups and (8 * widths[row] > 7 * first or len(groups[-1]) * first < MIN_GROUP_TOKENS):
            groups[-1].append(row)
        else:
            groups.append([row])
    return groups
