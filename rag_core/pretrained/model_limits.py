"""What a transformer can read: how many positions it has, and which tokens it has embeddings for.

Limits come from the embedding tables, not from the configuration, because each family counts differently: BART's tables
have two rows more than it has positions, RoBERTa's positions start after the padding token's, and LED's encoder pads
texts to whole windows. T5's relative positions and M2M100's growing ones have no limit.
"""

from __future__ import annotations

from typing import Any

from torch import nn

from rag_core.errors import ConfigError


def positions_of(stack: nn.Module) -> int | None:
    """The most tokens that a transformer (a text encoder, or one side of a generator) has positions for; None: any."""
    for module in stack.modules():
        learned = getattr(module, "embed_positions", None)
        if isinstance(learned, nn.Embedding):
            positions = learned.num_embeddings - int(getattr(learned, "offset", 0))
            return positions // _window(stack) * _window(stack)
        table = getattr(module, "position_embeddings", None)
        if isinstance(table, nn.Embedding):
            # RoBERTa and models like it count positions from padding_idx + 1.
            before = getattr(module, "padding_idx", None)
            return table.num_embeddings - (before + 1 if isinstance(before, int) else 0)
    return None


def refuse_tokens_beyond(rows: int, tokenizer: Any, owner: str) -> None:
    """Raise ConfigError if texts can have token ids beyond the `rows` of the model's embeddings.

    Special tokens that no text gets, such as an added [MASK], may lie beyond.
    """
    special = set(tokenizer.all_special_ids)
    used = {token for token in tokenizer.get_vocab().values() if token not in special} | set(tokenizer("")["input_ids"])
    used |= {token for token in (tokenizer.pad_token_id, tokenizer.unk_token_id) if token is not None}
    if max(used) >= rows:
        raise ConfigError(
            f"The tokenizer of {owner} has tokens up to id {max(used)}, but the model has embeddings for only "
            f"{rows}, so the tokenizer is another model's. Replace it with the model's own."
        )


def _window(stack: Any) -> int:
    """1, or the attention window of LED's encoder: it pads texts to a multiple of it and needs positions for that."""
    window = getattr(stack.config, "attention_window", 1) if type(stack).__name__ == "LEDEncoder" else 1
    return int(window if isinstance(window, int) else max(window))
