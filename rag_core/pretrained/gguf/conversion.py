"""Read a GGUF file with Transformers and write it as a plain model folder.

Transformers reads the weights of many architectures from GGUF, but skips tensors for which its model has no place. A
model without them computes something else, so this module checks that all were read, and refuses the file otherwise.
The folder has config.json, model.safetensors (float32), generation_config.json, the tokenizer and its chat template.

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
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, cast

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
from transformers.integrations.gguf import GGUF_ARCHS
from transformers.integrations.gguf.gguf_tokenizer_mapping import GGUF_PRE_TOKENIZER_SPLITS

from rag_core.errors import ConfigError, ModelNotice, RagError
from rag_core.pretrained.gguf.configuration import FACTORS, complete
from rag_core.pretrained.gguf.file import REMEDY, GgufFile, reason_of
from rag_core.pretrained.quiet import quiet_transformers

# Architectures of which `tests/pretrained/gguf/test_families.py` compares a model with what is read from its file.
COMPARED = ("llama", "qwen2", "qwen3", "gemma2", "gemma3", "phi3", "t5")
# How byte-level tokenizers split text before the merges (`tokenizer.ggml.pre`), as llama.cpp does it, where
# Transformers has no entry and uses GPT-2's way: right for these, and for the next ones after single digits.
SPLIT_AS_GPT2 = ("gpt-2", "phi-2", "jina-es", "jina-de", "mpt", "olmo", "jais", "trillion", "granite-docling")
SPLIT_DIGITS = ("smollm", "starcoder", "refact", "command-r", "codeshell", "exaone", "minerva-7b")
# `_read_once` replaces functions of other packages for a while.
_one_at_a_time = threading.Lock()


def write_plain_folder(source: GgufFile, out: Path) -> None:
    """Write config.json, weights in float32, generation_config.json and the tokenizer to the folder `out`.

    Raises:
        ConfigError: Transformers cannot read the architecture or the tokenizer, or would read the file wrongly; or
            weights are missing, left over or not finite.
    """
    if source.architecture in GGUF_ARCHS and importlib.util.find_spec("kernels"):
        raise ConfigError(
            f"To read the {source.architecture} model {source.name}, Transformers would download and run code with the "
            "installed package `kernels`, and such code is not run. Uninstall `kernels`, or give the model's "
            "Transformers folder or hub name."
        )
    with _as_only_file_of_a_folder(source.file) as place, quiet_transformers(), _read_once(source):
        with _explained(source):
            config = _read(AutoConfig.from_pretrained, place)
            if "Encoder" in "".join(config.architectures or ()):
                raise source.encoder_refused()
            complete(config, source)
            model = _load_model(source, config, place)
            model.generation_config = _generation_config(source, model.config)
            tokenizer = _read(AutoTokenizer.from_pretrained, place)
            _mend_split(source, tokenizer)
        model.save_pretrained(out)
        tokenizer.save_pretrained(out)
    if source.architecture not in COMPARED:
        warnings.warn(
            f"{source.name}: what Transformers reads from GGUF files of this architecture ({source.architecture}) was "
            "not compared with original models. Compare some answers before you rely on it.",
            ModelNotice,
            stacklevel=5,
        )


def _load_model(source: GgufFile, config: Any, place: dict[str, str]) -> Any:
    """The model as a plain one, which can be saved: Transformers does not save models that it read from GGUF."""
    load = AutoModelForSeq2SeqLM if config.is_encoder_decoder else AutoModelForCausalLM
    options = {"dtype": torch.float32, "quantization_config": GgufConfig(dequantize=True)}
    loaded, report = _read(load.from_pretrained, place, config=config, output_loading_info=True, **options)
    weights = loaded.state_dict()
    _check_all_was_read(source, loaded, weights, report["missing_keys"])
    for attribute in ("quantization_config", "_model_name_or_path"):
        loaded.config.__dict__.pop(attribute, None)
    with torch.device("meta"):
        plain = type(loaded)(loaded.config)
    plain.load_state_dict(weights, assign=True)
    plain.tie_weights()
    return plain


def _check_all_was_read(source: GgufFile, model: Any, weights: dict[str, torch.Tensor], missing: set[str]) -> None:
    if missing:
        raise ConfigError(
            f"{source.name} lacks {len(missing)} parameters of a {type(model).__name__} ({min(missing)}, …), so it "
            f"holds another model than it says, an adapter, or a part of a model. {REMEDY}"
        )
    # Layers that predict several tokens ahead come after the others.
    ahead = f"blk.{model.config.num_hidden_layers}." if source.setting("nextn_predict_layers") else None
    expected = sum(
        values
        for tensor, values in source.tensors.items()
        # Not: a copy of the embeddings, if the model ties them; factors of positions, which became a setting.
        if not (tensor == "output.weight" and model.config.tie_word_embeddings)
        and not (ahead and tensor.startswith(ahead))
        and tensor != FACTORS
    )
    read = sum({tensor.data_ptr(): tensor.numel() for tensor in weights.values()}.values())
    if read != expected:
        raise ConfigError(
            f"{source.name} holds {expected:,} weights, but Transformers reads {read:,} of them as a "
            f"{type(model).__name__}, so the model would compute something else. {REMEDY}"
        )
    for name, tensor in weights.items():
        if not torch.isfinite(tensor).all():
            raise ConfigError(f"{source.name} is damaged: its weights {name} are not finite. Download it again.")


def _read(from_pretrained: Callable[..., Any], place: dict[str, str], **options: Any) -> Any:
    """Read the GGUF file of a local folder; `from_pretrained` contacts no hub then."""
    return from_pretrained(**place, **options)


@contextlib.contextmanager
def _explained(source: GgufFile) -> Iterator[None]:
    """Turn every error of reading into a ConfigError that says what to do."""
    try:
        yield
    except RagError:
        raise
    except Exception as error:  # Transformers, tokenizers, gguf and numpy raise errors of any type
        # So Transformers says that it has no reader for this kind of model: then the file is not the one to blame.
        known = "not supported" in str(error) or isinstance(error, NotImplementedError)
        raise ConfigError(
            f"Transformers cannot read the {source.architecture} model {source.name} from GGUF: {reason_of(error)} "
            + (REMEDY if known else f"If the file is damaged, download it again. {REMEDY}")
        ) from error


def _mend_split(source: GgufFile, tokenizer: Any) -> None:
    """Make a byte-level tokenizer split text as the file says, where Transformers has no entry for it."""
    way = source.metadata.get("tokenizer.ggml.pre", "default")
    if source.metadata.get("tokenizer.ggml.model") != "gpt2" or way in GGUF_PRE_TOKENIZER_SPLITS:
        return
    if way in SPLIT_DIGITS:
        tokenizer.backend_tokenizer.pre_tokenizer = Sequence(
            [Digits(individual_digits=True), ByteLevel(add_prefix_space=False, use_regex=True)]
        )
    elif way not in SPLIT_AS_GPT2:
        warnings.warn(
            f"{source.name}: its tokenizer splits text in a way that Transformers does not know ({way}); GPT-2's is "
            "used, so some texts become other tokens than the model was trained on.",
            ModelNotice,
            stacklevel=5,
        )


def _generation_config(source: GgufFile, config: Any) -> GenerationConfig:
    """Start, end and padding tokens as the file says. A chat model may end with its end of turn, too."""
    generation = GenerationConfig.from_model_config(config)
    ends = generation.eos_token_id if isinstance(generation.eos_token_id, list) else [generation.eos_token_id]
    ends = [end for end in (*ends, source.metadata.get("tokenizer.ggml.eot_token_id")) if end is not None]
    generation.eos_token_id = (list(dict.fromkeys(ends)) if len(set(ends)) > 1 else ends[0]) if ends else None
    return generation


@contextlib.contextmanager
def _as_only_file_of_a_folder(file: Path) -> Iterator[dict[str, str]]:
    """Arguments for `from_pretrained`: files beside the GGUF file, such as another model's tokenizer, are not read."""
    with tempfile.TemporaryDirectory(prefix="rag-gguf-") as folder:
        (Path(folder) / "model.gguf").symlink_to(file.resolve())
        yield {"pretrained_model_name_or_path": folder, "gguf_file": "model.gguf"}


@contextlib.contextmanager
def _read_once(source: GgufFile) -> Iterator[None]:
    """Let Transformers use the open reader, where it would read the header three times, and make a table of names once.

    It makes that table for each module of a model. Together this takes three quarters of the time. Its reader's
    progress bar, which it shows even if its bars are switched off, is left out.
    """
    real, package, reading = source.file.resolve(), cast(Any, gguf), cast(Any, modeling_gguf_pytorch_utils)
    with _one_at_a_time:
        read, names, bar = package.GGUFReader, package.get_tensor_name_map, reading.tqdm
        package.GGUFReader = lambda path: source.reader if Path(os.path.realpath(path)) == real else read(path)
        package.get_tensor_name_map = functools.cache(names)
        reading.tqdm = functools.partial(bar, disable=True)
        try:
            yield
        finally:
            package.GGUFReader, package.get_tensor_name_map, reading.tqdm = read, names, bar
