"""Exchange with Hugging Face's RAG checkpoints: `RagSequenceForGeneration`, `RagTokenForGeneration` and `RagModel`.

Weights and tokenizers are the same on both sides. The rest differs:

- Their `config.json` holds the number of passages, the context's length and the separators that their retriever puts
  between title, text and question. It cannot hold a prompt of another form, scaled scores, poolings other than DPR's or
  the document encoder's fingerprint. These are in two files of ours that Hugging Face's classes ignore:
  `rag_model.json`, and `text_encoder.json` beside the question encoder's tokenizer. Settings that `config.json` can
  hold are read from there, since Hugging Face's training may have changed them.
- Their `RagSequenceForGeneration` decodes with the start and end tokens of the generator's part of `config.json`, their
  `RagTokenForGeneration` with `generation_config.json`. We write both and read the latter.
- Their loss takes the decoder's inputs as labels: [start, answer…, end], padded with the generator's padding token.
  Their RAG-Sequence loss adds log p(z|q) to the second token, so it is missing for answers of one token (the end).

`hf_rag_reading.py` reads checkpoints, `hf_rag_writing.py` writes them; this module holds what both need.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

from rag_core.reading.likelihood import Variant

QUESTION_TOKENIZER, GENERATOR_TOKENIZER = "question_encoder_tokenizer", "generator_tokenizer"
CLASSES: dict[Variant, str] = {"sequence": "RagSequenceForGeneration", "token": "RagTokenForGeneration"}
# Their classes keep these in the generator's config as well, and RagSequenceForGeneration decodes with that copy.
TOKEN_IDS = ("decoder_start_token_id", "bos_token_id", "eos_token_id", "pad_token_id")


class ExchangeWarning(UserWarning):
    """Hugging Face's classes and ours would treat the checkpoint differently, or a part of it is left out."""


def template_of(prefix: str, title_sep: str, doc_sep: str) -> str:
    """Return the prompt template that matches three settings of Hugging Face's `RagRetriever.postprocess_docs`.

    Their retriever makes double spaces single in the whole context; this function does so in the separators.
    """
    return f"{prefix}{{title}}{title_sep}{{text}}{doc_sep}{{question}}".replace("  ", " ")


def separators_of(template: str) -> tuple[str, str, str] | None:
    """Return (prefix, title_sep, doc_sep) of a template, or None if Hugging Face's retriever cannot make it."""
    match = re.fullmatch(r"(.*)\{title\}(.*)\{text\}(.*)\{question\}", template, flags=re.DOTALL)
    if match is None or "  " in template:
        return None
    prefix, title_sep, doc_sep = match.groups()
    return prefix, title_sep, doc_sep


def some_of(names: Iterable[str]) -> str:
    """'3 weights (a, b, …)'."""
    ordered = sorted(names)
    return f"{len(ordered)} weights ({', '.join(ordered[:3])}{', …' if len(ordered) > 3 else ''})"
