"""The encoder-decoder kind of generator: the encoder reads the context, the decoder writes the answer.

Legend: N contexts, S context tokens, D hidden size, T answer tokens, M labels, V vocabulary.
"""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor
from transformers.modeling_outputs import BaseModelOutput

from rag_core.cpu.bfloat16 import matmul_attention
from rag_core.cpu.packed_linears import folded_logits_bias, trainable_linears
from rag_core.generators.encoder_decoder.context_encoder import encode_contexts
from rag_core.generators.encoder_decoder.passage_decoder import EncoderDecoderPassageDecoder
from rag_core.generators.generation_tokens import GenerationTokens
from rag_core.generators.grouping import widths_of
from rag_core.generators.limits import refuse_long_contexts
from rag_core.generators.token_log_probs import IGNORE_INDEX, projected_only_at, token_log_probs
from rag_core.pretrained.model_limits import positions_of


class EncoderDecoderGenerator:
    """A Transformers encoder-decoder; the methods are those of `Generator`."""

    def __init__(self, model: Any) -> None:
        self.model = model

    @property
    def tokens(self) -> GenerationTokens:
        return GenerationTokens.of(self.model)

    @property
    def rows(self) -> int:
        # In an EncoderDecoderModel each side has its own embeddings.
        sides = (self.model.get_encoder(), self.model.get_decoder())
        return min(side.get_input_embeddings().num_embeddings for side in sides)

    @property
    def reads_with(self) -> str:
        return f"the encoder of the generator ({type(self.model).__name__})"

    @property
    def writes_with(self) -> str:
        return f"the decoder of the generator ({type(self.model).__name__})"

    def context_limit(self, answer_tokens: int) -> int | None:
        return positions_of(self.model.get_encoder())

    def answer_limit(self, context_tokens: int) -> int | None:
        limit = positions_of(self.model.get_decoder())
        return None if limit is None else limit - self.tokens.forced_first

    def answer_log_probs(
        self, input_ids_NS: Tensor, attention_mask_NS: Tensor, labels_NT: Tensor
    ) -> tuple[Tensor, torch.dtype]:
        """The decoder reads the prompt and the labels; of the prompt's positions, only the last predicts a label."""
        model, labelled_NT = self.model, labels_NT != IGNORE_INDEX
        decoder_input_ids = self.tokens.decoder_input_ids(labels_NT)
        needed_NT = torch.nn.functional.pad(labelled_NT, (decoder_input_ids.shape[1] - labels_NT.shape[1], 0))
        with folded_logits_bias(model), trainable_linears(model), projected_only_at(model, needed_NT):
            states_NSD = self._encode(input_ids_NS, attention_mask_NS)
            in_bf16 = states_NSD.device.type == "cpu" and torch.is_autocast_enabled("cpu")
            with matmul_attention(model.get_decoder()) if in_bf16 else nullcontext():
                logits_MV = model(
                    encoder_outputs=BaseModelOutput(last_hidden_state=states_NSD),
                    attention_mask=attention_mask_NS,
                    decoder_input_ids=decoder_input_ids,
                    use_cache=False,
                ).logits
        log_probs_M = token_log_probs(logits_MV, labels_NT[labelled_NT])
        log_probs_NT = log_probs_M.new_zeros(labels_NT.shape).masked_scatter(labelled_NT, log_probs_M)
        return log_probs_NT, logits_MV.dtype

    def passage_decoder(
        self, input_ids_NS: Tensor, attention_mask_NS: Tensor, *, use_cache: bool
    ) -> EncoderDecoderPassageDecoder:
        """The contexts are encoded here, once."""
        states_NSD = self._encode(input_ids_NS, attention_mask_NS)
        return EncoderDecoderPassageDecoder(self.model, self.tokens, states_NSD, attention_mask_NS, use_cache=use_cache)

    def _encode(self, input_ids_NS: Tensor, attention_mask_NS: Tensor) -> Tensor:
        refuse_long_contexts(self, max(widths_of(attention_mask_NS), default=0))
        return encode_contexts(self.model, input_ids_NS, attention_mask_NS)
