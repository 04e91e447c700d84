"""Read Hugging Face's RAG checkpoints; `hf_rag.py` says how they differ from our models."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any, TypeVar, get_args

import torch
import transformers
from pydantic import BaseModel, ValidationError
from torch import nn
from transformers import GenerationConfig, RagConfig

from rag_core.embeddings.encoder_settings import SETTINGS_FILE as ENCODER_SETTINGS_FILE
from rag_core.embeddings.encoder_settings import EncoderSettings, Pooling, position_limit
from rag_core.embeddings.text_encoder import TextEncoder
from rag_core.errors import ConfigError
from rag_core.model.hf_rag import (
    CLASSES,
    GENERATOR_TOKENIZER,
    QUESTION_TOKENIZER,
    TOKEN_IDS,
    ExchangeWarning,
    separators_of,
    some_of,
    template_of,
)
from rag_core.model.reader import without_unused_pooler
from rag_core.model.settings import SETTINGS_FILE, ModelSettings
from rag_core.pretrained.dpr_tokenizer import with_saved_case
from rag_core.pretrained.model_source import (
    load_config,
    load_from_source,
    load_tokenizer,
    model_file,
    resolve_model_source,
    weights_options,
)
from rag_core.reading.generator_limits import within_positions
from rag_core.reading.prompt import PromptConfig

_STEERING_TOKENS = (
    *TOKEN_IDS,
    "forced_bos_token_id",
    "forced_eos_token_id",
    "suppress_tokens",
    "begin_suppress_tokens",
    "bad_words_ids",
)

Settings = TypeVar("Settings", bound=BaseModel)


def read_hf_rag(
    folder_or_hub_name: str | Path, *, pooling: Pooling | None = None, trust_remote_code: bool = False
) -> tuple[TextEncoder, nn.Module, Any, ModelSettings]:
    """Read a Hugging Face RAG checkpoint: question encoder, generator, the generator's tokenizer, and settings.

    The class that `config.json` names decides the variant (a plain `RagModel` has none). The generator takes over
    `generation_config.json`. The prompt takes over length and separators; double spaces in the separators become
    single, as in their retriever.

    Args:
        folder_or_hub_name: a local folder, a hub name with or without `@REVISION`, or `package:NAME/FOLDER`.
        pooling: for a question encoder other than DPR's. Hugging Face's class only knows DPR's vectors, so a checkpoint
            does not name another pooling, unless `write_hf_rag` made it.
        trust_remote_code: run code that comes with the checkpoint.

    Raises:
        ConfigError: not a RAG checkpoint, weights or a tokenizer missing, unreadable files, or a pooling that is
            missing or does not fit.

    Warns:
        ExchangeWarning: the checkpoint has weights that the model has no place for; they are left out.
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


def _rag_config(folder_or_hub_name: str | Path, trust_remote_code: bool) -> tuple[str, Any]:
    """Return where the checkpoint is, and its RagConfig."""
    folder = Path(folder_or_hub_name)
    if (folder / SETTINGS_FILE).is_file() and not (folder / "config.json").is_file():
        raise ConfigError(
            f"{folder} is already a RAG model of rag-pipeline, not a Hugging Face checkpoint. Use it directly "
            "(RagModel.from_pretrained, --model)."
        )
    source = resolve_model_source(folder_or_hub_name, trust_remote_code=trust_remote_code)
    config = load_config(source, trust_remote_code=trust_remote_code)
    if config.model_type != "rag":
        part = "generator" if config.is_encoder_decoder else "question_encoder"
        raise ConfigError(
            f"{source} is not a RAG checkpoint: its model_type is {config.model_type!r}, expected 'rag'. "
            f"To use it as a part of a RAG model, name it as {part} in the model section of a configuration."
        )
    # A dtype in a part's config would round its weights before they become float32.
    config.question_encoder.dtype = config.generator.dtype = None
    return source, config


def _load_weights(source: str, config: Any, architecture: str) -> Any:
    """Load Hugging Face's RagModel with all its weights, as float32."""
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
            f"{source} lacks {some_of(report['missing_keys'])} that its config.json requires; Transformers would fill "
            "them with random numbers. Copy the checkpoint again."
        )
    # After joint training the checkpoint also holds a document encoder; it is not part of our model.
    unexpected = [name for name in report["unexpected_keys"] if "ctx_encoder." not in name]
    if unexpected:
        warnings.warn(
            f"{source} has {some_of(unexpected)} that its config.json does not mention; they are left out.",
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
            rest |= {name: getattr(ours.prompt, name) for name in ("system", "user", "rendered")}
    try:
        prompt = PromptConfig(template=template, max_context_tokens=config.max_combined_length, **rest)
    except ValidationError as error:
        raise ConfigError(
            f"{source}: prefix, title_sep, doc_sep and max_combined_length of config.json make no valid prompt: "
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
        expected = "dpr" if is_dpr else "one of " + ", ".join(name for name in get_args(Pooling) if name != "dpr")
        raise ConfigError(
            f"{source}: the question encoder is a {config.model_type}, so its pooling must be {expected}; found "
            f"{pooling!r}."
        )
    settings = _read_settings(source, f"{QUESTION_TOKENIZER}/{ENCODER_SETTINGS_FILE}", EncoderSettings)
    if settings is not None:
        return settings if pooling is None else settings.model_copy(update={"pooling": pooling})
    if pooling is None and not is_dpr:
        raise ConfigError(
            f"{source}: the question encoder is a {config.model_type}, not DPR's, and a RAG checkpoint does not say "
            "how its states become a vector. Give pooling (--pooling), such as mean or cls."
        )
    return EncoderSettings(pooling=pooling or "dpr", max_tokens=256, title_separator=" [SEP] " if is_dpr else " ")


def _load_tokenizer(source: str, subfolder: str, config: Any) -> Any:
    if Path(source).is_dir() and not (Path(source) / subfolder).is_dir():
        raise ConfigError(
            f"{source} has no folder {subfolder}/, so a tokenizer is missing. Save the tokenizers beside the weights "
            "with RagTokenizer.save_pretrained."
        )
    # In older checkpoints no config.json beside the tokenizer names its kind, so the part's config does.
    return with_saved_case(load_tokenizer(source, subfolder, config=config), source, subfolder)


def _take_generation_config(generator: Any, source: str) -> None:
    """Copy the settings of generation_config.json to the generator.

    Checkpoints older than generation_config.json keep forced and suppressed tokens in the generator's part of
    config.json. Transformers takes these over for a separate model, but not for a part of one, so we copy them.
    """
    if model_file(source, "generation_config.json") is not None:
        # It reads settings, and runs no code.
        read = GenerationConfig.from_pretrained  # nosec B615
        stored = load_from_source(lambda name, **_: read(name), source).to_diff_dict()
        bookkeeping = ("transformers_version", "_from_model_config")
        values = {name: value for name, value in stored.items() if name not in bookkeeping}
    else:
        config, _ = RagConfig.get_config_dict(source)
        part = config["generator"]
        values = {name: part[name] for name in _STEERING_TOKENS if part.get(name) is not None}
    generator.generation_config.update(**values)


def _read_settings(source: str, name: str, schema: type[Settings]) -> Settings | None:
    path = model_file(source, name)
    try:
        return None if path is None else schema.model_validate_json(path.read_bytes())
    except ValidationError as error:
        raise ConfigError(f"{source}: {name} cannot be read ({error.errors()[0]['msg']}). Copy it again.") from error
