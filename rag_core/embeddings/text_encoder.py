"""Texts to vectors: any Hugging Face encoder with a pooling, such as mean, CLS or DPR's.

One class serves as the question encoder (trained) and the document encoder (frozen). It reads plain model folders,
sentence-transformers folders, DPR encoders and hub names; `encoder_settings.py` reads the pooling from their files.
`encode` sorts texts by length and fills batches up to a token budget, so that little time goes into padding. It knows
nothing about passages, questions or indexes.

Shapes: N texts, B texts in a batch, S tokens, D embedding.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import itertools
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import transformers
from tokenizers.normalizers import Lowercase
from tokenizers.normalizers import Sequence as NormalizerSequence
from torch import nn
from transformers import AutoModel

from rag_core.cpu.bfloat16 import cpu_bfloat16
from rag_core.cpu.packed_linears import packed_linears
from rag_core.embeddings.encoder_settings import (
    SETTINGS_FILE,
    EncoderSettings,
    Pooling,
    Side,
    encoder_settings_of,
    transformer_folder,
)
from rag_core.errors import ConfigError
from rag_core.pretrained.dpr_tokenizer import with_saved_case
from rag_core.pretrained.model_limits import refuse_tokens_beyond
from rag_core.pretrained.model_source import (
    load_config,
    load_tokenizer,
    load_weights,
    quiet_transformers,
    resolve_model_source,
)

Precision = Literal["auto", "float32", "bfloat16"]
# Tokens in a batch: what the caches of a processor hold, or enough to fill an accelerator.
BATCH_TOKENS = {"cpu": 512, "cuda": 16_384}
# Texts to tokenise and sort at a time; more would save hardly any padding and take memory.
WINDOW = 16_384
# Characters from which packing the weights pays for the time it takes (MiniLM: 20 ms).
PACK_FROM = 10_000
# The most batches at a time on a processor. More would wait for the Python interpreter, which they share.
MOST_WORKERS = 8
DPR_CLASSES = ("DPRQuestionEncoder", "DPRContextEncoder")


class TextEncoder(nn.Module):
    """A text encoder: tokenizer, transformer, pooling.

    `side` says which texts it reads, and so which prompt it puts before them; None: texts of any kind.
    Sources of the poolings: mean, CLS and max as in Sentence-BERT (arXiv 1908.10084), the position-weighted mean as in
    SGPT (arXiv 2202.08904), DPR as in arXiv 2004.04906.
    """

    def __init__(self, model: nn.Module, tokenizer: Any, settings: EncoderSettings, side: Side | None = None) -> None:
        super().__init__()
        self.model = model
        self.tokenizer = tokenizer
        self.settings = settings
        self.side = side
        self.prompt = settings.prompt_for(side)
        if settings.lowercase:
            _lower_case_first(tokenizer)
        if settings.pooling != "dpr":
            # All other poolings leave BERT's pooler unused, and DDP needs a gradient for every trainable parameter.
            for name, parameter in model.named_parameters():
                if name.startswith("pooler."):
                    parameter.requires_grad_(False)

    @classmethod
    def from_pretrained(
        cls,
        name_or_folder: str | Path,
        *,
        side: Side | None = None,
        pooling: Pooling | None = None,
        normalize: bool | None = None,
        max_tokens: int | None = None,
        prompt: str | None = None,
        trust_remote_code: bool = False,
    ) -> TextEncoder:
        """Load an encoder.

        Args:
            name_or_folder: a local folder, a hub name (`org/model` or `org/model@REVISION`), or `package:NAME/FOLDER`
                for a model inside a Python package.
            side: "question" or "passage": which of the model's prompts to put before texts. None: the prompt for all
                texts, as in `SentenceTransformer.encode`.
            pooling, normalize, max_tokens, prompt: override the folder's settings. If the folder has none either: mean
                pooling, vectors not scaled, at most 256 tokens, no prompt; a DPR model gets DPR pooling.
            trust_remote_code: run code that comes with the model.

        Raises:
            ConfigError: the model or its tokenizer cannot be read, or a sentence-transformers folder asks for something
                that is not supported.
        """
        source = resolve_model_source(name_or_folder, trust_remote_code=trust_remote_code)
        subfolder = transformer_folder(source)
        config = load_config(source, subfolder, trust_remote_code=trust_remote_code)
        if config.is_encoder_decoder:
            raise ConfigError(
                f"{name_or_folder} is an encoder-decoder ({config.model_type}); a text encoder such as BERT, MiniLM "
                "or DPR is needed here."
            )
        load = _model_class(source, config).from_pretrained
        trust: dict[str, Any] = {"subfolder": subfolder, "trust_remote_code": trust_remote_code}
        model = load_weights(load, source, may_lack="pooler.", dtype=torch.float32, **trust)
        tokenizer = with_saved_case(load_tokenizer(source, **trust), source, subfolder)
        overrides: dict[str, Any] = {"pooling": pooling, "normalize": normalize, "max_tokens": max_tokens}
        overrides[f"{side}_prompt" if side else "prompt"] = prompt
        overrides = {name: value for name, value in overrides.items() if value is not None}
        settings = encoder_settings_of(source, model, tokenizer, overrides)
        embeddings = model.get_input_embeddings()
        if isinstance(embeddings, nn.Embedding):
            refuse_tokens_beyond(embeddings.num_embeddings, tokenizer, f"the encoder {name_or_folder}")
        return cls(model, tokenizer, settings, side).eval()

    def for_questions(self, prompt: str | None = None) -> TextEncoder:
        """The same weights for questions, with `prompt` before them; None: the prompt of the folder."""
        overrides = {} if prompt is None else {"question_prompt": prompt}
        settings = self.settings.model_copy(update=overrides)
        return TextEncoder(self.model, self.tokenizer, settings, "question").train(self.training)

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
        """SHA-256 of weights and settings: equal for encoders with equal vectors, whatever their names.

        `max_tokens`, `title_separator` and the prompt are included, because they change a passage's vector. The prompt
        of the other side is not.
        """
        settings = self.settings.as_read_by(self.side).model_dump_json()
        # An unused pooler does not change vectors, and it is random at every load if the folder has none.
        unused = () if self.settings.pooling == "dpr" else ("pooler.",)
        return hashlib.sha256(f"{settings}{fingerprint_of_weights(self.model, unused)}".encode()).hexdigest()

    def tokenize(self, texts: Sequence[str]) -> list[list[int]]:
        """Token ids of each text after the prompt, special tokens included, cut to `max_tokens`."""
        if not texts:
            return []
        prompted = [self.prompt + text for text in texts]
        return self.tokenizer(prompted, truncation=True, max_length=self.settings.max_tokens)["input_ids"]

    def forward(self, input_ids_BS: torch.Tensor, attention_mask_BS: torch.Tensor) -> torch.Tensor:
        """Vectors (B, D) in float32 of token ids (B, S) under their mask (B, S), differentiable."""
        output = self.model(input_ids=input_ids_BS, attention_mask=attention_mask_BS)
        if self.settings.pooling == "dpr":
            vectors_BD = output.pooler_output.float()
        else:
            pooled_BS = self._pooled_tokens(attention_mask_BS)
            vectors_BD = pool(output.last_hidden_state.float(), pooled_BS, self.settings.pooling)
        return nn.functional.normalize(vectors_BD, dim=-1) if self.settings.normalize else vectors_BD

    def _pooled_tokens(self, attention_mask_BS: torch.Tensor) -> torch.Tensor:
        """1 for tokens whose states are pooled, shape (B, S): all real tokens, or only those after the prompt.

        As in sentence-transformers, the prompt's length is counted for the prompt alone, without the special token at
        its end.
        """
        if self.settings.include_prompt or not self.prompt:
            return attention_mask_BS
        ids = self.tokenizer(self.prompt)["input_ids"]
        prompt_tokens = len(ids) - (ids[-1] in self.tokenizer.all_special_ids)
        pooled_BS = attention_mask_BS.clone()
        pooled_BS[:, :prompt_tokens] = 0
        return pooled_BS

    def embed(self, texts: Sequence[str]) -> torch.Tensor:
        """Vectors (B, D) float32 of a few texts in one batch, differentiable (the question encoder in training)."""
        return self(*self._pad(self.tokenize(texts)))

    def encode(
        self,
        list_of_texts: Sequence[str],
        *,
        batch_tokens: int | None = None,
        precision: Precision = "auto",
        on_progress: Callable[[int], None] | None = None,
    ) -> np.ndarray:
        """Embed many texts.

        Args:
            list_of_texts: N texts.
            batch_tokens: upper bound for the tokens of a batch, padding included; None: `BATCH_TOKENS` of the device.
            precision: "bfloat16" runs the matrix products in bf16; pooling stays float32. "auto" does so if the
                hardware multiplies bf16 natively.
            on_progress: called with the number of texts done after each batch.

        Returns:
            float32 array (N, D), in input order.
        """
        batch_tokens = batch_tokens or BATCH_TOKENS.get(self.device.type, BATCH_TOKENS["cuda"])
        vectors_ND = np.zeros((len(list_of_texts), self.dim), dtype=np.float32)
        was_training = self.training
        self.eval()
        try:
            with self._fast(list_of_texts, precision):
                for start in range(0, len(list_of_texts), WINDOW):
                    ids = self.tokenize(list_of_texts[start : start + WINDOW])
                    batches = list(batches_by_length([len(text_ids) for text_ids in ids], batch_tokens))
                    parts_BD = []
                    for part_BD in self._encode_batches([[ids[row] for row in rows] for rows in batches], precision):
                        parts_BD.append(part_BD)
                        if on_progress:
                            on_progress(len(part_BD))
                    # Vectors stay on the device until the window is done, so that nothing waits for a batch.
                    vectors_ND[[start + row for rows in batches for row in rows]] = torch.cat(parts_BD).cpu().numpy()
        finally:
            self.train(was_training)
        return vectors_ND

    def _encode_batches(self, batches: list[list[list[int]]], precision: Precision) -> Iterator[torch.Tensor]:
        """Vectors (B, D) of each batch of token ids; on a processor one batch per core, up to `MOST_WORKERS` at a time.

        Cores that share a batch wait for each other at the end of every operation. Cores with their own batches do not.
        """

        def encode(ids: list[list[int]]) -> torch.Tensor:
            with torch.inference_mode(), autocast(self.device, precision):
                return self(*self._pad(ids))

        cores = torch.get_num_threads()
        workers = min(cores, MOST_WORKERS) if self.device.type == "cpu" else 1
        if workers == 1 or len(batches) < 2 * workers:
            yield from map(encode, batches)
            return
        try:
            # MKL has one setting for all threads; other libraries have one for each thread.
            torch.set_num_threads(cores // workers)
            yield from _threads(workers, cores // workers).map(encode, batches)
        finally:
            torch.set_num_threads(cores)

    @contextlib.contextmanager
    def _fast(self, list_of_texts: Sequence[str], precision: Precision) -> Iterator[None]:
        """Inside this block the model's weights are arranged for embedding these texts fast on a processor."""
        resolved = resolve_precision(self.device, precision)
        with contextlib.ExitStack() as stack:
            if self.device.type == "cpu":
                if resolved == "bfloat16":
                    stack.enter_context(cpu_bfloat16(self.model))
                if sum(map(len, list_of_texts[:PACK_FROM])) >= PACK_FROM:
                    with autocast(self.device, resolved):
                        stack.enter_context(packed_linears(self.model))
            yield

    def _pad(self, ids: Sequence[Sequence[int]]) -> tuple[torch.Tensor, torch.Tensor]:
        # Any id will do if the tokenizer has none: the mask hides it, and on the right it moves no token's position.
        return pad_ids(ids, self.tokenizer.pad_token_id or 0, self.device)


@functools.cache
def _threads(workers: int, each: int) -> ThreadPoolExecutor:
    """A pool of `workers` threads; PyTorch uses `each` threads in each of them.

    The pool is kept, because glibc gives every new thread another of its up to 8 heaps per core, and a heap keeps
    memory that is not freed in order. With new threads for every window a worker grew by 30 to 80 MiB per shard of
    50,000 passages.
    """
    return ThreadPoolExecutor(workers, initializer=torch.set_num_threads, initargs=(each,))


def pool(states_BSD: torch.Tensor, mask_BS: torch.Tensor, pooling: Pooling) -> torch.Tensor:
    """One vector (B, D) from token states (B, S, D) padded on the right, as sentence-transformers' Pooling does it.

    The mask (B, S) is 1 for the tokens to pool: one run in each text, which may start after a prompt.
    """
    mask_BS1 = mask_BS[..., None].to(states_BSD.dtype)
    row_B, place_S = (torch.arange(size, device=mask_BS.device) for size in mask_BS.shape)
    if pooling == "cls":
        return states_BSD[row_B, mask_BS.int().argmax(1)]
    if pooling == "lasttoken":
        last_B = (mask_BS * place_S).amax(1)
        return states_BSD[row_B, last_B] * mask_BS1[row_B, last_B]
    if pooling == "max":
        return states_BSD.masked_fill(mask_BS1 == 0, float("-inf")).amax(1)
    if pooling == "weightedmean":
        mask_BS1 = mask_BS1 * (place_S + 1)[:, None]
    weight_B1 = mask_BS1.sum(1).clamp(min=1)
    return (states_BSD * mask_BS1).sum(1) / (weight_B1.sqrt() if pooling == "mean_sqrt_len_tokens" else weight_B1)


def fingerprint_of_weights(
    module: nn.Module, leave_out: tuple[str, ...] = (), *, dtype: torch.dtype | None = None
) -> str:
    """SHA-256 of name, shape, type and values of all parameters and buffers whose name starts with no `leave_out`.

    With `dtype`, it is that of the same floating-point tensors converted to this type, one after the other.
    """
    digest = hashlib.sha256()
    for name, tensor in sorted(module.state_dict().items()):
        if name.startswith(leave_out):
            continue
        if dtype is not None and tensor.is_floating_point():
            tensor = tensor.to(dtype)
        digest.update(f"{name}{tuple(tensor.shape)}{tensor.dtype}".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def passage_text(title: str, text: str, settings: EncoderSettings) -> str:
    """The text that the document encoder reads: title, separator, text (the text alone if there is no title)."""
    return f"{title}{settings.title_separator}{text}" if title else text


def autocast(device: torch.device, precision: Precision) -> torch.autocast:
    """bf16 autocast on the device, or a context that does nothing for float32."""
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=resolve_precision(device, precision) == "bfloat16")


def resolve_precision(device: torch.device, precision: Precision) -> Literal["float32", "bfloat16"]:
    """Resolve "auto" to bfloat16 if the hardware has it, else to float32.

    Without such instructions bf16 products are emulated: measured 5 times slower than float32 on an AVX-512 processor
    without `avx512_bf16`, and 2.2 times faster on one that has it.
    """
    if precision != "auto":
        return precision
    if device.type == "cuda":
        return "bfloat16" if torch.cuda.is_bf16_supported(including_emulation=False) else "float32"
    features = torch.cpu.get_capabilities()
    return "bfloat16" if features.get("avx512_bf16") or features.get("amx_bf16") or features.get("bf16") else "float32"


def pad_ids(ids: Sequence[Sequence[int]], pad_token_id: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids (B, S) int64 padded on the right to the longest, and their mask (B, S) int64."""
    length_B = np.array([len(text_ids) for text_ids in ids], dtype=np.int64)
    mask_BS = np.arange(length_B.max(initial=0)) < length_B[:, None]
    input_ids_BS = np.full(mask_BS.shape, pad_token_id, dtype=np.int64)
    input_ids_BS[mask_BS] = np.fromiter(itertools.chain.from_iterable(ids), np.int64, int(length_B.sum()))
    return torch.from_numpy(input_ids_BS).to(device), torch.from_numpy(mask_BS.astype(np.int64)).to(device)


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


def _model_class(source: str, config: Any) -> Any:
    """The class that reads a model's weights. Of DPR's three classes, AutoModel knows only the question encoder."""
    if config.model_type != "dpr":
        return AutoModel
    architecture = (config.architectures or ["none"])[0]
    if architecture not in DPR_CLASSES:
        raise ConfigError(
            f"{source} is a DPR model of architecture {architecture}; a text encoder is one of "
            f"{' and '.join(DPR_CLASSES)}. Give the folder of the question or context encoder."
        )
    return getattr(transformers, architecture)


def _lower_case_first(tokenizer: Any) -> None:
    """Make a tokenizer lower-case its text first, as sentence-transformers' `do_lower_case` does."""
    backend = tokenizer.backend_tokenizer
    normalizer = backend.normalizer
    # A tokenizer that was saved with this step already has it.
    if not (isinstance(normalizer, NormalizerSequence) and isinstance(normalizer[0], Lowercase)):
        backend.normalizer = NormalizerSequence([Lowercase(), normalizer] if normalizer else [Lowercase()])
