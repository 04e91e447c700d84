"""Read from a model folder how token states become one vector: our own file, sentence-transformers' files, or DPR.

The first source that exists wins: `text_encoder.json` (ours); `modules.json` and the files that it names
(sentence-transformers, as versions up to 6.2 write them); the kind of model (DPR, or any other). A step of a
sentence-transformers folder that is not supported is refused by name, because skipping it would silently give other
vectors. Weights and tokenizers are loaded elsewhere.
"""

from __future__ import annotations

from typing import Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError, model_serializer
from pydantic_core.core_schema import SerializerFunctionWrapHandler

from rag_core.errors import ConfigError
from rag_core.pretrained.model_limits import positions_of
from rag_core.pretrained.model_source import read_json

Pooling = Literal["mean", "cls", "max", "mean_sqrt_len_tokens", "weightedmean", "lasttoken", "dpr"]
# What texts an encoder reads. Some models (E5, BGE) need one prompt before questions and another before passages.
Side = Literal["question", "passage"]
SETTINGS_FILE = "text_encoder.json"
# Used if neither the model nor its tokenizer states a limit.
NO_LIMIT = 1_000_000
# Before version 6 sentence-transformers wrote one boolean for each pooling, in this order.
POOLING_BOOLEANS = {
    "pooling_mode_cls_token": "cls",
    "pooling_mode_max_tokens": "max",
    "pooling_mode_mean_tokens": "mean",
    "pooling_mode_mean_sqrt_len_tokens": "mean_sqrt_len_tokens",
    "pooling_mode_weightedmean_tokens": "weightedmean",
    "pooling_mode_lasttoken": "lasttoken",
}
TRANSFORMER_FILES = tuple(
    f"sentence_{kind}_config.json"
    for kind in ("bert", "roberta", "distilbert", "camembert", "albert", "xlm-roberta", "xlnet")
)
Kind = TypeVar("Kind")


class EncoderSettings(BaseModel):
    """How a text encoder's token states become one vector. Stored beside the weights as `text_encoder.json`."""

    model_config = ConfigDict(extra="forbid")

    pooling: Pooling = Field(
        "mean",
        description="mean over tokens, the first token (cls), the last token, the largest value of each dimension "
        "(max), the sum over √tokens, the mean weighted by position, or DPR's pooled output",
    )
    normalize: bool = Field(False, description="scale vectors to unit length")
    max_tokens: int = Field(256, ge=2, description="longer texts are cut to this many tokens")
    title_separator: str = Field(" ", description="between a passage's title and its text; DPR uses ' [SEP] '")
    prompt: str = Field("", description="put before every text, such as 'query: '")
    lowercase: bool = Field(False, description="lower-case texts, whatever the tokenizer does of its own accord")
    question_prompt: str | None = Field(None, description="put before questions; empty: `prompt`")
    passage_prompt: str | None = Field(None, description="put before passages; empty: `prompt`")
    include_prompt: bool = Field(True, description="pool over the prompt's tokens, too")

    def prompt_for(self, side: Side | None) -> str:
        """The prompt before texts of that side; None: before texts of any kind."""
        own = {"question": self.question_prompt, "passage": self.passage_prompt}.get(side or "")
        return self.prompt if own is None else own

    def as_read_by(self, side: Side | None) -> EncoderSettings:
        """The settings that decide that side's vectors: its prompt becomes `prompt`, the other side's is dropped."""
        prompt = self.prompt_for(side)
        include = self.include_prompt or not prompt
        return self.model_copy(
            update={"prompt": prompt, "question_prompt": None, "passage_prompt": None, "include_prompt": include}
        )

    @model_serializer(mode="wrap")
    def _without_unset_prompts(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        # So models without such prompts keep the files, fingerprints and keys they had before these fields existed.
        values: dict[str, Any] = handler(self)
        unset = {"question_prompt": None, "passage_prompt": None, "include_prompt": True}
        return {name: value for name, value in values.items() if name not in unset or value != unset[name]}


class _Module(BaseModel):
    """An entry of `modules.json`."""

    type: str
    path: str


class _TextModality(BaseModel):
    method: Literal["forward"]
    method_output_name: Literal["last_hidden_state"]


class _Modalities(BaseModel):
    """Text goes to the model unchanged. With a key "message", sentence-transformers would use a chat template."""

    model_config = ConfigDict(extra="forbid")

    text: _TextModality


class _TransformerFile(BaseModel):
    """`sentence_bert_config.json` and its older names."""

    model_config = ConfigDict(extra="forbid")

    max_seq_length: int | None = Field(None, ge=2)
    do_lower_case: bool = False
    transformer_task: Literal["feature-extraction"] = "feature-extraction"
    module_output_name: Literal["token_embeddings"] = "token_embeddings"
    modality_config: _Modalities | None = None
    # These do not affect `SentenceTransformer.encode`: the first is for flash attention, the others for multi-vectors.
    unpad_inputs: bool | None = None
    query_length: int | None = None
    document_length: int | None = None


class _PoolingFile(BaseModel):
    """`1_Pooling/config.json`. The booleans of older versions are in `model_extra`."""

    model_config = ConfigDict(extra="allow")

    pooling_mode: str | list[str] | None = None
    include_prompt: bool = True


class _NormalizeFile(BaseModel):
    module_input_name: Literal["sentence_embedding"] = "sentence_embedding"
    module_output_name: Literal["sentence_embedding"] = "sentence_embedding"


class _ModelFile(BaseModel):
    """`config_sentence_transformers.json`."""

    model_type: Literal["SentenceTransformer"] = "SentenceTransformer"
    prompts: dict[str, str | None] = {}
    default_prompt_name: str | None = None
    truncate_dim: None = None


def transformer_folder(source: str) -> str:
    """The folder below `source` with weights and tokenizer: "", or the one that a sentence-transformers folder names.

    Raises:
        ConfigError: `modules.json` names other steps than Transformer, Pooling and optionally Normalize.
    """
    modules = _modules_of(source)
    return modules["Transformer"] if modules else ""


def encoder_settings_of(source: str, model: Any, tokenizer: Any, overrides: dict[str, Any]) -> EncoderSettings:
    """The settings of a model folder, with `overrides` in place of its own.

    Raises:
        ConfigError: a file is damaged, or asks for something that is not supported.
    """
    settings = _read(source, SETTINGS_FILE, EncoderSettings)
    modules = _modules_of(source)
    limit = position_limit(model)
    is_dpr = model.config.model_type == "dpr"
    if modules is not None:
        settings = _sentence_transformers_settings(source, modules, min(limit, tokenizer.model_max_length))
    elif settings is None and is_dpr:
        settings = EncoderSettings(pooling="dpr", max_tokens=min(256, limit), title_separator=" [SEP] ")
    elif settings is None:
        settings = EncoderSettings(max_tokens=min(256, limit))
    settings = settings.model_copy(update=overrides)
    if settings.max_tokens > limit:
        raise ConfigError(
            f"{source}: max_tokens is {settings.max_tokens}, but the encoder ({model.config.model_type}) has "
            f"positions for {limit} tokens. Set it ({SETTINGS_FILE}) to at most {limit}."
        )
    if (settings.pooling == "dpr") != is_dpr:
        raise ConfigError(
            f"{source}: pooling {settings.pooling!r} does not go with a model of type {model.config.model_type!r}. DPR "
            "encoders need pooling 'dpr', and no other model supports it. Let the folder decide the pooling."
        )
    return settings


def _modules_of(source: str) -> dict[str, str] | None:
    """Class name and path of a sentence-transformers folder's modules; None for other folders, or with our settings."""
    listed = None if read_json(source, SETTINGS_FILE) is not None else read_json(source, "modules.json")
    if listed is None:
        return None
    modules = _validate(source, "modules.json", TypeAdapter(list[_Module]), listed)
    names = [
        module.type.rpartition(".")[2] if module.type.startswith("sentence_transformers.") else module.type
        for module in modules
    ]
    if names not in (["Transformer", "Pooling"], ["Transformer", "Pooling", "Normalize"]):
        raise ConfigError(
            f"{source}: modules.json lists {', '.join(names) or 'nothing'}; only Transformer, Pooling and then "
            "optionally Normalize are supported. Skipping a step would give other vectors. Choose an encoder with "
            "these steps."
        )
    return dict(zip(names, (module.path for module in modules), strict=True))


def _sentence_transformers_settings(source: str, modules: dict[str, str], limit: int) -> EncoderSettings:
    folder = modules["Transformer"]
    files = (_read(source, f"{folder}/{name}".lstrip("/"), _TransformerFile) for name in TRANSFORMER_FILES)
    transformer = next((file for file in files if file is not None), _TransformerFile())
    if "Normalize" in modules:
        # Read only to refuse a module that does not normalise the pooled vector. Before version 6 it had no file.
        _read(source, f"{modules['Normalize']}/config.json", _NormalizeFile)
    pooling, include_prompt = _pooling_of(source, f"{modules['Pooling']}/config.json")
    return EncoderSettings(
        pooling=pooling,
        normalize="Normalize" in modules,
        max_tokens=min(transformer.max_seq_length or limit, limit),
        lowercase=transformer.do_lower_case,
        include_prompt=include_prompt,
        **_prompts(source),
    )


def _pooling_of(source: str, name: str) -> tuple[Pooling, bool]:
    """Pooling and `include_prompt` of a sentence-transformers Pooling module."""
    file = _read(source, name, _PoolingFile)
    if file is None:
        raise ConfigError(f"{source} has no {name}, which says how to pool. Copy the model again.")
    booleans: dict[str, Any] = file.model_extra or {}
    stated = file.pooling_mode or [mode for key, mode in POOLING_BOOLEANS.items() if booleans.get(key)] or "mean"
    modes: list[Any] = [stated] if isinstance(stated, str) else stated
    if len(modes) != 1 or modes[0] not in POOLING_BOOLEANS.values():
        raise ConfigError(
            f"{source}: {name} pools by {' and '.join(modes)}; one of {', '.join(POOLING_BOOLEANS.values())} is "
            "supported. Choose an encoder with one of them."
        )
    return modes[0], file.include_prompt


def _prompts(source: str) -> dict[str, str]:
    """The prompts of `SentenceTransformer`: the default for `encode`, others for `encode_query` and `encode_document`.

    As in version 6.2, there is always a prompt "query" and a prompt "document", empty unless the file has them. So the
    default goes before neither questions nor passages, and prompts with other names are never used by themselves.
    """
    file = _read(source, "config_sentence_transformers.json", _ModelFile) or _ModelFile()
    known = {name: text or "" for name, text in ({"query": "", "document": ""} | file.prompts).items()}
    if file.default_prompt_name not in (None, *known):
        raise ConfigError(
            f"{source}: config_sentence_transformers.json has the default prompt {file.default_prompt_name!r}, but its "
            f"prompts are {', '.join(known)}. Correct one of them."
        )
    default = {"prompt": known.get(file.default_prompt_name or "", "")}
    sides = {"question_prompt": known["query"], "passage_prompt": known["document"]}
    return default | {side: text for side, text in sides.items() if text != default["prompt"]}


def position_limit(model: Any) -> int:
    """The most tokens that a text encoder has positions for, or was made for if its positions have no limit."""
    positions = getattr(model.config, "max_position_embeddings", None)
    table = positions_of(model)
    return min(table or NO_LIMIT, positions if positions and positions > 0 else NO_LIMIT)


def _read(source: str, name: str, kind: type[Kind]) -> Kind | None:
    """A JSON file of the model as `kind`, or None if it has no such file."""
    content = read_json(source, name)
    return None if content is None else _validate(source, name, TypeAdapter(kind), content)


def _validate(source: str, name: str, adapter: TypeAdapter[Kind], content: Any) -> Kind:
    try:
        return adapter.validate_python(content)
    except ValidationError as error:
        problems = "; ".join(
            f"{'.'.join(map(str, problem['loc']))} is {problem['input']!r} ({problem['msg']})"
            for problem in error.errors()
        )
        raise ConfigError(
            f"{source}: {name} holds unsupported values: {problems}. Correct the file if it is yours, or choose "
            "another encoder."
        ) from error
