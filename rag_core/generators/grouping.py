"""Groups of rows of similar length, so that little padding is multiplied; one look-up of embeddings for all groups.

Legend: N, n rows, S tokens, w width of a group, D hidden size.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

# A group ends where the next row is an eighth shorter than the group's first, but only once it holds this many
# tokens: a smaller pass costs as much in overhead as it saves in padding.
MIN_GROUP_TOKENS = 768


def widths_of(attention_mask_NS: Tensor) -> list[int]:
    """For each row, the place of its last real token, counted from 1."""
    places_S = torch.arange(1, attention_mask_NS.shape[1] + 1, device=attention_mask_NS.device)
    widths: list[int] = (attention_mask_NS * places_S).amax(dim=1).tolist()
    return widths


def groups_by_width(widths: list[int]) -> list[list[int]]:
    """Group rows of similar width, widest first."""
    groups: list[list[int]] = []
    for row in sorted(range(len(widths)), key=lambda row: -widths[row]):
        first = widths[groups[-1][0]] if groups else 0
        if groups and (8 * widths[row] > 7 * first or len(groups[-1]) * first < MIN_GROUP_TOKENS):
            groups[-1].append(row)
        else:
            groups.append([row])
    return groups


@contextmanager
def one_look_up(embeddings: Any, ids_nw: Tensor, embedded_nwD: Tensor) -> Iterator[Tensor]:
    """Inside, the embedding layer returns `embedded_nwD` for `ids_nw` (that tensor object) without a look-up.

    The gradient of a look-up is as large as the vocabulary, however few tokens it reads. One look-up for all groups
    makes that gradient once. The model still gets ids, because some families scale the embeddings that they look up.
    """
    usual = embeddings.forward

    def forward(ids: Tensor) -> Tensor:
        return embedded_nwD if ids is ids_nw else usual(ids)

    embeddings.forward = forward
    try:
        yield ids_nw
    finally:
        del embeddings.forward
