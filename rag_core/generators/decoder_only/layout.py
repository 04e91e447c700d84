"""Contexts and answers as one row of tokens each, from the left and without gaps.

A causal model cannot look ahead. So where a row's padding stands behind its tokens, no token that counts sees padding,
and its position is its place in the row, whatever scheme of positions the model has. No mask is needed.

Legend: N contexts, S context tokens, T answer tokens, X tokens of a row.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from rag_core.generators.token_log_probs import IGNORE_INDEX


@dataclass(frozen=True)
class Rows:
    """Tokens from the left: `input_ids_NX` int64, padded behind `lengths_N` int64."""

    input_ids_NX: Tensor
    lengths_N: Tensor


def without_gaps(input_ids_NS: Tensor, attention_mask_NS: Tensor, pad: int) -> Rows:
    """Move each row's real tokens to the left, wherever its padding was."""
    padding_NS = attention_mask_NS == 0
    order_NS = padding_NS.to(torch.uint8).argsort(dim=1, stable=True)
    lengths_N = (~padding_NS).sum(dim=1)
    ids_NS = input_ids_NS.masked_fill(padding_NS, pad).gather(1, order_NS)
    return Rows(ids_NS[:, : int(lengths_N.amax())], lengths_N)


def with_answers(contexts: Rows, labels_NT: Tensor, pad: int) -> tuple[Rows, Tensor]:
    """Append to each context what the model reads to predict its labels: all labels but the last.

    Ignored labels inside an answer are read as padding tokens.

    Returns:
        The rows, and `needed_NX` bool: the positions that predict a label, in the order of the labels. The first is
        the context's last token.
    """
    T = labels_NT.shape[1]
    labelled_NT = labels_NT != IGNORE_INDEX
    starts_N1 = contexts.lengths_N.unsqueeze(1)
    places_NT = starts_N1 - 1 + torch.arange(T, device=labels_NT.device)
    ids_NX = torch.nn.functional.pad(contexts.input_ids_NX, (0, T - 1), value=pad)
    ids_NX = ids_NX.scatter(1, places_NT[:, 1:], labels_NT[:, :-1].where(labelled_NT[:, :-1], pad))
    needed_NX = torch.zeros_like(ids_NX, dtype=torch.bool).scatter(1, places_NT, labelled_NT)
    last_N = (labelled_NT * torch.arange(T, device=labels_NT.device)).amax(dim=1)
    return Rows(ids_NX, contexts.lengths_N + last_N), needed_NX
