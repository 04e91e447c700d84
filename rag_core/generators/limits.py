"""Refuse contexts and answers that are longer than a generator's positions.

A position beyond its table raises an index error deep inside the model, often hours into a run; on a GPU it is a device
assertion that kills the process. Rotary positions have no table, but beyond `max_position_embeddings` a model writes
nonsense. The checks here refuse such settings before the work starts.
"""

from __future__ import annotations

from rag_core.errors import ConfigError
from rag_core.generators.generator import Generator


def refuse_long_contexts(
    generator: Generator, tokens: int, setting: str = "contexts of", *, answer_tokens: int = 1
) -> None:
    """Raise ConfigError if there are too few positions for a context of `tokens`; `setting` begins the message."""
    limit = generator.context_limit(answer_tokens)
    if limit is not None and tokens > limit:
        raise ConfigError(
            f"{setting} {tokens} tokens are more than {generator.reads_with} has positions for: {limit}. Set "
            f"prompt.max_context_tokens to at most {limit}, or choose another generator."
        )


def refuse_long_answers(
    generator: Generator, tokens: int, setting: str = "answers of", *, context_tokens: int = 1
) -> None:
    """Raise ConfigError if there are too few positions for an answer of `tokens`, end token included.

    A forced first token needs one more position. `setting` begins the message.
    """
    limit = generator.answer_limit(context_tokens)
    if limit is not None and tokens > limit:
        raise ConfigError(
            f"{setting} {tokens} tokens are more than {generator.writes_with} has positions for: {limit}. Set "
            f"prompt.max_answer_tokens to at most {limit}, or choose another generator."
        )


def refuse_long_search(generator: Generator, max_new_tokens: int, *, context_tokens: int = 1) -> None:
    """Raise ConfigError if `max_new_tokens` is more than the positions, or all taken by a forced first token.

    `max_new_tokens` includes a forced first token.
    """
    forced = generator.tokens.forced_first
    if max_new_tokens <= forced:
        raise ConfigError("max_new_tokens is 1, which the generator's forced first token takes up; raise it.")
    limit = generator.answer_limit(context_tokens)
    if limit is not None and max_new_tokens > limit + forced:
        raise ConfigError(
            f"max_new_tokens {max_new_tokens} is more than {generator.writes_with} has positions for: "
            f"{limit + forced}. Set max_new_tokens to at most {limit + forced}."
        )
