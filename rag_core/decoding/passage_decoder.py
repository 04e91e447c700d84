"""The generator's decoder over contexts that are encoded once.

The cross-attention keys and values of the contexts are computed once, by `start`, and copied for every row that reads
them afterwards. The decoder knows nothing of beams, passages or probabilities: rows read contexts, and continue rows.

Legend: N contexts, S context tokens, D hidden size, R decoder rows, P prompt tokens, T answer tokens, V vocabulary,
C (answer, context) pairs scored together.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, EncoderDecoderCache
from transformers.modeling_outputs import BaseModelOutput

from rag_core.generation_tokens import GenerationTokens


class PassageDecoder:
    """Next-token logits of answers that read given contexts.

    Args:
        generator: a transformers encoder-decoder model.
        input_ids_NS: int64 token ids of the contexts, padded.
        attention_mask_NS: 1 for real tokens, 0 for padding.
        use_cache: False runs the decoder over the whole answer at every step: slower, with the same result.
    """

    def __init__(
        self, generator: Any, input_ids_NS: Tensor, attention_mask_NS: Tensor, *, use_cache: bool = True
    ) -> None:
        self.generator = generator
        self.tokens = GenerationTokens.of(generator)
        self.use_cache = use_cache
        self.mask_NS = attention_mask_NS
        self.states_NSD: Tensor = generator.get_encoder()(
            input_ids=input_ids_NS, attention_mask=attention_mask_NS, return_dict=True
        ).last_hidden_state
        self._cache: Any = None
        self._cross: list[tuple[Tensor, Tensor]] = []
        self.vocab_size = 0  # known after `start`

    def start(self) -> Tensor:
        """Logits of the answers' first token for all contexts, shape (N, V), float32 or float64."""
        N = len(self.mask_NS)
        prompt_NP = torch.tensor(self.tokens.prompt, device=self.mask_NS.device).expand(N, -1)
        self._cache = EncoderDecoderCache(DynamicCache(), DynamicCache()) if self.use_cache else None
        logits_NV = self._forward(prompt_NP, self.states_NSD, self.mask_NS, self._cache)[:, -1]
        if self.use_cache:
            self._cross = [(layer.keys, layer.values) for layer in self._cache.cross_attention_cache.layers]
        self.vocab_size = logits_NV.shape[-1]
        return logits_NV

    def step(self, answers_RT: Tensor, contexts_R: Tensor, parents_R: Tensor | None, same_contexts: bool) -> Tensor:
        """Logits of the next token, shape (R, V), float32 or float64.

        Args:
            answers_RT: int64, the tokens of each row's answer so far, T ≥ 1.
            contexts_R: int64, the context that each row reads.
            parents_R: int64, for each row the row of the previous call that it continues by one token; None if all
                rows stayed where they were.
            same_contexts: every row reads the context that its place in the previous call read.
        """
        if not self.use_cache:
            inputs_RT = torch.cat(
                (answers_RT.new_tensor(self.tokens.prompt).expand(len(answers_RT), -1), answers_RT), 1
            )
            return self._forward(inputs_RT, self.states_NSD[contexts_R], self.mask_NS[contexts_R], None)[:, -1]
        if parents_R is not None:
            self._cache.self_attention_cache.reorder_cache(parents_R)
            if not same_contexts:
                self._cache.cross_attention_cache.reorder_cache(parents_R)
        return self._read_cached(answers_RT[:, -1:], contexts_R, self._cache)[:, -1]

    def score(self, answers_CT: Tensor, contexts_C: Tensor) -> Tensor:
        """Logits of whole answers, shape (C, T, V), float32 or float64: position t predicts token t. After `start`.

        Padding behind an answer needs no mask: the decoder looks back only.
        """
        inputs_CT = self.tokens.decoder_input_ids(answers_CT)
        if self.use_cache:
            rows = [(keys[contexts_C], values[contexts_C]) for keys, values in self._cross]
            cache = EncoderDecoderCache(DynamicCache(), DynamicCache(rows))
            logits = self._read_cached(inputs_CT, contexts_C, cache)
        else:
            logits = self._forward(inputs_CT, self.states_NSD[contexts_C], self.mask_NS[contexts_C], None)
        return logits[:, -answers_CT.shape[1] :]

    def _read_cached(self, decoder_input_ids: Tensor, contexts_R: Tensor, cache: Any) -> Tensor:
        # With cross-attention keys and values in the cache, the encoder's states are read for their shape alone.
        shape = (len(contexts_R), *self.states_NSD.shape[1:])
        states_RSD = self.states_NSD.new_zeros(()).expand(shape)
        return self._forward(decoder_input_ids, states_RSD, self.mask_NS[contexts_R], cache)

    def _forward(self, decoder_input_ids: Tensor, states_RSD: Tensor, mask_RS: Tensor, cache: Any) -> Tensor:
        logits: Tensor = self.generator(
            encoder_outputs=BaseModelOutput(last_hidden_state=states_RSD),
            attention_mask=mask_RS,
            decoder_input_ids=decoder_input_ids,
            past_key_values=cache,
            use_cache=cache is not None,
        ).logits
        return logits if logits.dtype == torch.float64 else logits.float()


@contextmanager
def decoding_mode(generator: Any) -> Iterator[None]:
    """Evaluation mode without autograd; afterwards every module is back in the mode it was in."""
    was_training = [(module, module.training) for module in generator.modules()]
    generator.eval()
    try:
        with torch.inference_mode():
            yield
    finally:
        for module, training in was_training:
            module.training = training
