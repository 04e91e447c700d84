"""Fit a prompt's lengths, and a tokenizer, to a generator: its positions and the rows of its embeddings."""

from __future__ import annotations

import warnings
from typing import Any

from rag_core.errors import ConfigError, ModelNotice
from rag_core.generators.kinds import as_generator
from rag_core.generators.limits import refuse_long_answers, refuse_long_contexts
from rag_core.pretrained.model_limits import refuse_tokens_beyond
from rag_core.reading.prompt import PromptConfig

# The shortest context that a prompt allows (`PromptConfig.max_context_tokens`).
_SHORTEST_CONTEXT = 8


def fitting_prompt(model: Any, prompt: PromptConfig) -> PromptConfig:
    """Return the prompt with default lengths lowered to the generator's positions.

    Raises:
        ConfigError: a length that was set explicitly is more than the generator has positions for.
    """
    generator, fitting = as_generator(model), within_positions(model, prompt)
    if "max_context_tokens" in prompt.model_fields_set:
        answer = fitting.max_answer_tokens
        refuse_long_contexts(generator, prompt.max_context_tokens, "max_context_tokens:", answer_tokens=answer)
    if "max_answer_tokens" in prompt.model_fields_set:
        context = fitting.max_context_tokens
        refuse_long_answers(generator, prompt.max_answer_tokens, "max_answer_tokens:", context_tokens=context)
    return fitting


def within_positions(model: Any, prompt: PromptConfig) -> PromptConfig:
    """Return the prompt with all lengths lowered to the generator's positions, whether set explicitly or not."""
    generator, lowered = as_generator(model), {}
    answers = generator.answer_limit(_SHORTEST_CONTEXT)
    if answers is not None and answers < prompt.max_answer_tokens:
        lowered["max_answer_tokens"] = answers
    contexts = generator.context_limit(lowered.get("max_answer_tokens", prompt.max_answer_tokens))
    if contexts is not None and contexts < prompt.max_context_tokens:
        lowered["max_context_tokens"] = contexts
    return prompt.model_copy(update=lowered)


def pad_with_an_end(tokenizer: Any, source: str) -> None:
    """Give a tokenizer without a padding token its end token for that, as many language models have none.

    Warns:
        ModelNotice: it was done. No position that counts reads padding, so results do not change.
    """
    if tokenizer.pad_token_id is None and tokenizer.eos_token_id is not None:
        tokenizer.pad_token = tokenizer.eos_token
        warnings.warn(
            f"The tokenizer of {source} has no padding token, so its end token {tokenizer.eos_token!r} pads batches.",
            ModelNotice,
            stacklevel=3,
        )


def refuse_tokenizer(model: Any, tokenizer: Any, source: str) -> None:
    """Raise ConfigError if the tokenizer does not fit the generator: it lacks a padding token, or has too many tokens.

    Args:
        model: the generator.
        tokenizer: the tokenizer found beside it.
        source: where both come from, for the message.
    """
    if tokenizer.pad_token_id is None:
        raise ConfigError(
            f"The tokenizer of the generator {source} has no padding token, which batches need. Set pad_token in its "
            "tokenizer_config.json, or choose another generator."
        )
    generator = as_generator(model)
    rows, tokens = generator.rows, generator.tokens
    refuse_tokens_beyond(rows, tokenizer, f"the generator {source}")
    beyond = [token for token in (*tokens.prompt, *tokens.ends, tokens.pad) if not 0 <= token < rows]
    if beyond:
        raise ConfigError(
            f"The generator {source} starts, ends or pads with token {beyond[0]}, but it has {rows} embeddings. "
            "Correct its generation_config.json."
        )
