"""Which implementation of a generator a Transformers model gets: the only place that asks for its kind."""

from __future__ import annotations

from typing import Any

from transformers.models.auto.modeling_auto import MODEL_FOR_MASKED_LM_MAPPING_NAMES

from rag_core.errors import ConfigError
from rag_core.generators.decoder_only.generator import DecoderOnlyGenerator
from rag_core.generators.encoder_decoder.generator import EncoderDecoderGenerator
from rag_core.generators.generator import Generator

_REMEDY = (
    "Take an encoder-decoder such as BART, T5 or EncoderDecoderModel, or a decoder-only language model such as Llama, "
    "Qwen or GPT-2."
)


def as_generator(model: Any) -> Generator:
    """Return what the likelihoods and decoders ask of `model`, a Transformers model.

    Raises:
        ConfigError: the model writes no text: it is an encoder, or has no head over the vocabulary.
    """
    check_generates(model.config, f"The generator ({type(model).__name__})")
    if model.config.is_encoder_decoder:
        return EncoderDecoderGenerator(model)
    if model.get_output_embeddings() is None:
        raise ConfigError(
            f"The generator is a {type(model).__name__}, which has no head over the vocabulary, so it writes no text. "
            "Load it with AutoModelForCausalLM."
        )
    return DecoderOnlyGenerator(model)


def check_generates(config: Any, name: str) -> None:
    """Raise ConfigError unless models with this Transformers configuration write text; `name` begins the message."""
    if config.is_encoder_decoder:
        return
    # Models of these families read in both directions, unless they are set to be decoders.
    reads_both_ways = config.model_type in MODEL_FOR_MASKED_LM_MAPPING_NAMES and not getattr(
        config, "is_decoder", False
    )
    if reads_both_ways:
        raise ConfigError(f"{name} is an encoder ({config.model_type}): it reads text, but writes none. {_REMEDY}")
