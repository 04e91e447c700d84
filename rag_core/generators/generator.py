"""The protocol between a generator and everything that uses one: likelihoods, decoders, reader, limits.

`kinds.py` says which implementation a Transformers model gets. No other module asks what kind a generator is.

Legend: N contexts, S context tokens, T answer tokens, W hypotheses of each context, V vocabulary.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from rag_core.generators.generation_tokens import GenerationTokens


class PassageDecoder(Protocol):
    """Next-token logits of answers, given their contexts. It knows nothing of beams, passages or probabilities.

    Every context has W hypotheses. A step gives each one a token, and the number of its parent: the hypothesis of the
    same context that it continues.

    Attributes:
        tokens: the generator's special tokens.
        first_logits_NV: logits of the answers' first token.
    """

    tokens: GenerationTokens
    first_logits_NV: Tensor

    @property
    def device(self) -> torch.device: ...

    def restart(self, contexts_n: Tensor | None = None) -> None:
        """Go back to the start of the answers, with one hypothesis per context; keep `contexts_n` (int64) only."""

    def select(self, contexts_n: Tensor) -> None:
        """Keep some of the present contexts only; `contexts_n` holds their int64 places."""

    def step(self, tokens_NW: Tensor, parents_NW: Tensor) -> Tensor:
        """Append a token to each hypothesis; return the next token's logits, shape (N, W, V), in the generator's dtype.

        Args:
            tokens_NW: int64, the token that each hypothesis appends.
            parents_NW: int64, the hypothesis of the previous call, in the same context, that it continues.
        """
        ...


class Generator(Protocol):
    """A Transformers model that writes answers, as the likelihoods and the decoders see it."""

    @property
    def tokens(self) -> GenerationTokens:
        """The special tokens; ConfigError if a required one is missing."""
        ...

    def answer_log_probs(
        self, input_ids_NS: Tensor, attention_mask_NS: Tensor, labels_NT: Tensor
    ) -> tuple[Tensor, torch.dtype]:
        """log p(label | context, labels before it), shape (N, T) float64, and the type of the model's logits.

        Args:
            input_ids_NS: int64 token ids of the contexts, padded on either side.
            attention_mask_NS: 1 for real tokens, 0 for padding; at least one real token in each context.
            labels_NT: int64 token ids of the answers, end token included; −100 marks ignored positions, whose result
                is 0.
        """
        ...

    def passage_decoder(self, input_ids_NS: Tensor, attention_mask_NS: Tensor, *, use_cache: bool) -> PassageDecoder:
        """Read the contexts, and return a decoder of their answers.

        Args:
            input_ids_NS: int64 token ids of the contexts, padded on either side.
            attention_mask_NS: 1 for real tokens, 0 for padding; at least one real token in each context.
            use_cache: False reads everything again at every step: slower, with the same result.
        """
        ...

    def context_limit(self, answer_tokens: int) -> int | None:
        """The longest context, in tokens, before an answer of `answer_tokens` (its end included); None: any."""
        ...

    def answer_limit(self, context_tokens: int) -> int | None:
        """The longest answer, in tokens and with its end, after a context of `context_tokens`; None: any."""
        ...

    @property
    def rows(self) -> int:
        """Rows of the embeddings: token ids must be below."""
        ...

    @property
    def reads_with(self) -> str:
        """What reads contexts, for messages: 'the encoder of the generator (T5ForConditionalGeneration)'."""
        ...

    @property
    def writes_with(self) -> str:
        """What writes answers, for messages."""
        ...
