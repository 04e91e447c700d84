"""Run contexts through the generator's encoder in groups of similar length, so that little padding is multiplied.

A batch is as wide as its longest context; a group is only as wide as its own longest one. The price is one encoder pass
per group. This module knows nothing of passages or questions.

Legend: N contexts, S context tokens, D hidden size.
"""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor

from rag_core.cpu.bfloat16 import matmul_attention
from rag_core.generators.grouping import groups_by_width, one_look_up, widths_of


def encode_contexts(generator: Any, input_ids_NS: Tensor, attention_mask_NS: Tensor) -> Tensor:
    """Return the encoder's states, shape (N, S, D); zeros after a group's longest context.

    Args:
        generator: a transformers encoder-decoder model.
        input_ids_NS: int64 token ids, padded.
        attention_mask_NS: 1 for real tokens, 0 for padding.
    """
    encoder, S = generator.get_encoder(), input_ids_NS.shape[1]
    widths = widths_of(attention_mask_NS)
    groups = groups_by_width(widths)
    embeddings, states = encoder.get_input_embeddings(), []
    in_bf16 = input_ids_NS.device.type == "cpu" and torch.is_autocast_enabled("cpu")
    with matmul_attention(encoder) if in_bf16 else nullcontext():
        embedded_NSD = embeddings(input_ids_NS)
        for rows in groups:
            part = (torch.tensor(rows, device=input_ids_NS.device), slice(0, max(1, widths[rows[0]])))
            with one_look_up(embeddings, input_ids_NS[part], embedded_NSD[part]) as ids_nw:
                output = encoder(input_ids=ids_nw, attention_mask=attention_mask_NS[part], return_dict=True)
            states_nwD = output.last_hidden_state
            states.append(torch.nn.functional.pad(states_nwD, (0, 0, 0, S - states_nwD.shape[1])))
    order_N = torch.tensor([row for rows in groups for row in rows], device=input_ids_NS.device)
    return torch.cat(states)[order_N.argsort()]
