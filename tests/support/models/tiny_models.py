"""Tiny encoder-decoders with random weights. Their distributions are peaked and differ from context to context.

They are small enough to enumerate all answers. Each has the special tokens of its family's released checkpoints, at
their usual ids in a tiny vocabulary of V tokens. `bart`, `t5` and `bert2bert` pad with 0 and force or suppress no
tokens; see the docstrings of the others.

Legend: B questions, K passages per question, S context tokens, T answer tokens, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers import (
    BartConfig,
    BartForConditionalGeneration,
    BertConfig,
    EncoderDecoderConfig,
    EncoderDecoderModel,
    LEDConfig,
    LEDForConditionalGeneration,
    MarianConfig,
    MarianMTModel,
    MBartConfig,
    MBartForConditionalGeneration,
    PegasusConfig,
    PegasusForConditionalGeneration,
    T5Config,
    T5ForConditionalGeneration,
)

FAMILIES = ("bart", "t5", "bert2bert")
ALL_FAMILIES = ("bart", "mbart", "t5", "flan-t5", "pegasus", "marian", "led", "bert2bert")
# With further checkpoints of these families that have other special tokens.
ALL_BUILDS = (*ALL_FAMILIES, "bart-forced", "mbart-25")
PAD = 0

# Sizes for the families whose configuration follows BART's.
_BART_SIZES: dict[str, Any] = {
    "d_model": 16,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 2,
    "decoder_attention_heads": 2,
    "encoder_ffn_dim": 32,
    "decoder_ffn_dim": 32,
}


def tiny_bart(vocab_size: int = 7, seed: int = 0, dtype: torch.dtype = torch.float64) -> Any:
    """Starts with its end token, 2, like the released BART models."""
    config = BartConfig(
        **_BART_SIZES,
        vocab_size=vocab_size,
        max_position_embeddings=64,
        pad_token_id=PAD,
        bos_token_id=1,
        eos_token_id=2,
        decoder_start_token_id=2,
        forced_eos_token_id=None,
    )
    return _peaked(BartForConditionalGeneration, config, seed, dtype)


def tiny_bart_forced(vocab_size: int = 7, seed: int = 0, dtype: torch.dtype = torch.float64) -> Any:
    """Like the released BART: starts with </s>, 2, then <s>, 1, is forced; </s> is also forced as the last token."""
    model = tiny_bart(vocab_size, seed, dtype)
    model.generation_config.forced_bos_token_id = 1
    model.generation_config.forced_eos_token_id = 2
    return model


def tiny_mbart(vocab_size: int = 7, seed: int = 0, dtype: torch.dtype = torch.float64) -> Any:
    """mBART-50: starts with </s>, 2, then the language token, V − 1, is forced; </s> is forced at the end; pads with 1.

    mBART's `prepare_decoder_input_ids_from_labels` puts the last label at the front instead of the start token.
    """
    config = MBartConfig(
        **_BART_SIZES,
        vocab_size=vocab_size,
        max_position_embeddings=64,
        scale_embedding=True,
        bos_token_id=0,
        pad_token_id=1,
        eos_token_id=2,
        decoder_start_token_id=2,
    )
    model = _peaked(MBartForConditionalGeneration, config, seed, dtype)
    model.generation_config.forced_bos_token_id = vocab_size - 1
    model.generation_config.forced_eos_token_id = 2
    return model


def tiny_mbart_25(vocab_size: int = 7, seed: int = 0, dtype: torch.dtype = torch.float64) -> Any:
    """mBART-25: starts with the language token, V − 1; </s>, 2, is forced at the end; pads with 1."""
    model = tiny_mbart(vocab_size, seed, dtype)
    model.config.decoder_start_token_id = model.generation_config.decoder_start_token_id = vocab_size - 1
    model.generation_config.forced_bos_token_id = None
    return model


def tiny_pegasus(vocab_size: int = 7, seed: int = 0, dtype: torch.dtype = torch.float64) -> Any:
    """Starts with padding, 0; ends with 1, forced at the end; fixed sinusoidal positions."""
    config = PegasusConfig(
        **_BART_SIZES,
        vocab_size=vocab_size,
        max_position_embeddings=64,
        scale_embedding=True,
        pad_token_id=PAD,
        eos_token_id=1,
        decoder_start_token_id=PAD,
    )
    model = _peaked(PegasusForConditionalGeneration, config, seed, dtype)
    model.generation_config.forced_eos_token_id = 1
    return model


def tiny_marian(vocab_size: int = 7, seed: int = 0, dtype: torch.dtype = torch.float64) -> Any:
    """Starts with padding, V − 1, which is a bad word; ends with 0, forced at the end; a bias on the logits.

    Fixed sinusoidal positions, scaled embeddings and the swish of the OPUS-MT models.
    """
    config = MarianConfig(
        **_BART_SIZES,
        vocab_size=vocab_size,
        max_position_embeddings=64,
        scale_embedding=True,
        activation_function="swish",
        pad_token_id=vocab_size - 1,
        bos_token_id=0,
        eos_token_id=0,
        decoder_start_token_id=vocab_size - 1,
    )
    model = _peaked(MarianMTModel, config, seed, dtype)
    g = torch.Generator().manual_seed(seed)
    model.final_logits_bias.normal_(std=0.5, generator=g)
    model.generation_config.forced_eos_token_id = 0
    model.generation_config.bad_words_ids = [[vocab_size - 1]]
    return model


def tiny_led(vocab_size: int = 7, seed: int = 0, dtype: torch.dtype = torch.float64) -> Any:
    """Starts and ends with </s>, 2; pads with 1; the encoder's windows of 4 tokens are narrower than the contexts.

    transformers always computes the encoder's softmax in float32. In a float64 model gradients of padded contexts are
    then NaN, because the mask's smallest float64 becomes -inf.
    """
    config = LEDConfig(
        **_BART_SIZES,
        vocab_size=vocab_size,
        max_encoder_position_embeddings=64,
        max_decoder_position_embeddings=64,
        attention_window=4,
        bos_token_id=0,
        pad_token_id=1,
        eos_token_id=2,
        decoder_start_token_id=2,
    )
    return _peaked(LEDForConditionalGeneration, config, seed, dtype)


def tiny_t5(vocab_size: int = 7, seed: int = 0, dtype: torch.dtype = torch.float64) -> Any:
    """Starts with padding, 0; ends with 1; hidden states are scaled before the head, as T5 1.0 does."""
    return _peaked(T5ForConditionalGeneration, T5Config(**_t5_settings(vocab_size)), seed, dtype)


def tiny_flan_t5(vocab_size: int = 7, seed: int = 0, dtype: torch.dtype = torch.float64) -> Any:
    """T5 1.1: gated GELU, a head of its own and no scaling before it."""
    settings = _t5_settings(vocab_size) | {"feed_forward_proj": "gated-gelu", "tie_word_embeddings": False}
    return _peaked(T5ForConditionalGeneration, T5Config(**settings), seed, dtype)


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
    """One of `ALL_BUILDS`, in evaluation mode."""
    builders: dict[str, Callable[..., Any]] = {
        "bart": tiny_bart,
        "bart-forced": tiny_bart_forced,
        "mbart": tiny_mbart,
        "mbart-25": tiny_mbart_25,
        "t5": tiny_t5,
        "flan-t5": tiny_flan_t5,
        "pegasus": tiny_pegasus,
        "marian": tiny_marian,
        "led": tiny_led,
        "bert2bert": tiny_bert2bert,
    }
    return builders[family](vocab_size, seed, dtype)


def end_token(model: Any) -> int:
    """Id of the token that ends answers."""
    return int(model.config.eos_token_id)


def answer_tokens(model: Any) -> list[int]:
    """Ids allowed anywhere in an answer: all but the end token and those that the generation config suppresses."""
    bad_words = [word[0] for word in model.generation_config.bad_words_ids or []]
    forbidden = {end_token(model), *bad_words, *(model.generation_config.suppress_tokens or [])}
    vocab_size = (model.config.decoder if hasattr(model.config, "decoder") else model.config).vocab_size
    return [token for token in range(vocab_size) if token not in forbidden]


def random_contexts(
    B: int, K: int, S: int, seed: int, vocab_size: int = 7, dtype: torch.dtype = torch.float64, pad: int = PAD
) -> tuple[Tensor, Tensor, Tensor]:
    """input_ids_BKS, attention_mask_BKS (contexts of 3 to S real tokens, the rest padding) and doc_scores_BK."""
    g = torch.Generator().manual_seed(seed)
    input_ids_BKS = torch.randint(3, vocab_size, (B, K, S), generator=g)
    lengths_BK1 = torch.randint(3, S + 1, (B, K, 1), generator=g)
    attention_mask_BKS = (torch.arange(S) < lengths_BK1).long()
    doc_scores_BK = torch.randn(B, K, generator=g, dtype=torch.float64).to(dtype)
    return input_ids_BKS.masked_fill(attention_mask_BKS == 0, pad), attention_mask_BKS, doc_scores_BK


def _t5_settings(vocab_size: int) -> dict[str, Any]:
    return {
        "vocab_size": vocab_size,
        "d_model": 16,
        "d_kv": 8,
        "d_ff": 32,
        "num_layers": 2,
        "num_heads": 2,
        "relative_attention_num_buckets": 8,
        "pad_token_id": PAD,
        "eos_token_id": 1,
        "decoder_start_token_id": PAD,
    }


def _peaked(model_class: Any, config: Any, seed: int, dtype: torch.dtype) -> Any:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = model_class(config).to(dtype).eval()
        with torch.no_grad():
            for parameter in model.parameters():
                # Wide, because the library's default of 0.02 gives uniform answers. Matrices only: layer norms keep
                # their gain of one. Frozen matrices are the sinusoidal positions.
                if parameter.dim() == 2 and parameter.requires_grad:
                    parameter.normal_(std=0.7)
            # Untie the head, or it would repeat the last token. Make it orthogonal to the mean hidden state, or the
            # same token would be likely for every passage.
            head = (model.decoder if hasattr(config, "decoder") else model).get_output_embeddings()
            captured: list[Tensor] = []
            hook = head.register_forward_pre_hook(lambda _, inputs: captured.append(inputs[0].flatten(0, -2)))
            tokens_BT = torch.randint(0, head.out_features, (64, 5))
            model(input_ids=tokens_BT, attention_mask=torch.ones_like(tokens_BT), decoder_input_ids=tokens_BT.flip(0))
            hook.remove()
            hidden_ND = captured[0] - captured[0].mean(dim=0)
            mean_D = torch.nn.functional.normalize(captured[0].mean(dim=0), dim=0)
            weight_VD = torch.randn_like(head.weight) * 2.5 / hidden_ND.square().sum(dim=1).mean().sqrt()
            head.weight = torch.nn.Parameter(weight_VD - (weight_VD @ mean_D).outer(mean_D))
    return model
