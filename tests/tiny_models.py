"""Tiny encoder-decoders with random weights, whose distributions are peaked and differ from context to context.

Small enough that all answers can be enumerated. Token 0 is padding everywhere.

Legend: B questions, K passages per question, S context tokens, T answer tokens, V vocabulary.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import (
    BartConfig,
    BartForConditionalGeneration,
    BertConfig,
    EncoderDecoderConfig,
    EncoderDecoderModel,
    T5Config,
    T5ForConditionalGeneration,
)

FAMILIES = ("bart", "t5", "bert2bert")
PAD = 0


def tiny_bart(vocab_size: int = 7, seed: int = 0, dtype: torch.dtype = torch.float64) -> Any:
    """Starts with its end token, 2, as the released BART models do."""
    config = BartConfig(
        vocab_size=vocab_size,
        d_model=16,
        encoder_layers=2,
        decoder_layers=2,
        encoder_attention_heads=2,
        decoder_attention_heads=2,
        encoder_ffn_dim=32,
        decoder_ffn_dim=32,
        max_position_embeddings=64,
        pad_token_id=PAD,
        bos_token_id=1,
        eos_token_id=2,
        decoder_start_token_id=2,
        forced_eos_token_id=None,
    )
    return _peaked(BartForConditionalGeneration, config, seed, dtype)


def tiny_t5(vocab_size: int = 7, seed: int = 0, dtype: torch.dtype = torch.float64) -> Any:
    """Starts with padding, 0; ends with 1."""
    config = T5Config(
        vocab_size=vocab_size,
        d_model=16,
        d_kv=8,
        d_ff=32,
        num_layers=2,
        num_heads=2,
        relative_attention_num_buckets=8,
        pad_token_id=PAD,
        eos_token_id=1,
        decoder_start_token_id=PAD,
    )
    return _peaked(T5ForConditionalGeneration, config, seed, dtype)


def tiny_bert2bert(vocab_size: int = 7, seed: int = 0, dtype: torch.dtype = torch.float64) -> Any:
    """Starts with [CLS], 1; ends with [SEP], 2."""
    shared: dict[str, Any] = {
        "vocab_size": vocab_size,
        "hidden_size": 16,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "intermediate_size": 32,
        "max_position_embeddings": 64,
    }
    config = EncoderDecoderConfig.from_encoder_decoder_configs(
        BertConfig(**shared), BertConfig(**shared), pad_token_id=PAD, decoder_start_token_id=1, eos_token_id=2
    )
    return _peaked(EncoderDecoderModel, config, seed, dtype)


def tiny_model(family: str, vocab_size: int = 7, seed: int = 0, dtype: torch.dtype = torch.float64) -> Any:
    """One of `FAMILIES`, in evaluation mode."""
    build = {"bart": tiny_bart, "t5": tiny_t5, "bert2bert": tiny_bert2bert}[family]
    return build(vocab_size, seed, dtype)


def end_token(model: Any) -> int:
    """The id that ends answers."""
    return int(model.config.eos_token_id)


def answer_tokens(model: Any) -> list[int]:
    """Ids that an answer may hold: all but padding, start and end."""
    special = {PAD, model.config.decoder_start_token_id, end_token(model)}
    vocab_size = (model.config.decoder if hasattr(model.config, "decoder") else model.config).vocab_size
    return [token for token in range(vocab_size) if token not in special]


def random_contexts(
    B: int, K: int, S: int, seed: int, vocab_size: int = 7, dtype: torch.dtype = torch.float64
) -> tuple[Tensor, Tensor, Tensor]:
    """input_ids_BKS, attention_mask_BKS (contexts of 3 to S real tokens, the rest padding) and doc_scores_BK."""
    g = torch.Generator().manual_seed(seed)
    input_ids_BKS = torch.randint(3, vocab_size, (B, K, S), generator=g)
    lengths_BK1 = torch.randint(3, S + 1, (B, K, 1), generator=g)
    attention_mask_BKS = (torch.arange(S) < lengths_BK1).long()
    doc_scores_BK = torch.randn(B, K, generator=g, dtype=torch.float64).to(dtype)
    return input_ids_BKS.masked_fill(attention_mask_BKS == 0, PAD), attention_mask_BKS, doc_scores_BK


def _peaked(model_class: Any, config: Any, seed: int, dtype: torch.dtype) -> Any:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = model_class(config).to(dtype).eval()
        with torch.no_grad():
            for parameter in model.parameters():
                # Matrices only: gains of layer norms stay at one. Library defaults (0.02) give uniform answers.
                if parameter.dim() == 2:
                    parameter.normal_(std=0.7)
            # A head of its own, blind to the mean hidden state: a tied one would repeat the last token, and the mean
            # would make the same token likely everywhere, whatever the passage says.
            head = (model.decoder if hasattr(config, "decoder") else model).get_output_embeddings()
            seen: list[Tensor] = []
            hook = head.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].flatten(0, -2)))
            tokens_BT = torch.randint(0, head.out_features, (64, 5))
            model(input_ids=tokens_BT, attention_mask=torch.ones_like(tokens_BT), decoder_input_ids=tokens_BT.flip(0))
            hook.remove()
            hidden_ND = seen[0] - seen[0].mean(dim=0)
            mean_D = torch.nn.functional.normalize(seen[0].mean(dim=0), dim=0)
            weight_VD = torch.randn_like(head.weight) * 2.5 / hidden_ND.square().sum(dim=1).mean().sqrt()
            head.weight = torch.nn.Parameter(weight_VD - (weight_VD @ mean_D).outer(mean_D))
    return model
