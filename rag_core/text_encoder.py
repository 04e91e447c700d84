"""Texts to vectors: any Hugging Face encoder with mean, CLS or DPR pooling.

One class serves as the question encoder (trained) and the document encoder (frozen). It reads plain model folders,
sentence-transformers folders (pooling and normalisation are in their `modules.json`), DPR encoders and hub names.
`encode` sorts by length and fills batches up to a token budget, so that little padding is multiplied. It knows
nothing of passages, questions or indices.

Shapes: N texts, B texts in a batch, S tokens, D embedding.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import transformers
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from torch import nn
from transformers import AutoConfig, AutoModel
from transformers.utils import cached_file

from rag_core.errors import ConfigError
from rag_core.model_source import load_from_source, load_tokenizer, quiet_transformers, resolve_model_source

Pooling = Literal["mean", "cls", "dpr"]
Precision = Literal["auto", "float32", "bfloat16"]
SETTINGS_FILE = "text_encoder.json"
DPR_CLASSES = ("DPRQuestionEncoder", "DPRContextEncoder")


class EncoderSettings(BaseModel):
    """How a text encoder's token states become one vector. Stored beside the weights as `text_encoder.json`."""

    model_config = ConfigDict(extra="forbid")

    pooling: Pooling = Field("mean", description="mean over tokens, the first token (cls), or DPR's pooled output")
    normalize: bool = Field(False, description="scale vectors to unit length")
    max_tokens: int = Field(256, ge=2, description="longer texts are cut to this many tokens")
    title_separator: str = Field(" ", description="between a passage's title and its text; DPR uses ' [SEP] '")


class TextEncoder(nn.Module):
    """A text encoder: tokenizer, transformer, pooling.

    Source of the poolings: mean as in Sentence-BERT (arXiv 1908.10084), DPR as in arXiv 2004.04906.
    """

    def __init__(self, model: nn.Module, tokenizer: Any, settings: EncoderSettings) -> None:
        super().__init__()
        self.model = model
        self.tokenizer = tokenizer
        self.settings = settings
        if settings.pooling != "dpr":
            # Mean and CLS pooling leave BERT's pooler unused; a parameter that never gets a gradient upsets DDP.
            for name, parameter in model.named_parameters():
                if name.startswith("pooler."):
                    parameter.requires_grad_(False)

    @classmethod
    def from_pretrained(
        cls,
        name_or_folder: str | Path,
        *,
        pooling: Pooling | None = None,
        normalize: bool | None = None,
        max_tokens: int | None = None,
    ) -> TextEncoder:
        """Load an encoder.

        Args:
            name_or_folder: a local folder, a hub name, or `package:NAME/FOLDER` for a model inside a Python package.
            pooling, normalize, max_tokens: override what the folder says. Without either: mean pooling, vectors as
                they are, the model's own length limit; a DPR model gets DPR pooling.

        Raises:
            ConfigError: the model or its tokenizer cannot be read.
        """
        source = resolve_model_source(name_or_folder)
        config = load_from_source(AutoConfig.from_pretrained, source)
        settings = _settings_of(source, config)
        given = {"pooling": pooling, "normalize": normalize, "max_tokens": max_tokens}
        settings = settings.model_copy(update={name: value for name, value in given.items() if value is not None})
        architecture = (config.architectures or [""])[0]
        model_class = getattr(transformers, architecture) if architecture in DPR_CLASSES else AutoModel
        if config.is_encoder_decoder:
            raise ConfigError(
                f"{name_or_folder} is an encoder-decoder ({config.model_type}); a text encoder such as BERT, MiniLM or DPR "
                "is needed here."
            )
        model = load_from_source(model_class.from_pretrained, source, dtype=torch.float32)
        tokenizer = load_tokenizer(source)
        return cls(model, tokenizer, settings).eval()

    def save_pretrained(self, folder: Path) -> None:
        """Write weights (safetensors), tokenizer and settings to a folder that `from_pretrained` reads."""
        folder = Path(folder)
        with quiet_transformers():
            self.model.save_pretrained(folder)  # type: ignore[operator]
            self.tokenizer.save_pretrained(folder)
        (folder / SETTINGS_FILE).write_text(self.settings.model_dump_json(indent=2) + "\n", encoding="utf-8")

    @property
    def dim(self) -> int:
        """D, the length of a vector."""
        config: Any = self.model.config
        return int(getattr(config, "projection_dim", 0) or config.hidden_size)

    @property
    def device(self) -> torch.device:
        return next(self.model.parameters()).device

    def fingerprint(self) -> str:
        """SHA-256 of weights and settings: equal for equal vectors, whatever the model is called.

        `max_tokens` and `title_separator` count, too: they change what a passage's vector is.
        """
        settings = self.settings.model_dump_json()
        # An unused pooler does not change vectors, and where the folder has none it is random at every load.
        unused = () if self.settings.pooling == "dpr" else ("pooler.",)
        return hashlib.sha256(f"{settings}{fingerprint_of_weights(self.model, unused)}".encode()).hexdigest()

    def tokenize(self, texts: Sequence[str]) -> list[list[int]]:
        """Token ids of each text, special tokens included, cut to `max_tokens`."""
        if not texts:
            return []
        return self.tokenizer(list(texts), truncation=True, max_length=self.settings.max_tokens)["input_ids"]

    def forward(self, input_ids_BS: torch.Tensor, attention_mask_BS: torch.Tensor) -> torch.Tensor:
        """Vectors (B, D) in float32 of token ids (B, S) under their mask (B, S), differentiable."""
        output = self.model(input_ids=input_ids_BS, attention_mask=attention_mask_BS)
        if self.settings.pooling == "dpr":
            vectors_BD = output.pooler_output.float()
        elif self.settings.pooling == "cls":
            vectors_BD = output.last_hidden_state[:, 0].float()
        else:
            states_BSD = output.last_hidden_state.float()
            mask_BS1 = attention_mask_BS[..., None].to(states_BSD.dtype)
            vectors_BD = (states_BSD * mask_BS1).sum(1) / mask_BS1.sum(1).clamp(min=1)
        return nn.functional.normalize(vectors_BD, dim=-1) if self.settings.normalize else vectors_BD

    def embed(self, texts: Sequence[str]) -> torch.Tensor:
        """Vectors (B, D) float32 of a few texts in one batch, differentiable (the question encoder in training)."""
        return self(*self._pad(self.tokenize(texts)))

    def encode(
        self,
        list_of_texts: Sequence[str],
        *,
        batch_tokens: int = 8192,
        precision: Precision = "auto",
        on_progress: Callable[[int], None] | None = None,
    ) -> np.ndarray:
        """Embed many texts.

        Args:
            list_of_texts: N texts.
            batch_tokens: upper bound for the tokens of a batch, padding included.
            precision: "bfloat16" runs the matrix products in bf16 autocast; pooling stays float32. "auto" does so where
                the processor multiplies bf16 natively.
            on_progress: called with the number of texts done after each batch.

        Returns:
            float32 array (N, D), in input order.
        """
        vectors_ND = np.zeros((len(list_of_texts), self.dim), dtype=np.float32)
        ids = self.tokenize(list_of_texts)
        was_training = self.training
        self.eval()
        try:
            with torch.inference_mode(), autocast(self.device, precision):
                for rows in batches_by_length([len(one) for one in ids], batch_tokens):
                    vectors_BD = self(*self._pad([ids[row] for row in rows]))
                    vectors_ND[rows] = vectors_BD.float().cpu().numpy()
                    if on_progress:
                        on_progress(len(rows))
        finally:
            self.train(was_training)
        return vectors_ND

    def _pad(self, ids: Sequence[Sequence[int]]) -> tuple[torch.Tensor, torch.Tensor]:
        return pad_ids(ids, self.tokenizer.pad_token_id or 0, self.device)


def fingerprint_of_weights(module: nn.Module, leave_out: tuple[str, ...] = ()) -> str:
    """SHA-256 over names, shapes, types and values of all parameters and buffers but those whose names start so."""
    digest = hashlib.sha256()
    for name, tensor in sorted(module.state_dict().items()):
        if name.startswith(leave_out):
            continue
        digest.update(f"{name}{tuple(tensor.shape)}{tensor.dtype}".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def passage_text(title: str, text: str, settings: EncoderSettings) -> str:
    """What the document encoder reads of a passage: title, separator, text (the text alone if there is no title)."""
    return f"{title}{settings.title_separator}{text}" if title else text


def autocast(device: torch.device, precision: Precision) -> torch.autocast:
    """bf16 autocast on the device, or a context that does nothing for float32."""
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=resolve_precision(device, precision) == "bfloat16")


def resolve_precision(device: torch.device, precision: Precision) -> Literal["float32", "bfloat16"]:
    """What "auto" means here: bfloat16 where the hardware has it, else float32.

    Without such instructions bf16 products are emulated: measured 5 times slower than float32 on an AVX-512 processor
    that lacks `avx512_bf16`, and 2.2 times faster on one that has it.
    """
    if precision != "auto":
        return precision
    if device.type == "cuda":
        return "bfloat16" if torch.cuda.is_bf16_supported(including_emulation=False) else "float32"
    features = torch.cpu.get_capabilities()
    return "bfloat16" if features.get("avx512_bf16") or features.get("amx_bf16") or features.get("bf16") else "float32"


def pad_ids(ids: Sequence[Sequence[int]], pad_token_id: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids (B, S) int64 padded on the right to the longest, and their mask (B, S) int64."""
    longest = max((len(one) for one in ids), default=0)
    input_ids_BS = torch.full((len(ids), longest), pad_token_id, dtype=torch.long)
    mask_BS = torch.zeros((len(ids), longest), dtype=torch.long)
    for row, one in enumerate(ids):
        input_ids_BS[row, : len(one)] = torch.as_tensor(one, dtype=torch.long)
        mask_BS[row, : len(one)] = 1
    return input_ids_BS.to(device), mask_BS.to(device)


def batches_by_length(lengths: Sequence[int], batch_tokens: int) -> Iterator[list[int]]:
    """Rows in batches of similar length whose padded size stays within `batch_tokens` (always at least one row)."""
    batch: list[int] = []
    for row in sorted(range(len(lengths)), key=lambda row: -lengths[row]):
        # Longest first, so the first row of a batch fixes its width, and memory peaks at the start, not at the end.
        if batch and (len(batch) + 1) * lengths[batch[0]] > batch_tokens:
            yield batch
            batch = []
        batch.append(row)
    if batch:
        yield batch


def _settings_of(source: str, config: Any) -> EncoderSettings:
    ours = _read_json(source, SETTINGS_FILE)
    if ours is not None:
        try:
            return EncoderSettings.model_validate(ours)
        except ValidationError as error:
            raise ConfigError(f"{source}: {SETTINGS_FILE} holds a setting that is not known: {error}") from error
    limit = int(getattr(config, "max_position_embeddings", 0) or 512)
    if config.model_type == "dpr":
        return EncoderSettings(pooling="dpr", max_tokens=min(256, limit), title_separator=" [SEP] ")
    modules = _read_json(source, "modules.json")
    if modules is None:
        return EncoderSettings(max_tokens=min(256, limit))
    sentence_config = _read_json(source, "sentence_bert_config.json") or {}
    return EncoderSettings(
        pooling=_sentence_transformers_pooling(source, modules),
        normalize=any(module["type"].endswith("Normalize") for module in modules),
        max_tokens=min(sentence_config.get("max_seq_length") or 256, limit),
    )


def _sentence_transformers_pooling(source: str, modules: list[dict[str, Any]]) -> Pooling:
    for module in modules:
        if module["type"].endswith("Pooling"):
            pooling = _read_json(source, f"{module['path']}/config.json") or {}
            if pooling.get("pooling_mode_cls_token"):
                return "cls"
            if pooling.get("pooling_mode_mean_tokens", True):
                return "mean"
            raise ConfigError(f"{source} pools in a way that is not supported ({pooling}). Mean and CLS pooling are.")
    return "mean"


def _read_json(source: str, name: str) -> Any:
    path = cached_file(
        source, name, _raise_exceptions_for_missing_entries=False, _raise_exceptions_for_gated_repo=False
    )
    try:
        return None if path is None else json.loads(Path(path).read_text(encoding="utf-8"))
    except ValueError as error:
        raise ConfigError(f"{path} is not readable as JSON ({error}). Copy the model again.") from error
