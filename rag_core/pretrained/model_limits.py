"""What a transformer can read: how many positions it has, and for which tokens it has embeddings.

Limits are read off the tables themselves, not off the configuration, as each family counts otherwise: BART's tables have
two rows more than it has positions, RoBERTa's positions start after the padding token's, LED's encoder fills texts up to
whole windows. T5's relative and M2M100's growing positions have no limit.
"""

from __future__ import annotations

from typing import Any

from torch import nn

from rag_core.errors import ConfigError


def positions_of(stack: nn.Module) -> int | None:
    """The most tokens for which a transformer (a text encoder, or one side of a generator) has positions; None: any."""
    for module in stack.modules():
        learned = getattr(module, "embed_positions", None)
        if isinstance(learned, nn.Embedding):
            positions = learned.num_embeddings - int(getattr(learned, "offset", 0))
            return positions // _window(stack) * _window(stack)
        table = getattr(module, "position_embeddings", None)
        if isinstance(table, nn.Embedding):
            # RoBERTa and its kin count positions from padding_idx + 1.
            before = getattr(module, "padding_idx", None)
            return table.num_embeddings - (before + 1 if isinstance(before, int) else 0)
    return None


def refuse_tokens_beyond(rows: int, tokenizer: Any, owner: str) -> None:
    """Raise ConfigError if texts can have tokens beyond the model's embeddings, of which it has so many rows.

    Special tokens that no text gets, such as a [MASK] that was added, may lie beyond.
    """
    special = set(tokenizer.all_special_ids)
    used = {one for one in tokenizer.get_vocab().values() if one not in special} | set(tokenizer("")["input_ids"])
    used |= {one for one in (tokenizer.pad_token_id, tokenizer.unk_token_id) if one is not None}
    if max(used) >= rows:
        raise ConfigError(
            f"The tokenizer of {owner} has tokens up to id {max(used)}, but the model has embeddings for {rows}: it is "
            "another model's. Put the model's own tokenizer there."
        )


def _window(stack: Any) -> int:
    """LED's encoder fills texts up to a multiple of its attention window, and positions are needed for that, too."""
    window = getattr(stack.config, "attention_window", 1) if type(stack).__name__ == "LEDEncoder" else 1
    return int(window if isinstance(window, int) else max(window))
