"""The decoder-only kind of generator: one stack reads the context and writes the answer behind it.

p(a_t | q, z, a_<t) is the model's next-token distribution after the context's tokens and the answer so far.

Legend: N contexts, S context tokens, T answer tokens, X tokens of a row, n rows of a group, w its width, D hidden size,
M labels, V vocabulary.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from rag_core.cpu.training_kernels import training_kernels
from rag_core.generators.decoder_only.layout import with_answers, without_gaps
from rag_core.generators.decoder_only.passage_decoder import DecoderOnlyPassageDecoder
from rag_core.generators.generation_tokens import GenerationTokens
from rag_core.generators.grouping import groups_by_width, one_look_up
from rag_core.generators.limits import refuse_long_contexts
from rag_core.generators.token_log_probs import IGNORE_INDEX, projected_only_at, token_log_probs


class DecoderOnlyGenerator:
    """A Transformers causal language model; the methods are those of `Generator`."""

    def __init__(self, model: Any) -> None:
        self.model = model

    @property
    def tokens(self) -> GenerationTokens:
        return GenerationTokens.of(self.model)

    @property
    def rows(self) -> int:
        return int(self.model.get_input_embeddings().num_embeddings)

    @property
    def reads_with(self) -> str:
        return f"the generator ({type(self.model).__name__})"

    writes_with = reads_with

    def context_limit(self, answer_tokens: int) -> int | None:
        # An answer's last token is never read.
        positions = self._positions()
        return None if positions is None else positions - answer_tokens + 1

    def answer_limit(self, context_tokens: int) -> int | None:
        positions = self._positions()
        return None if positions is None else positions - context_tokens + 1

    def answer_log_probs(
        self, input_ids_NS: Tensor, attention_mask_NS: Tensor, labels_NT: Tensor
    ) -> tuple[Tensor, torch.dtype]:
        """Context and answer are read in one pass, in groups of like length."""
        model, pad, labelled_NT = self.model, self.tokens.pad, labels_NT != IGNORE_INDEX
        contexts = without_gaps(input_ids_NS, attention_mask_NS, pad)
        rows, needed_NX = with_answers(contexts, labels_NT, pad)
        widths: list[int] = rows.lengths_N.tolist()
        refuse_long_contexts(self, max(widths, default=0), "contexts and answers of")
        groups, log_probs, dtype = groups_by_width(widths), [], torch.float32
        embeddings = model.get_input_embeddings()
        with training_kernels(model):
            embedded_NXD = embeddings(rows.input_ids_NX)
            for group in groups:
                rows_n = torch.tensor(group, device=labels_NT.device)
                part = rows_n, slice(0, widths[group[0]])
                embedding_nwD = one_look_up(embeddings, rows.input_ids_NX[part], embedded_NXD[part])
                with embedding_nwD as ids_nw, projected_only_at(model, needed_NX[part]):
                    logits_MV = model(input_ids=ids_nw, use_cache=False).logits
                dtype = logits_MV.dtype
                log_probs.append(token_log_probs(logits_MV, labels_NT[rows_n][labelled_NT[rows_n]]))
        order_N = torch.tensor([row for group in groups for row in group], device=labels_NT.device)
        grouped_NT = log_probs[0].new_zeros(labels_NT.shape).masked_scatter(labelled_NT[order_N], torch.cat(log_probs))
        return grouped_NT[order_N.argsort()], dtype

    def passage_decoder(
        self, input_ids_NS: Tensor, attention_mask_NS: Tensor, *, use_cache: bool
    ) -> DecoderOnlyPassageDecoder:
        """The contexts are read here, once."""
        tokens = self.tokens
        contexts = without_gaps(input_ids_NS, attention_mask_NS, tokens.pad)
        refuse_long_contexts(self, contexts.input_ids_NX.shape[1])
        return DecoderOnlyPassageDecoder(self.model, tokens, contexts, use_cache=use_cache)

    def _positions(self) -> int | None:
        positions = getattr(self.model.config.get_text_config(decoder=True), "max_position_embeddings", None)
        return positions if isinstance(positions, int) else None
