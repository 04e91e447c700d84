"""Read a GGUF file with Transformers and write it as a plain model folder.

Transformers reads the weights of many architectures from GGUF, but leaves out what it does not know: tensors without a
place in its model, stretched positions, ways of splitting text. A model without them computes something else, so this
module checks that nothing was left out, and refuses the file otherwise. The folder has config.json, model.safetensors
(float32), generation_config.json, the tokenizer and its chat template.

No code from outside runs: the weights are unpacked here (`dequantize=True`), not by kernels from a hub.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import os
import tempfile
import threading
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gguf
import torch
from tokenizers.pre_tokenizers import ByteLevel, Digits, Sequence
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    AutoTokenizer,
    GenerationConfig,
    GgufConfig,
    modeling_gguf_pytorch_utils,
)
from transformers.integrations.gguf import GGUF_ARCHS, read_gguf_metadata
from transformers.integrations.gguf.gguf_tokenizer_mapping import GGUF_PRE_TOKENIZER_SPLITS

from rag_core.errors import ConfigError, ModelNotice
from rag_core.pretrained.quiet import quiet_transformers

MAGIC = b"GGUF"
# Tensors that stretch rotary positions (Llama 3.1 and newer, Phi-3 with 128k): Transformers does not read them.
ROPE_TENSORS = ("rope_freqs.weight", "rope_factors_long.weight", "rope_factors_short.weight")
# How byte-level tokenizers split text before the merges (`tokenizer.ggml.pre`), as llama.cpp does it, where
# Transformers has no entry and uses GPT-2's way: right for these, and for the next ones after single digits.
SPLIT_AS_GPT2 = ("gpt-2", "phi-2", "jina-es", "jina-de", "mpt", "olmo", "jais", "trillion", "granite-docling")
SPLIT_DIGITS = ("smollm", "starcoder", "refact", "command-r", "codeshell", "exaone", "minerva-7b")
# `_read_once` replaces functions of other packages for a while.
_one_at_a_time = threading.Lock()
_REMEDY = "Choose another model, or give its Transformers folder or hub name."


@dataclass(frozen=True)
class GgufFile:
    """A GGUF file whose header has been checked."""

    file: Path
    name: str
    metadata: dict[str, Any]
    reader: gguf.GGUFReader

    @property
    def architecture(self) -> str:
        """llama.cpp's name of the architecture, such as "llama"."""
        return str(self.metadata["general.architecture"])

    @property
    def bytes_when_plain(self) -> int:
        """Bytes of the weights in float32."""
        return 4 * sum(self.tensors.values())

    @property
    def tensors(self) -> dict[str, int]:
        """The number of values in each tensor."""
        return {tensor.name: int(tensor.n_elements) for tensor in self.reader.tensors}

    @classmethod
    def open(cls, file: Path, name: str) -> GgufFile:
        """Check the header of a GGUF file; `name` is the source as the user gave it.

        Raises:
            ConfigError: no GGUF file, damaged or cut off, one part of several, or of a kind that cannot be a generator
                or that Transformers would read wrongly.
        """
        with file.open("rb") as opened:
            start = opened.read(len(MAGIC))
        if start != MAGIC:
            raise ConfigError(
                f"{name} is no GGUF file: it begins with {start!r} and not with {MAGIC!r}. Give a GGUF file, or a "
                "model folder."
            )
        try:
            # Transformers' reader stops at the end of a cut file, where gguf's may read on for ever: it comes first.
            # gguf's looks where each tensor lies.
            metadata, _ = read_gguf_metadata(str(file))
            reader = gguf.GGUFReader(file)
        except Exception as error:  # struct, numpy, UTF-8 and the two readers raise whatever a damaged file leads to
            raise ConfigError(
                f"{name} is damaged or was cut off, or is of a version that cannot be read: {_reason(error)} Download "
                "the file again."
            ) from error
        opened_file = cls(file, name, metadata, reader)
        opened_file._refuse_what_is_no_generator()
        opened_file._refuse_what_would_be_read_wrongly()
        return opened_file

    def write_plain_folder(self, out: Path) -> None:
        """Write config.json, weights in float32, generation_config.json and the tokenizer to the folder `out`.

        Raises:
            ConfigError: Transformers cannot read the architecture or the tokenizer, weights are missing, left over or
                not finite.
        """
        with _as_only_file_of_a_folder(self.file) as source, quiet_transformers(), _read_once(self.file, self.reader):
            config = self._read(AutoConfig.from_pretrained, **source)
            if "Encoder" in "".join(config.architectures or ()):
                raise self._encoder()
            model = self._load_model(config, source)
            tokenizer = self._read(AutoTokenizer.from_pretrained, **source)
            self._mend_split(tokenizer)
            model.generation_config = self._generation_config(model.config)
            model.save_pretrained(out)
            tokenizer.save_pretrained(out)

    def _load_model(self, config: Any, source: dict[str, str]) -> Any:
        """The model as a plain one, which can be saved: Transformers does not save models that it read from GGUF."""
        load = AutoModelForSeq2SeqLM if config.is_encoder_decoder else AutoModelForCausalLM
        options = {"dtype": torch.float32, "quantization_config": GgufConfig(dequantize=True)}
        loaded, report = self._read(load.from_pretrained, **source, config=config, output_loading_info=True, **options)
        weights = loaded.state_dict()
        self._check_all_was_read(loaded, weights, report["missing_keys"])
        plain_config = loaded.config
        for attribute in ("quantization_config", "_model_name_or_path"):
            plain_config.__dict__.pop(attribute, None)
        with torch.device("meta"):
            plain = type(loaded)(plain_config)
        plain.load_state_dict(weights, assign=True)
        plain.tie_weights()
        return plain

    def _check_all_was_read(self, model: Any, weights: dict[str, torch.Tensor], missing: set[str]) -> None:
        if missing:
            raise ConfigError(
                f"{self.name} lacks {len(missing)} parameters of a {type(model).__name__} ({min(missing)}, …), so it "
                f"holds another model than it says, an adapter, or a part of a model. {_REMEDY}"
            )
        layers = int(getattr(model.config, "num_hidden_layers", 0))
        expected = sum(
            values
            for tensor, values in self.tensors.items()
            # A copy of the embeddings, if the model ties them; layers that predict several tokens ahead.
            if not (tensor == "output.weight" and model.config.tie_word_embeddings)
            and not tensor.startswith(f"blk.{layers}.")
        )
        read = sum({tensor.data_ptr(): tensor.numel() for tensor in weights.values()}.values())
        if read != expected:
            raise ConfigError(
                f"{self.name} holds {expected:,} weights, but Transformers reads {read:,} of them as a "
                f"{type(model).__name__}, so the model would compute something else. {_REMEDY}"
            )
        for name, tensor in weights.items():
            if not torch.isfinite(tensor).all():
                raise ConfigError(f"{self.name} is damaged: its weights {name} are not finite. Download it again.")

    def _read(self, read: Any, folder: str, gguf_file: str, **options: Any) -> Any:
        try:
            return read(folder, gguf_file=gguf_file, **options)
        except Exception as error:  # Transformers, tokenizers, gguf and numpy raise errors of any type
            known = "not supported" in str(error) or isinstance(error, (NotImplementedError, KeyError))
            raise ConfigError(
                f"Transformers cannot read the {self.architecture} model {self.name} from GGUF: {_reason(error)} "
                + (_REMEDY if known else f"If the file is damaged, download it again. {_REMEDY}")
            ) from error

    def _refuse_what_is_no_generator(self) -> None:
        if int(self.metadata.get("split.count", 0)) > 1:
            raise ConfigError(
                f"{self.name} is one of {self.metadata['split.count']} parts of a model. Join them first, with "
                "llama.cpp's `llama-gguf-split --merge`, and give the whole file."
            )
        if "bert" in self.architecture or self.architecture == "t5encoder":
            raise self._encoder()
        if "tokenizer.ggml.tokens" not in self.metadata:
            raise ConfigError(f"{self.name} has no tokenizer, so it cannot read or write text. {_REMEDY}")
        if int(self.metadata.get(f"{self.architecture}.block_count", 0)) > len(self.tensors):
            raise ConfigError(
                f"{self.name} is damaged: it says that it has more layers than tensors. Download it again."
            )

    def _refuse_what_would_be_read_wrongly(self) -> None:
        scaling = self.metadata.get(f"{self.architecture}.rope.scaling.type", "none")
        stretching = [name for name in ROPE_TENSORS if name in self.tensors]
        if stretching or (scaling != "none" and self.architecture != "gpt-oss"):
            raise ConfigError(
                f"{self.name} stretches its rotary positions ({stretching[0] if stretching else scaling}), which "
                "Transformers does not read from GGUF, so the model would compute something else. Give the model's "
                "Transformers folder or hub name."
            )
        if self.architecture in GGUF_ARCHS and importlib.util.find_spec("kernels"):
            raise ConfigError(
                f"To read the {self.architecture} model {self.name}, Transformers would download and run code with the "
                "installed package `kernels`, and such code is not run. Uninstall `kernels`, or give the model's "
                "Transformers folder or hub name."
            )

    def _encoder(self) -> ConfigError:
        return ConfigError(
            f"{self.name} is an encoder ({self.architecture}), but a generator was expected: a GGUF file of a language "
            "model. (An encoder is given as a folder, a hub name or package:NAME/FOLDER.)"
        )

    def _mend_split(self, tokenizer: Any) -> None:
        """Make a byte-level tokenizer split text as the file says, where Transformers has no entry for it."""
        way = self.metadata.get("tokenizer.ggml.pre", "default")
        if self.metadata.get("tokenizer.ggml.model") != "gpt2" or way in GGUF_PRE_TOKENIZER_SPLITS:
            return
        if way in SPLIT_DIGITS:
            tokenizer.backend_tokenizer.pre_tokenizer = Sequence(
                [Digits(individual_digits=True), ByteLevel(add_prefix_space=False, use_regex=True)]
            )
        elif way not in SPLIT_AS_GPT2:
            warnings.warn(
                f"{self.name}: its tokenizer splits text in a way that Transformers does not know ({way}); GPT-2's is "
                "used, so some texts become other tokens than the model was trained on.",
                ModelNotice,
                stacklevel=6,
            )

    def _generation_config(self, config: Any) -> GenerationConfig:
        """Start, end and padding tokens as the file says. A chat model may end with its end of turn, too."""
        generation = GenerationConfig.from_model_config(config)
        ends = generation.eos_token_id if isinstance(generation.eos_token_id, list) else [generation.eos_token_id]
        ends = [end for end in (*ends, self.metadata.get("tokenizer.ggml.eot_token_id")) if end is not None]
        generation.eos_token_id = (list(dict.fromkeys(ends)) if len(set(ends)) > 1 else ends[0]) if ends else None
        return generation


@contextlib.contextmanager
def _as_only_file_of_a_folder(file: Path) -> Iterator[dict[str, str]]:
    """Arguments for `from_pretrained`: files beside the GGUF file, such as another model's tokenizer, are not read."""
    with tempfile.TemporaryDirectory(prefix="rag-gguf-") as folder:
        (Path(folder) / "model.gguf").symlink_to(file.resolve())
        yield {"folder": folder, "gguf_file": "model.gguf"}


@contextlib.contextmanager
def _read_once(file: Path, reader: gguf.GGUFReader) -> Iterator[None]:
    """Let Transformers use `reader`, where it would read the header three times, and make a table of names once.

    It makes that table for each module of a model. Together this takes three quarters of the time. Its reader's
    progress bar, which it shows even if its bars are switched off, is left out.
    """
    real = file.resolve()
    with _one_at_a_time:
        read, names, bar = gguf.GGUFReader, gguf.get_tensor_name_map, modeling_gguf_pytorch_utils.tqdm
        gguf.GGUFReader = lambda path: reader if Path(os.path.realpath(path)) == real else read(path)
        gguf.get_tensor_name_map = functools.cache(names)
        modeling_gguf_pytorch_utils.tqdm = functools.partial(bar, disable=True)
        try:
            yield
        finally:
            gguf.GGUFReader, gguf.get_tensor_name_map = read, names
            modeling_gguf_pytorch_utils.tqdm = bar


def _reason(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return f"{lines[0].rstrip('.')[:300] if lines else type(error).__name__}."
