"""An encoder-decoder's decoder, stepped over contexts that are encoded once.

Each context stores its keys and values once (`shared_attention.py`). Models whose attention cannot be replaced (LED)
get a copy for every hypothesis.

Legend: N contexts, S context tokens, D hidden size, W hypotheses of each context, R decoder rows (N·W), P prompt
tokens, T answer tokens, V vocabulary.
"""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch import Tensor
from transformers import DynamicCache, EncoderDecoderCache
from transformers.modeling_outputs import BaseModelOutput

from rag_core.generators.encoder_decoder.shared_attention import SharedCache, can_share
from rag_core.generators.generation_tokens import GenerationTokens


class EncoderDecoderPassageDecoder:
    """The `PassageDecoder` of an encoder-decoder.

    Args:
        model: a transformers encoder-decoder model.
        tokens: its special tokens.
        states_NSD: the contexts, encoded.
        attention_mask_NS: 1 for real tokens, 0 for padding.
        use_cache: False runs the decoder over the whole answer at every step: slower, with the same result.
    """

    def __init__(
        self,
        model: Any,
        tokens: GenerationTokens,
        states_NSD: Tensor,
        attention_mask_NS: Tensor,
        *,
        use_cache: bool = True,
    ) -> None:
        self.tokens = tokens
        self._pass = _DecoderPass(model)
        self._states_NSD = states_NSD
        self._mask_NS = attention_mask_NS
        self._use_cache = use_cache
        self._shared = use_cache and can_share(model.get_decoder())
        self._prompt_NP = torch.tensor(tokens.prompt, device=attention_mask_NS.device).expand(len(states_NSD), -1)
        self._prompt_cache = EncoderDecoderCache(DynamicCache(), DynamicCache()) if use_cache else None
        self.first_logits_NV = self._pass(self._prompt_NP, self._states_NSD, self._mask_NS, self._prompt_cache)
        self._rows: _Rows
        self.restart()

    @property
    def device(self) -> torch.device:
        return self._mask_NS.device

    def restart(self, contexts_n: Tensor | None = None) -> None:
        if self._shared:
            self._rows = _SharedRows(self._pass, SharedCache(self._prompt_cache, self._mask_NS))
        elif self._use_cache:
            self._rows = _CopiedRows(self._pass, self._prompt_cache, self._states_NSD, self._mask_NS)
        else:
            self._rows = _UncachedRows(self._pass, self._prompt_NP.unsqueeze(1), self._states_NSD, self._mask_NS)
        if contexts_n is not None:
            self._rows.select(contexts_n)

    def select(self, contexts_n: Tensor) -> None:
        self._rows.select(contexts_n)

    def step(self, tokens_NW: Tensor, parents_NW: Tensor) -> Tensor:
        return self._rows.step(tokens_NW, parents_NW).unflatten(0, tokens_NW.shape)


class _DecoderPass:
    """One pass of the decoder; returns the logits of the last position, shape (R, V)."""

    def __init__(self, generator: Any) -> None:
        self.generator = generator

    def __call__(self, decoder_input_ids_RT: Tensor, states_RSD: Tensor, mask_RS: Tensor | None, cache: Any) -> Tensor:
        logits_RTV: Tensor = self.generator(
            encoder_outputs=BaseModelOutput(last_hidden_state=states_RSD),
            attention_mask=mask_RS,
            decoder_input_ids=decoder_input_ids_RT,
            past_key_values=cache,
            use_cache=cache is not None,
        ).logits
        return logits_RTV[:, -1]


class _Rows(Protocol):
    """The state of the hypotheses; arguments as in `generator.PassageDecoder`."""

    def select(self, contexts_n: Tensor) -> None: ...
    def step(self, tokens_NW: Tensor, parents_NW: Tensor) -> Tensor: ...


class _SharedRows:
    """Keys and values are stored once per context."""

    def __init__(self, decoder_pass: _DecoderPass, cache: SharedCache) -> None:
        self._pass, self._cache = decoder_pass, cache
        config = decoder_pass.generator.get_encoder().config
        # With keys and values in the cache, the model only checks that encoder states are there.
        self._no_states_1D = torch.zeros(1, config.hidden_size, device=cache.cross_mask_N11S.device)

    def select(self, contexts_n: Tensor) -> None:
        self._cache.select(contexts_n)

    def step(self, tokens_NW: Tensor, parents_NW: Tensor) -> Tensor:
        tokens_R1 = tokens_NW.reshape(-1, 1)
        cache = self._cache.branch(parents_NW)
        with self._cache.attached(self._pass.generator.get_decoder()):
            return self._pass(tokens_R1, self._no_states_1D.expand(len(tokens_R1), -1, -1), None, cache)


class _CopiedRows:
    """Keys and values are stored once per hypothesis, and copied when hypotheses are re-ordered."""

    def __init__(self, decoder_pass: _DecoderPass, prompt: Any, states_NSD: Tensor, mask_NS: Tensor) -> None:
        self._pass, self._states_NSD, self._mask_NS = decoder_pass, states_NSD, mask_NS
        parts = (prompt.self_attention_cache, prompt.cross_attention_cache)
        copies = [DynamicCache([(layer.keys, layer.values) for layer in part.layers]) for part in parts]
        self._cache: Any = EncoderDecoderCache(*copies)
        self._width = 1

    def select(self, contexts_n: Tensor) -> None:
        hypotheses_W = torch.arange(self._width, device=contexts_n.device)
        self._cache.reorder_cache((contexts_n.unsqueeze(1) * self._width + hypotheses_W).flatten())
        self._states_NSD, self._mask_NS = self._states_NSD[contexts_n], self._mask_NS[contexts_n]

    def step(self, tokens_NW: Tensor, parents_NW: Tensor) -> Tensor:
        N, W = parents_NW.shape
        firsts_N1 = torch.arange(N, device=parents_NW.device).unsqueeze(1) * self._width
        self._cache.reorder_cache((firsts_N1 + parents_NW).flatten())
        self._width = W
        states_RSD = self._states_NSD.new_zeros(()).expand(N * W, *self._states_NSD.shape[1:])
        return self._pass(tokens_NW.reshape(-1, 1), states_RSD, self._mask_NS.repeat_interleave(W, dim=0), self._cache)


class _UncachedRows:
    """Keys and values are not stored: every step reads the whole answer again."""

    def __init__(self, decoder_pass: _DecoderPass, prompt_N1P: Tensor, states_NSD: Tensor, mask_NS: Tensor) -> None:
        self._pass, self._read_NWT = decoder_pass, prompt_N1P
        self._states_NSD, self._mask_NS = states_NSD, mask_NS

    def select(self, contexts_n: Tensor) -> None:
        self._read_NWT = self._read_NWT[contexts_n]
        self._states_NSD, self._mask_NS = self._states_NSD[contexts_n], self._mask_NS[contexts_n]

    def step(self, tokens_NW: Tensor, parents_NW: Tensor) -> Tensor:
        W = parents_NW.shape[1]
        past_NWT = self._read_NWT.gather(1, parents_NW.unsqueeze(2).expand(-1, -1, self._read_NWT.shape[2]))
        self._read_NWT = torch.cat((past_NWT, tokens_NW.unsqueeze(2)), dim=2)
        states_RSD = self._states_NSD.repeat_interleave(W, dim=0)
        return self._pass(self._read_NWT.flatten(0, 1), states_RSD, self._mask_NS.repeat_interleave(W, dim=0), None)
