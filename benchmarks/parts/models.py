"""Generator, contexts and answers for the benchmarks of training and decoding: random, seeded, without downloads.

Legend: B questions, K passages per question, S context tokens, T answer tokens.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import BartConfig, BartForConditionalGeneration

from benchmarks.harness import Size

PAD, START = 1, 2
IGNORE = -100
# Standard deviation of the random weights. At the usual 0.02 all passages give nearly the same answer, at 0.06 they
# differ.
INIT_STD = 0.06


def bart(size: Size, *, vocab_size: int | None = None, d_model: int | None = None) -> Any:
    """BART-like: 6 + 6 layers of 512 dimensions (smoke: 2 + 2 of 32), tied embeddings, no dropout, float32."""
    full = size == "full"
    usual, layers = (512, 6) if full else (32, 2)
    d_model = d_model or usual
    torch.manual_seed(0)
    config = BartConfig(
        vocab_size=vocab_size or (50_265 if full else 300),
        d_model=d_model,
        encoder_layers=layers,
        decoder_layers=layers,
        encoder_attention_heads=d_model // 64 or 2,
        decoder_attention_heads=d_model // 64 or 2,
        encoder_ffn_dim=4 * d_model,
        decoder_ffn_dim=4 * d_model,
        max_position_embeddings=256,
        dropout=0.0,
        attention_dropout=0.0,
        init_std=INIT_STD,
        forced_eos_token_id=None,
    )
    generator = BartForConditionalGeneration(config)
    generator.generation_config.forced_eos_token_id = None
    return generator.eval()


def contexts(size: Size, generator: Any) -> tuple[Tensor, Tensor, Tensor]:
    """Contexts of 64 to 128 tokens, padded to the longest, and document scores: B = 8, K = 5 (smoke: 2, 2)."""
    B, K, shortest, longest = (8, 5, 64, 128) if size == "full" else (2, 2, 8, 16)
    random = torch.Generator().manual_seed(1)
    lengths_BK = torch.randint(shortest, longest + 1, (B, K), generator=random)
    lengths_BK[0, 0] = longest
    ids_BKS = torch.randint(4, generator.config.vocab_size, (B, K, longest), generator=random)
    mask_BKS = (torch.arange(longest) < lengths_BK.unsqueeze(2)).long()
    return ids_BKS.masked_fill(mask_BKS == 0, PAD), mask_BKS, torch.randn(B, K, generator=random)


def answers(vocab_size: int, B: int, longest: int) -> Tensor:
    """labels_BT of 2 to `longest` tokens, end token included, padded with −100."""
    random = torch.Generator().manual_seed(2)
    lengths_B = torch.randint(2, longest + 1, (B,), generator=random)
    lengths_B[0] = longest
    labels_BT = torch.randint(4, vocab_size, (B, longest), generator=random)
    position_T = torch.arange(longest)
    labels_BT[position_T == lengths_B.unsqueeze(1) - 1] = START
    return labels_BT.masked_fill(position_T >= lengths_B.unsqueeze(1), IGNORE)


def operations(generator: Any, context_tokens: int, decoder_tokens: int, predictions: int) -> float:
    """Floating-point operations of a forward pass: two per weight and token, without the attention products.

    Args:
        context_tokens: real tokens that the encoder reads and the decoder projects to cross-attention keys and values.
        decoder_tokens: tokens that the decoder reads.
        predictions: positions projected to the vocabulary.
    """
    config = generator.config
    D, F, V = config.d_model, config.encoder_ffn_dim, config.vocab_size
    encoder = config.encoder_layers * (4 * D * D + 2 * D * F) + config.decoder_layers * 2 * D * D
    decoder = config.decoder_layers * (6 * D * D + 2 * D * F)
    return 2.0 * (context_tokens * encoder + decoder_tokens * decoder + predictions * D * V)
