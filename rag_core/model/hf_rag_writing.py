"""Write RAG models as Hugging Face's checkpoints; `hf_rag.py` says how these differ from our models."""

from __future__ import annotations

import contextlib
import os
import shutil
import uuid
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Protocol

import torch
import transformers
from pydantic import BaseModel
from torch import nn
from transformers import RagConfig

from rag_core.embeddings.encoder_settings import SETTINGS_FILE as ENCODER_SETTINGS_FILE
from rag_core.embeddings.text_encoder import TextEncoder
from rag_core.errors import ArtifactError, ConfigError
from rag_core.model.adapters.merging import plain_weights
from rag_core.model.hf_rag import (
    CLASSES,
    GENERATOR_TOKENIZER,
    QUESTION_TOKENIZER,
    TOKEN_IDS,
    ExchangeWarning,
    separators_of,
    some_of,
)
from rag_core.model.settings import SETTINGS_FILE, ModelSettings
from rag_core.pretrained.model_source import quiet_transformers
from rag_core.reading.likelihood import Variant


class RagParts(Protocol):
    """The parts of a `RagModel` that `write_hf_rag` writes."""

    question_encoder: TextEncoder
    generator: nn.Module
    generator_tokenizer: Any
    settings: ModelSettings

    def variant_or(self, variant: Variant | None) -> Variant: ...


def write_hf_rag(model: RagParts, folder: str | Path, *, variant: Variant | None = None) -> None:
    """Write a folder that Hugging Face's class for the variant can load, and `read_hf_rag` reads back without loss.

    The folder appears complete or not at all.

    Args:
        model: any RAG model.
        folder: new or empty.
        variant: "sequence" or "token"; default: what the model was trained as.

    Raises:
        ArtifactError: the folder already holds files.
        ConfigError: no variant is known, or Hugging Face's class cannot hold a part.

    Warns:
        ExchangeWarning: Hugging Face's retriever would score passages or join contexts differently from the model.
    """
    variant = model.variant_or(variant)
    _refuse_decoder_only(model.generator)
    _warn_of_differences(model)
    config = _hf_config(model)
    hf_class = getattr(transformers, CLASSES[variant])
    with torch.device("meta"):
        # On "meta" it takes no memory and draws no random numbers: we need only its weights' names and its saving code.
        hf_model = hf_class(config)
    weights = _hf_weights(model, hf_model)
    settings = model.settings.model_copy(update={"variant": variant})
    with _appears_whole(Path(folder)) as draft, quiet_transformers():
        hf_model.save_pretrained(draft, state_dict=weights)
        model.generator.generation_config.save_pretrained(draft)  # type: ignore[union-attr, operator]
        model.question_encoder.tokenizer.save_pretrained(draft / QUESTION_TOKENIZER)
        model.generator_tokenizer.save_pretrained(draft / GENERATOR_TOKENIZER)
        _write_settings(draft / SETTINGS_FILE, settings)
        _write_settings(draft / QUESTION_TOKENIZER / ENCODER_SETTINGS_FILE, model.question_encoder.settings)


def _refuse_decoder_only(generator: Any) -> None:
    if not getattr(generator.config, "is_encoder_decoder", False):
        raise ConfigError(
            f"Hugging Face's RAG classes hold encoder-decoders only, and the generator is a {type(generator).__name__}. "
            "Use the model's own folder: its parts are folders that Transformers loads."
        )


def _hf_config(model: RagParts) -> Any:
    """Make a RagConfig with the settings of a model that Hugging Face's classes know."""
    encoder_config: Any = model.question_encoder.model.config
    generator: Any = model.generator
    prompt = model.settings.prompt
    prefix, title_sep, doc_sep = separators_of(prompt.template) or ("", RagConfig.title_sep, RagConfig.doc_sep)
    # Their RAG-Sequence loss reads bos_token_id, which T5's configuration lacks.
    generator_values = {"bos_token_id": None, **generator.config.to_dict(), "prefix": prefix or None}
    token_ids = {name: getattr(generator.generation_config, name) for name in TOKEN_IDS}
    generator_values |= {name: value for name, value in token_ids.items() if value is not None}
    if "forced_eos_token_id" in generator_values:  # BART's configuration has it as well, and its default is not None.
        generator_values["forced_eos_token_id"] = generator.generation_config.forced_eos_token_id
    return RagConfig(
        question_encoder=encoder_config.to_dict(),
        generator=generator_values,
        n_docs=model.settings.num_docs,
        max_combined_length=prompt.max_context_tokens,
        title_sep=title_sep,
        doc_sep=doc_sep,
        retrieval_vector_size=model.question_encoder.dim,
    )


def _hf_weights(model: RagParts, hf_model: nn.Module) -> dict[str, torch.Tensor]:
    """Return the model's weights under Hugging Face's names, adapters merged."""
    parts = {"rag.question_encoder": model.question_encoder.model, "rag.generator": model.generator}
    weights = {f"{name}.{key}": value for name, part in parts.items() for key, value in plain_weights(part).items()}
    expected = {name: value.shape for name, value in hf_model.state_dict().items()}
    for name in expected.keys() - weights.keys():
        if name.startswith("rag.generator.encoder.pooler."):
            # Their class has this part and never reads it; `without_unused_pooler` has removed ours.
            weights[name] = torch.zeros(expected[name])
    differing = expected.keys() ^ weights.keys()
    if differing:
        kinds = " and ".join(type(part).__name__ for part in parts.values())
        raise ConfigError(
            f"Hugging Face's {type(hf_model).__name__} cannot hold {kinds}: their configurations give it different "
            f"weights ({some_of(differing)}). The question encoder must be a DPRQuestionEncoder or a plain encoder, "
            "the generator BART, T5 or an EncoderDecoderModel."
        )
    return weights


def _warn_of_differences(model: RagParts) -> None:
    encoder, scale = model.question_encoder.settings, model.settings.score_scale
    prompt = model.question_encoder.prompt
    differing = {
        f"{encoder.pooling} pooling": encoder.pooling != "dpr",
        "unit vectors": encoder.normalize,
        f"the prompt {prompt!r}": bool(prompt),
        "lower-cased questions": encoder.lowercase,
        f"score_scale {scale:g}": scale != 1,
    }
    if any(differing.values()):
        warnings.warn(
            "Hugging Face's class uses the question encoder's first output as the vector, and unscaled scores; "
            f"this model has {', '.join(name for name, differs in differing.items() if differs)}. In Hugging Face's "
            "class, pass doc_scores instead of a retriever.",
            ExchangeWarning,
            stacklevel=4,
        )
    rendered, template = model.settings.prompt.rendered, model.settings.prompt.template
    if separators_of(template) is None:
        written = template if rendered is None else rendered.context
        warnings.warn(
            "Hugging Face's retriever joins a context as prefix, title, title_sep, text, doc_sep, question, with "
            f"single spaces; the prompt {written!r} has another form. In Hugging Face's class, pass context_input_ids "
            "instead of a retriever.",
            ExchangeWarning,
            stacklevel=4,
        )


@contextlib.contextmanager
def _appears_whole(folder: Path) -> Iterator[Path]:
    """Yield a draft folder that is renamed to `folder` at the end, or removed after an error."""
    folder = Path(os.path.abspath(folder))
    if folder.exists() and (folder.is_file() or any(folder.iterdir())):
        raise ArtifactError(f"{folder} already exists and was not changed. Give a new or empty folder.")
    folder.parent.mkdir(parents=True, exist_ok=True)
    draft = folder.parent / f".{folder.name}.draft-{uuid.uuid4().hex[:8]}"
    draft.mkdir()
    try:
        yield draft
        os.replace(draft, folder)
    finally:
        shutil.rmtree(draft, ignore_errors=True)


def _write_settings(path: Path, settings: BaseModel) -> None:
    path.write_text(settings.model_dump_json(indent=2) + "\n", encoding="utf-8")
