"""Question and passage to the generator's input.

How the two are joined is one template, stored with the model, so that inference cannot differ from training. When a
context is too long the passage's text is cut, never the question. This module knows nothing of retrieval.

Shapes: B questions, K passages per question, S context tokens, T answer tokens.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import torch
from pydantic import BaseModel, ConfigDict, Field, field_validator

from rag_core.errors import ConfigError
from rag_core.passages import Passage
from rag_core.text_encoder import pad_ids

IGNORE_INDEX = -100


class PromptConfig(BaseModel):
    """How title, text and question become the generator's input.

    The default is the paper's (Hugging Face's `title_sep` and `doc_sep`). A T5 model may want
    `question: {question} context: {title} {text}`.
    """

    model_config = ConfigDict(extra="forbid")

    template: str = Field(
        "{title} / {text} // {question}", description="must hold {text} and {question}; {title} is optional"
    )
    max_context_tokens: int = Field(256, ge=8, description="the passage's text is cut so that a context fits")
    max_answer_tokens: int = Field(32, ge=2, description="longest answer in training, end token included")

    @field_validator("template")
    @classmethod
    def _holds_both(cls, template: str) -> str:
        if template.count("{text}") != 1 or template.count("{question}") != 1 or template.count("{title}") > 1:
            raise ValueError("the template must hold {text} and {question} once each, and {title} at most once")
        return template


def assemble_contexts(
    tokenizer: Any,
    prompt: PromptConfig,
    questions: Sequence[str],
    passages_BK: Sequence[Sequence[Passage]],
    device: torch.device,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Join every question to each of its K passages.

    Returns:
        input_ids_BKS and attention_mask_BKS, int64, padded on the right to the longest context.

    Raises:
        ConfigError: a question alone does not fit into `max_context_tokens`.
    """
    pairs = [
        _fill(prompt.template, question, passage)
        for question, passages_K in zip(questions, passages_BK, strict=True)
        for passage in passages_K
    ]
    encoded = tokenizer([text for text, _, _ in pairs], return_offsets_mapping=True)
    ids = [
        one if len(one) <= prompt.max_context_tokens else _cut_text(one, offsets, pair, prompt)
        for one, offsets, pair in zip(encoded["input_ids"], encoded["offset_mapping"], pairs, strict=True)
    ]
    input_ids_PS, mask_PS = pad_ids(ids, tokenizer.pad_token_id, device)
    shape = (len(questions), len(passages_BK[0]), -1)
    return input_ids_PS.view(shape), mask_PS.view(shape)


def answer_labels(tokenizer: Any, answers: Sequence[str], max_answer_tokens: int, device: torch.device) -> torch.Tensor:
    """labels_BT int64: the answers' tokens with the end token, padded with -100, without a start token.

    Raises:
        ConfigError: the tokenizer has no end token.
    """
    end = end_token_id(tokenizer)
    ids = tokenizer(list(answers), add_special_tokens=False)["input_ids"]
    labels = [[*one[: max_answer_tokens - 1], end] for one in ids]
    labels_BT, mask_BT = pad_ids(labels, IGNORE_INDEX, device)
    return labels_BT.masked_fill(mask_BT == 0, IGNORE_INDEX)


def end_token_id(tokenizer: Any) -> int:
    """The token that ends an answer: the tokenizer's EOS, or SEP for BERT-like tokenizers."""
    end = tokenizer.eos_token_id if tokenizer.eos_token_id is not None else tokenizer.sep_token_id
    if end is None:
        raise ConfigError("The generator's tokenizer has neither an EOS nor a SEP token, so answers could never end.")
    return int(end)


def _fill(template: str, question: str, passage: Passage) -> tuple[str, int, int]:
    """The context as text, and where in it the passage's text starts and ends."""
    # Not str.format: braces inside a passage must stay as they are.
    fields = {"{title}": passage.title, "{question}": question}
    before, after = (
        re.sub(r"\{title\}|\{question\}", lambda m: fields[m.group()], part) for part in template.split("{text}")
    )
    return before + passage.text + after, len(before), len(before) + len(passage.text)


def _cut_text(
    ids: list[int], offsets: list[tuple[int, int]], pair: tuple[str, int, int], prompt: PromptConfig
) -> list[int]:
    """Drop tokens from the end of the passage's text until the context fits."""
    _, start, end = pair
    inside = [place for place, (first, last) in enumerate(offsets) if last > first and first >= start and last <= end]
    excess = len(ids) - prompt.max_context_tokens
    if excess > len(inside):
        raise ConfigError(
            f"A question with its title takes {len(ids) - len(inside)} tokens, but max_context_tokens is "
            f"{prompt.max_context_tokens}. Shorten the question or raise max_context_tokens."
        )
    dropped = set(inside[len(inside) - excess :])
    return [one for place, one in enumerate(ids) if place not in dropped]
