"""Hugging Face's RAG classes around a tiny generator, as references on identical weights.

Legend: B questions, K passages per question, S context tokens, T answer tokens.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import DPRConfig, DPRQuestionEncoder, RagConfig, RagSequenceForGeneration, RagTokenForGeneration

CLASSES: dict[str, Any] = {"sequence": RagSequenceForGeneration, "token": RagTokenForGeneration}


def hf_rag(generator: Any, variant: str) -> Any:
    """Their model around `generator` itself (not a copy) and its generation config. The encoder is never called."""
    question_encoder = DPRQuestionEncoder(
        DPRConfig(vocab_size=9, hidden_size=8, num_hidden_layers=1, num_attention_heads=1, intermediate_size=8)
    )
    head = generator.get_output_embeddings().weight
    config = RagConfig.from_question_encoder_generator_configs(question_encoder.config, generator.config)
    model = CLASSES[variant](config=config, question_encoder=question_encoder, generator=generator).eval()
    generator.get_output_embeddings().weight = head  # undo their tying: tiny models have an untied head
    model.generation_config = generator.generation_config
    return model


def hf_loss(model: Any, contexts: tuple[Tensor, Tensor, Tensor], labels: list[list[int]], **options: Any) -> Tensor:
    """Their loss of each question. In their convention labels are the decoder's inputs, so the first is not scored.

    `labels` are answers preceded by all tokens that the decoder reads first; they are padded to one length.
    """
    input_ids_BKS, attention_mask_BKS, doc_scores_BK = contexts
    pad = model.config.generator.pad_token_id
    longest = max(len(row) for row in labels)
    return model(
        context_input_ids=input_ids_BKS.flatten(0, 1),
        context_attention_mask=attention_mask_BKS.flatten(0, 1),
        doc_scores=doc_scores_BK,
        labels=torch.tensor([row + [pad] * (longest - len(row)) for row in labels]),
        n_docs=doc_scores_BK.shape[1],
        **options,
    ).loss


def hf_generate(model: Any, contexts: tuple[Tensor, Tensor, Tensor], **options: Any) -> list[list[int]]:
    """Their sequences without the start token, ordered by question, then by rank."""
    input_ids_BKS, attention_mask_BKS, doc_scores_BK = contexts
    model.config.n_docs = doc_scores_BK.shape[1]  # their RAG-Sequence scores with this and ignores generate()'s n_docs
    return model.generate(
        context_input_ids=input_ids_BKS.flatten(0, 1),
        context_attention_mask=attention_mask_BKS.flatten(0, 1),
        doc_scores=doc_scores_BK,
        n_docs=doc_scores_BK.shape[1],
        do_sample=False,
        **options,
    )[:, 1:].tolist()
