"""Exchange with Hugging Face's RAG checkpoints: `RagSequenceForGeneration`, `RagTokenForGeneration` and `RagModel`.

Weights and tokenizers are the same on both sides; what differs is what surrounds them:

- Their `config.json` holds the number of passages, the context's length and the separators that their retriever puts
  between title, text and question. A prompt of another form, scaled scores, poolings other than DPR's and the
  document encoder's fingerprint have no place there. They travel in two files of ours that Hugging Face's classes
  ignore: `rag_model.json`, and `text_encoder.json` beside the question encoder's tokenizer. Where `config.json` can
  say a thing, it wins: their training may have changed it since.
- Their `RagSequenceForGeneration` decodes with the start and end tokens of the generator's part of `config.json`, their
  `RagTokenForGeneration` with `generation_config.json`. Both are written; the latter is read.
- Their loss takes the decoder's inputs as labels: [start, answer…, end], padded with the generator's padding token.
  Their RAG-Sequence loss adds log p(z|q) to the second token, and so loses it in answers of one token, end included.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import uuid
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Protocol, TypeVar, get_args

import torch
import transformers
from pydantic import BaseModel, ValidationError
from torch import nn
from transformers import GenerationConfig, RagConfig

from rag_core.embeddings.encoder_settings import SETTINGS_FILE as ENCODER_SETTINGS_FILE
from rag_core.embeddings.encoder_settings import EncoderSettings, Pooling, position_limit
from rag_core.embeddings.text_encoder import TextEncoder
from rag_core.errors import ArtifactError, ConfigError
from rag_core.model.reader import without_unused_pooler
from rag_core.model.settings import SETTINGS_FILE, ModelSettings
from rag_core.pretrained.dpr_tokenizer import with_saved_case
from rag_core.pretrained.model_source import (
    load_config,
    load_from_source,
    load_tokenizer,
    model_file,
    quiet_transformers,
    resolve_model_source,
    weights_options,
)
from rag_core.reading.generator_limits import within_positions
from rag_core.reading.likelihood import Variant
from rag_core.reading.prompt import PromptConfig

QUESTION_TOKENIZER, GENERATOR_TOKENIZER = "question_encoder_tokenizer", "generator_tokenizer"
CLASSES: dict[Variant, str] = {"sequence": "RagSequenceForGeneration", "token": "RagTokenForGeneration"}
# Their classes keep these in the generator's config, too, and RagSequenceForGeneration decodes with those.
_TOKEN_IDS = ("decoder_start_token_id", "bos_token_id", "eos_token_id", "pad_token_id")
_STEERING_TOKENS = (
    *_TOKEN_IDS,
    "forced_bos_token_id",
    "forced_eos_token_id",
    "suppress_tokens",
    "begin_suppress_tokens",
    "bad_words_ids",
)

Settings = TypeVar("Settings", bound=BaseModel)


class ExchangeWarning(UserWarning):
    """Something that does not mean the same on both sides."""


class RagParts(Protocol):
    """What is written of a `RagModel`."""

    question_encoder: TextEncoder
    generator: nn.Module
    generator_tokenizer: Any
    settings: ModelSettings

    def variant_or(self, variant: Variant | None) -> Variant: ...


def read_hf_rag(
    folder_or_hub_name: str | Path, *, pooling: Pooling | None = None, trust_remote_code: bool = False
) -> tuple[TextEncoder, nn.Module, Any, ModelSettings]:
    """Read a RAG checkpoint of Hugging Face's: question encoder, generator, its tokenizer, and settings.

    The variant follows from the class that `config.json` names (a plain `RagModel` has none). The generator gets what
    `generation_config.json` sets. Length and separators become the prompt's, the separators' double spaces made single
    as their retriever does.

    Args:
        folder_or_hub_name: a local folder, a hub name with or without `@REVISION`, or `package:NAME/FOLDER`.
        pooling: for a question encoder other than DPR's. Hugging Face's class knows DPR's vector only, so that such a
            checkpoint does not say how its vectors are made, unless `write_hf_rag` made it.
        trust_remote_code: run code of the checkpoint's.

    Raises:
        ConfigError: not a RAG checkpoint, weights or a tokenizer missing, unreadable files, or a pooling that is needed
            or does not fit.

    Warns:
        ExchangeWarning: the checkpoint has weights that the model has no place for.
    """
    source, config = _rag_config(folder_or_hub_name, trust_remote_code)
    architecture = (config.architectures or ["RagModel"])[0]
    if architecture not in ("RagModel", *CLASSES.values()):
        known = ", ".join(("RagModel", *CLASSES.values()))
        raise ConfigError(f"{source}: config.json names the class {architecture!r}; {known} can be read.")
    ours = _read_settings(source, SETTINGS_FILE, ModelSettings)
    settings = _model_settings(source, config, architecture, ours)
    encoder_settings = _encoder_settings(source, config.question_encoder, pooling)
    question_tokenizer = _load_tokenizer(source, QUESTION_TOKENIZER, config.question_encoder)
    generator_tokenizer = _load_tokenizer(source, GENERATOR_TOKENIZER, config.generator)
    parts = _load_weights(source, config, architecture)
    longest = min(encoder_settings.max_tokens, position_limit(parts.question_encoder))
    encoder_settings = encoder_settings.model_copy(update={"max_tokens": longest})
    question_encoder = TextEncoder(parts.question_encoder, question_tokenizer, encoder_settings, "question")
    generator = without_unused_pooler(parts.generator)
    _take_generation_config(generator, source)
    settings.prompt = within_positions(generator, settings.prompt)
    return question_encoder, generator, generator_tokenizer, settings


def write_hf_rag(model: RagParts, folder: str | Path, *, variant: Variant | None = None) -> None:
    """Write a folder that Hugging Face's class of the variant loads, and `read_hf_rag` reads back complete.

    The folder appears whole or not at all.

    Args:
        model: any RAG model.
        folder: new or empty.
        variant: "sequence" or "token"; default: what the model was trained as.

    Raises:
        ArtifactError: the folder holds files already.
        ConfigError: no variant known, or a part that Hugging Face's class cannot hold.

    Warns:
        ExchangeWarning: Hugging Face's retriever would score passages or join contexts otherwise than the model does.
    """
    variant = model.variant_or(variant)
    _warn_of_differences(model)
    config = _hf_config(model)
    hf_class = getattr(transformers, CLASSES[variant])
    with torch.device("meta"):
        # Without memory or random numbers: only the names of its weights and its way of saving are needed.
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


def template_of(prefix: str, title_sep: str, doc_sep: str) -> str:
    """The prompt that Hugging Face's `RagRetriever.postprocess_docs` makes of its three settings.

    It makes double spaces of the whole context single; here those of the separators are.
    """
    return f"{prefix}{{title}}{title_sep}{{text}}{doc_sep}{{question}}".replace("  ", " ")


def separators_of(template: str) -> tuple[str, str, str] | None:
    """(prefix, title_sep, doc_sep) of a template, or None if Hugging Face's retriever cannot make it."""
    found = re.fullmatch(r"(.*)\{title\}(.*)\{text\}(.*)\{question\}", template, flags=re.DOTALL)
    if found is None or "  " in template:
        return None
    prefix, title_sep, doc_sep = found.groups()
    return prefix, title_sep, doc_sep


def _rag_config(folder_or_hub_name: str | Path, trust_remote_code: bool) -> tuple[str, Any]:
    """Where the checkpoint is, and its RagConfig."""
    folder = Path(folder_or_hub_name)
    if (folder / SETTINGS_FILE).is_file() and not (folder / "config.json").is_file():
        raise ConfigError(
            f"{folder} is a RAG model of this program, not one of Hugging Face's. Use it as it is "
            "(RagModel.from_pretrained, --model)."
        )
    source = resolve_model_source(folder_or_hub_name, trust_remote_code=trust_remote_code)
    config = load_config(source, trust_remote_code=trust_remote_code)
    if config.model_type != "rag":
        part = "generator" if config.is_encoder_decoder else "question_encoder"
        raise ConfigError(
            f"{source} is no RAG checkpoint: its model_type is {config.model_type!r}, where 'rag' was expected. "
            f"A model of its own becomes part of a RAG model by naming it as {part} in the model section of a "
            "configuration."
        )
    # A dtype noted for a part would round its weights before they become float32.
    config.question_encoder.dtype = config.generator.dtype = None
    return source, config


def _load_weights(source: str, config: Any, architecture: str) -> Any:
    """Hugging Face's RagModel with all its weights, float32."""
    hf_class = getattr(transformers, architecture)
    model, report = load_from_source(
        hf_class.from_pretrained,
        source,
        config=config,
        dtype=torch.float32,
        output_loading_info=True,
        **weights_options(source),
    )
    if report["missing_keys"]:
        raise ConfigError(
            f"{source} lacks {_some_of(report['missing_keys'])} that its config.json asks for; random numbers would "
            "take their place. Copy the checkpoint again."
        )
    # A document encoder is saved along after joint training; it is not part of the model.
    unexpected = [name for name in report["unexpected_keys"] if "ctx_encoder." not in name]
    if unexpected:
        warnings.warn(
            f"{source} has {_some_of(unexpected)} that its config.json has no place for; they are left out.",
            ExchangeWarning,
            stacklevel=4,
        )
    return model if architecture == "RagModel" else model.rag


def _model_settings(source: str, config: Any, architecture: str, ours: ModelSettings | None) -> ModelSettings:
    variant = {name: variant for variant, name in CLASSES.items()}.get(architecture)
    template = template_of(getattr(config.generator, "prefix", None) or "", config.title_sep, config.doc_sep)
    rest: dict[str, Any] = {}
    if ours is not None:
        rest["max_answer_tokens"] = ours.prompt.max_answer_tokens
        if separators_of(ours.prompt.template) is None:
            template = ours.prompt.template
    try:
        prompt = PromptConfig(template=template, max_context_tokens=config.max_combined_length, **rest)
    except ValidationError as error:
        raise ConfigError(
            f"{source}: prefix, title_sep, doc_sep or max_combined_length of config.json make no prompt: "
            f"{error.errors()[0]['msg']} (found {template!r}, {config.max_combined_length}). Correct config.json."
        ) from error
    settings = ModelSettings(variant=variant, num_docs=config.n_docs, prompt=prompt)
    if ours is None:
        return settings
    kept = {name: getattr(ours, name) for name in ("score_scale", "document_encoder_fingerprint")}
    return settings.model_copy(update=kept)


def _encoder_settings(source: str, config: Any, pooling: Pooling | None) -> EncoderSettings:
    is_dpr = config.model_type == "dpr"
    if pooling is not None and is_dpr != (pooling == "dpr"):
        fitting = "dpr alone" if is_dpr else ", ".join(one for one in get_args(Pooling) if one != "dpr")
        raise ConfigError(f"{source}: the question encoder is a {config.model_type}; its pooling can be {fitting}.")
    settings = _read_settings(source, f"{QUESTION_TOKENIZER}/{ENCODER_SETTINGS_FILE}", EncoderSettings)
    if settings is not None:
        return settings if pooling is None else settings.model_copy(update={"pooling": pooling})
    if pooling is None and not is_dpr:
        raise ConfigError(
            f"{source}: the question encoder is a {config.model_type}, not DPR's, and a RAG checkpoint does not say how "
            "its states become a vector. Give pooling (--pooling), such as mean or cls."
        )
    return EncoderSettings(pooling=pooling or "dpr", max_tokens=256, title_separator=" [SEP] " if is_dpr else " ")


def _load_tokenizer(source: str, subfolder: str, config: Any) -> Any:
    if Path(source).is_dir() and not (Path(source) / subfolder).is_dir():
        raise ConfigError(
            f"{source} has no folder {subfolder}/, so no text can be read. Save the tokenizers beside the weights with "
            "RagTokenizer.save_pretrained."
        )
    # Older checkpoints have no config.json beside the tokenizer, which would say of what kind it is.
    return with_saved_case(load_tokenizer(source, subfolder, config=config), source, subfolder)


def _take_generation_config(generator: Any, source: str) -> None:
    """Set on the generator what generation_config.json sets, or, where there is none, the generator's part of config.json.

    Checkpoints that are older than generation_config.json have forced and suppressed tokens there, which Transformers
    takes over for a model of its own, not for a part of one.
    """
    if model_file(source, "generation_config.json") is not None:
        # Settings alone: no code.
        read = GenerationConfig.from_pretrained  # nosec B615
        given = load_from_source(lambda name, **_: read(name), source).to_diff_dict()
        bookkeeping = ("transformers_version", "_from_model_config")
        values = {name: value for name, value in given.items() if name not in bookkeeping}
    else:
        config, _ = RagConfig.get_config_dict(source)
        part = config["generator"]
        values = {name: part[name] for name in _STEERING_TOKENS if part.get(name) is not None}
    generator.generation_config.update(**values)


def _hf_config(model: RagParts) -> Any:
    """The RagConfig of a model: what Hugging Face's classes can know of it."""
    encoder_config: Any = model.question_encoder.model.config
    generator: Any = model.generator
    prompt = model.settings.prompt
    prefix, title_sep, doc_sep = separators_of(prompt.template) or ("", RagConfig.title_sep, RagConfig.doc_sep)
    # Their RAG-Sequence loss asks for bos_token_id, which T5's configuration has not.
    generator_values = {"bos_token_id": None, **generator.config.to_dict(), "prefix": prefix or None}
    token_ids = {name: getattr(generator.generation_config, name) for name in _TOKEN_IDS}
    generator_values |= {name: value for name, value in token_ids.items() if value is not None}
    if "forced_eos_token_id" in generator_values:  # BART's configuration has it, too, and its default is not None.
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
    """The model's weights under the names that Hugging Face's class gives them."""
    parts = {"rag.question_encoder": model.question_encoder.model, "rag.generator": model.generator}
    weights = {f"{name}.{key}": value for name, part in parts.items() for key, value in part.state_dict().items()}
    expected = {name: value.shape for name, value in hf_model.state_dict().items()}
    for name in expected.keys() - weights.keys():
        if name.startswith("rag.generator.encoder.pooler."):
            # Their class makes one and never reads it; `without_unused_pooler` has taken ours away.
            weights[name] = torch.zeros(expected[name])
    differing = expected.keys() ^ weights.keys()
    if differing:
        kinds = " and ".join(type(part).__name__ for part in parts.values())
        raise ConfigError(
            f"Hugging Face's {type(hf_model).__name__} cannot hold {kinds}: it makes other weights of their "
            f"configurations ({_some_of(differing)}). A DPRQuestionEncoder or a plain encoder, and BART, T5 or an "
            "EncoderDecoderModel can be exchanged."
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
            "Hugging Face's class takes the question encoder's first output as the vector, and its scores as they are; "
            f"this model has {', '.join(name for name, differs in differing.items() if differs)}. There, give it "
            "doc_scores instead of a retriever.",
            ExchangeWarning,
            stacklevel=4,
        )
    if separators_of(model.settings.prompt.template) is None:
        warnings.warn(
            f"Hugging Face's retriever joins a context as prefix, title, title_sep, text, doc_sep, question, with single "
            f"spaces; the prompt {model.settings.prompt.template!r} is of another form. There, give it context_input_ids "
            "instead of a retriever.",
            ExchangeWarning,
            stacklevel=4,
        )


@contextlib.contextmanager
def _appears_whole(folder: Path) -> Iterator[Path]:
    """A draft folder that is renamed to `folder` at the end, or removed if that is not reached."""
    folder = Path(os.path.abspath(folder))
    if folder.exists() and (folder.is_file() or any(folder.iterdir())):
        raise ArtifactError(f"{folder} exists already and is left alone. Give a new or empty folder.")
    folder.parent.mkdir(parents=True, exist_ok=True)
    draft = folder.parent / f".{folder.name}.draft-{uuid.uuid4().hex[:8]}"
    draft.mkdir()
    try:
        yield draft
        os.replace(draft, folder)
    finally:
        shutil.rmtree(draft, ignore_errors=True)


def _read_settings(source: str, name: str, schema: type[Settings]) -> Settings | None:
    path = model_file(source, name)
    try:
        return None if path is None else schema.model_validate_json(path.read_bytes())
    except ValidationError as error:
        raise ConfigError(f"{source}: {name} cannot be read ({error.errors()[0]['msg']}). Copy it again.") from error


def _write_settings(path: Path, settings: BaseModel) -> None:
    path.write_text(settings.model_dump_json(indent=2) + "\n", encoding="utf-8")


def _some_of(names: Any) -> str:
    """'3 weights (a, b, …)'."""
    ordered = sorted(names)
    return f"{len(ordered)} weights ({', '.join(ordered[:3])}{', …' if len(ordered) > 3 else ''})"
