"""The tokens that steer generation, read from the generator's own generation config.

The likelihood and the decoders look up here what the decoder reads first, what ends an answer and what must not be
generated. The decoder's *prompt* is what an encoder-decoder's decoder reads before the answer: the start token and, if
the generation config forces a first token (BART's <s>, mBART's language), that token too. The prompt is not predicted:
log-probabilities are conditional on it, in training and in decoding. A decoder-only model has no such prompt, as its
answer follows the context.

Shapes: N rows, P prompt tokens, T answer tokens.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from rag_core.errors import ConfigError


@dataclass(frozen=True)
class GenerationTokens:
    """Token ids of a generator.

    Attributes:
        prompt: read by the decoder before the answer: the start token, and the forced first token if there is one;
            empty for decoder-only models.
        ends: end tokens; any of them ends an answer.
        pad: padding of batches.
        forced_end: ends every answer that is still running when max_new_tokens is reached; None forces nothing.
        suppressed: never generated.
        suppressed_first: never generated as the answer's first token.
    """

    prompt: tuple[int, ...]
    ends: tuple[int, ...]
    pad: int
    forced_end: int | None = None
    suppressed: tuple[int, ...] = ()
    suppressed_first: tuple[int, ...] = ()

    @classmethod
    def of(cls, generator: Any) -> GenerationTokens:
        """Read a generator's generation config; start, end and padding also from its config and its decoder's config.

        It reads decoder_start_token_id and forced_bos_token_id (of encoder-decoders), eos_token_id, pad_token_id,
        forced_eos_token_id, suppress_tokens, begin_suppress_tokens, and bad_words_ids of one token each. It ignores
        search settings of the generation config (num_beams, length_penalty, no_repeat_ngram_size, …): the caller
        decides how to search. A decoder-only model without a padding token is padded with an end token: no position
        that counts reads padding.

        Raises:
            ConfigError: no start, end or padding token is set, or a setting has a form that is not supported.
        """
        generation = getattr(generator, "generation_config", None)
        ends = _as_tuple(_find(generator, "eos_token_id"))
        forced_end = _as_tuple(getattr(generation, "forced_eos_token_id", None))
        bad_words = getattr(generation, "bad_words_ids", None) or []
        if any(len(word) != 1 for word in bad_words):
            raise ConfigError(
                f"The generation config of the generator ({type(generator).__name__}) forbids words of several tokens "
                "(bad_words_ids), which is not supported. Remove them from generation_config.json."
            )
        # As in transformers: a bad word that is an end token does not count.
        bad_tokens = tuple(word[0] for word in bad_words if word[0] not in ends)
        return cls(
            prompt=_decoder_prompt(generator),
            ends=ends,
            pad=_padding(generator, ends),
            forced_end=forced_end[0] if forced_end else None,
            suppressed=_as_tuple(getattr(generation, "suppress_tokens", None)) + bad_tokens,
            suppressed_first=_as_tuple(getattr(generation, "begin_suppress_tokens", None)),
        )

    @property
    def forced_first(self) -> int:
        """How many tokens of the prompt `transformers` counts as generated: 1 with a forced first token, else 0."""
        return max(0, len(self.prompt) - 1)

    def decoder_input_ids(self, labels_NT: torch.Tensor) -> torch.Tensor:
        """What the decoder reads to predict labels: the prompt, and all labels but the last; (N, P + T − 1), int64.

        The logits of the last T positions belong to the labels. Ignored labels (negative) are read as padding.
        """
        prompt_NP = labels_NT.new_tensor(self.prompt).expand(len(labels_NT), -1)
        return torch.cat((prompt_NP, labels_NT[:, :-1].where(labels_NT[:, :-1] >= 0, self.pad)), dim=1)

    def strip(self, generated_ids: list[int]) -> list[int]:
        """Generated tokens without the end token, if the last is one."""
        return generated_ids[:-1] if self.ended(generated_ids) else generated_ids

    def ended(self, generated_ids: list[int]) -> bool:
        """Whether the last generated token is an end token."""
        return bool(generated_ids) and generated_ids[-1] in self.ends


def _decoder_prompt(generator: Any) -> tuple[int, ...]:
    if not generator.config.is_encoder_decoder:
        return ()
    start = _single(generator, "decoder_start_token_id", _find(generator, "decoder_start_token_id"))
    forced = getattr(getattr(generator, "generation_config", None), "forced_bos_token_id", None)
    first = _single(generator, "forced_bos_token_id", forced)
    return (start,) if first is None else (start, first)


def _padding(generator: Any, ends: tuple[int, ...]) -> int:
    if not generator.config.is_encoder_decoder and _lookup(generator, "pad_token_id") is None:
        return ends[0]
    return int(_single(generator, "pad_token_id", _find(generator, "pad_token_id")))


def _find(generator: Any, name: str) -> Any:
    token = _lookup(generator, name)
    if token is None:
        raise ConfigError(
            f"The generator ({type(generator).__name__}) has no {name}, neither in its generation_config nor "
            "in its config; the likelihood and decoding need it. Set it in the model's folder (generation_config.json)."
        )
    return token


def _lookup(generator: Any, name: str) -> Any:
    # EncoderDecoderModel nests the configurations of its two models.
    places = (
        getattr(generator, "generation_config", None),
        generator.config,
        getattr(generator.config, "decoder", None),
    )
    return next((value for place in places if (value := getattr(place, name, None)) is not None), None)


def _as_tuple(tokens: Any) -> tuple[int, ...]:
    if tokens is None:
        return ()
    return (tokens,) if isinstance(tokens, int) else tuple(tokens)


def _single(generator: Any, name: str, token: Any) -> Any:
    if token is not None and not isinstance(token, int):
        raise ConfigError(
            f"The generator ({type(generator).__name__}) sets {name} to {token!r}; expected one token id. "
            "Set it in the model's folder (generation_config.json)."
        )
    return token
