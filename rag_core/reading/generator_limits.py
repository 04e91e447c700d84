"""The limits of a generator: positions of its encoder and decoder, and rows of its embeddings.

A position or a token beyond its table raises an index error deep inside the model, often hours into a run; on a GPU it
is a device assertion that kills the process. The checks here refuse such settings before the work starts.

Shapes: S context tokens, T answer tokens, V vocabulary.
"""

from __future__ import annotations

from typing import Any

from rag_core.errors import ConfigError
from rag_core.pretrained.model_limits import positions_of, refuse_tokens_beyond
from rag_core.reading.generation_tokens import GenerationTokens
from rag_core.reading.prompt import PromptConfig


def encoder_positions(generator: Any) -> int | None:
    """The longest context in tokens; None: no limit."""
    return positions_of(generator.get_encoder())


def decoder_positions(generator: Any) -> int | None:
    """The longest input of the decoder in tokens, its start token included; None: no limit."""
    return positions_of(generator.get_decoder())


def refuse_long_contexts(generator: Any, tokens: int, setting: str = "contexts of") -> None:
    """Raise ConfigError if the encoder has fewer positions than `tokens`; `setting` begins the message."""
    limit = encoder_positions(generator)
    if limit is not None and tokens > limit:
        raise ConfigError(
            f"{setting} {tokens} tokens are more than the encoder of the generator ({type(generator).__name__}) has "
            f"positions for: {limit}. Set prompt.max_context_tokens to at most {limit}, or choose another generator."
        )


def refuse_long_answers(generator: Any, tokens: int, setting: str = "answers of") -> None:
    """Raise ConfigError if the decoder has too few positions for an answer of `tokens` tokens.

    Args:
        generator: an encoder-decoder.
        tokens: length of an answer, end token included. A forced first token needs one more position.
        setting: the beginning of the message.
    """
    forced, limit = GenerationTokens.of(generator).forced_first, decoder_positions(generator)
    if limit is not None and tokens + forced > limit:
        raise ConfigError(
            f"{setting} {tokens} tokens are more than the decoder of the generator ({type(generator).__name__}) has "
            f"positions for: {limit - forced}. Set prompt.max_answer_tokens to at most {limit - forced}, or choose "
            "another generator."
        )


def refuse_long_search(generator: Any, max_new_tokens: int) -> None:
    """Raise ConfigError if `max_new_tokens` is more than the decoder's positions, or all taken by a forced first token.

    `max_new_tokens` includes a forced first token.
    """
    if max_new_tokens <= GenerationTokens.of(generator).forced_first:
        raise ConfigError("max_new_tokens is 1, which the generator's forced first token takes up; raise it.")
    limit = decoder_positions(generator)
    if limit is not None and max_new_tokens > limit:
        raise ConfigError(
            f"max_new_tokens {max_new_tokens} is more than the decoder of the generator ({type(generator).__name__}) "
            f"has positions for: {limit}. Set max_new_tokens to at most {limit}."
        )


def fitting_prompt(generator: Any, prompt: PromptConfig) -> PromptConfig:
    """Return the prompt with default lengths lowered to the generator's positions.

    Raises:
        ConfigError: a length that was set explicitly is more than the generator has positions for.
    """
    fitting = within_positions(generator, prompt)
    if "max_context_tokens" in prompt.model_fields_set:
        refuse_long_contexts(generator, prompt.max_context_tokens, "max_context_tokens:")
    if "max_answer_tokens" in prompt.model_fields_set:
        refuse_long_answers(generator, prompt.max_answer_tokens, "max_answer_tokens:")
    return fitting


def within_positions(generator: Any, prompt: PromptConfig) -> PromptConfig:
    """Return the prompt with all lengths lowered to the generator's positions, whether set explicitly or not."""
    contexts, answers = encoder_positions(generator), decoder_positions(generator)
    lowered: dict[str, int] = {}
    if contexts is not None and contexts < prompt.max_context_tokens:
        lowered["max_context_tokens"] = contexts
    forced = GenerationTokens.of(generator).forced_first
    if answers is not None and answers - forced < prompt.max_answer_tokens:
        lowered["max_answer_tokens"] = answers - forced
    return prompt.model_copy(update=lowered)


def refuse_tokenizer(generator: Any, tokenizer: Any, source: str) -> None:
    """Raise ConfigError if the tokenizer does not fit the generator: it lacks a padding token, or has too many tokens.

    Args:
        generator: an encoder-decoder.
        tokenizer: the tokenizer found beside it.
        source: where both come from, for the message.
    """
    if tokenizer.pad_token_id is None:
        raise ConfigError(
            f"The tokenizer of the generator {source} has no padding token, which batches need. Set pad_token in its "
            "tokenizer_config.json, or choose another generator."
        )
    # In an EncoderDecoderModel each side has its own embeddings.
    rows = min(
        side.get_input_embeddings().num_embeddings for side in (generator.get_encoder(), generator.get_decoder())
    )
    refuse_tokens_beyond(rows, tokenizer, f"the generator {source}")
    tokens = GenerationTokens.of(generator)
    beyond = [token for token in (*tokens.prompt, *tokens.ends, tokens.pad) if not 0 <= token < rows]
    if beyond:
        raise ConfigError(
            f"The generator {source} starts, ends or pads with token {beyond[0]}, but it has {rows} embeddings. "
            "Correct its generation_config.json."
        )
