"""Run contexts through the generator's encoder in groups of similar length, so that little padding is multiplied.

A batch is as wide as its longest context; a group is only as wide as its own longest one. The price is one encoder pass
per group. This module knows nothing of passages or questions.

Legend: N contexts, S context tokens, D hidden size.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor

from rag_core.cpu.bfloat16 import matmul_attention
from rag_core.reading.generator_limits import refuse_long_contexts

# A group ends where the next context is an eighth shorter than the group's first, but only once it holds this many
# tokens: a smaller pass costs as much in overhead as it saves in padding.
MIN_GROUP_TOKENS = 768


def encode_contexts(generator: Any, input_ids_NS: Tensor, attention_mask_NS: Tensor) -> Tensor:
    """Return the encoder's states, shape (N, S, D); zeros after a group's longest context.

    Args:
        generator: a transformers encoder-decoder model.
        input_ids_NS: int64 token ids, padded.
        attention_mask_NS: 1 for real tokens, 0 for padding.

    Raises:
        ConfigError: a context is longer than the encoder has positions for.
    """
    encoder, S = generator.get_encoder(), input_ids_NS.shape[1]
    places_S = torch.arange(1, S + 1, device=attention_mask_NS.device)
    widths = (attention_mask_NS * places_S).amax(dim=1).tolist()
    refuse_long_contexts(generator, max(widths, default=0), "contexts of")
    groups = groups_by_width(widths)
    embeddings, states = encoder.get_input_embeddings(), []
    in_bf16 = input_ids_NS.device.type == "cpu" and torch.is_autocast_enabled("cpu")
    with matmul_attention(encoder) if in_bf16 else nullcontext():
        embedded_NSD = embeddings(input_ids_NS)
        for rows in groups:
            part = (torch.tensor(rows, device=input_ids_NS.device), slice(0, max(1, widths[rows[0]])))
            with _reusing_embeddings(embeddings, input_ids_NS[part], embedded_NSD[part]) as ids_nw:
                output = encoder(input_ids=ids_nw, attention_mask=attention_mask_NS[part], return_dict=True)
            states_nwD = output.last_hidden_state
            states.append(torch.nn.functional.pad(states_nwD, (0, 0, 0, S - states_nwD.shape[1])))
    order_N = torch.tensor([row for rows in groups for row in rows], device=input_ids_NS.device)
    return torch.cat(states)[order_N.argsort()]


@contextmanager
def _reusing_embeddings(embeddings: Any, ids_nw: Tensor, embedded_nwD: Tensor) -> Iterator[Tensor]:
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
