"""Open a GGUF file: read its header, and refuse what is damaged, or is no generator.

A damaged header can claim anything. Transformers' reader stops at the end of the file, where gguf's reads on through
lists that never end, so it comes first. gguf's then looks where each tensor lies.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gguf
from transformers.integrations.gguf import read_gguf_metadata

from rag_core.errors import ConfigError, RagError

MAGIC = b"GGUF"
REMEDY = "Choose another model, or give its Transformers folder or hub name."


@dataclass(frozen=True)
class GgufFile:
    """A GGUF file whose header has been checked.

    `name` is the source as the user gave it. In `metadata`, lists of strings are only their lengths.
    """

    file: Path
    name: str
    metadata: dict[str, Any]
    reader: gguf.GGUFReader

    @property
    def architecture(self) -> str:
        """llama.cpp's name of the architecture, such as "llama"."""
        return str(self.metadata["general.architecture"])

    @property
    def tensors(self) -> dict[str, int]:
        """The number of values in each tensor."""
        return {tensor.name: int(tensor.n_elements) for tensor in self.reader.tensors}

    @property
    def bytes_when_plain(self) -> int:
        """Bytes of the weights in float32."""
        return 4 * sum(self.tensors.values())

    def setting(self, name: str, default: Any = None) -> Any:
        """A setting of the architecture, such as "block_count"."""
        return self.metadata.get(f"{self.architecture}.{name}", default)

    def encoder_refused(self) -> ConfigError:
        """The error for an encoder."""
        return ConfigError(
            f"{self.name} is an encoder ({self.architecture}), but a generator was expected: a GGUF file of a language "
            "model. (An encoder is given as a folder, a hub name or package:NAME/FOLDER.)"
        )

    @classmethod
    def open(cls, file: Path, name: str) -> GgufFile:
        """Check the header of a GGUF file; `name` is the source as the user gave it.

        Raises:
            ConfigError: no GGUF file, damaged or cut off, one part of several, an encoder, or without tokenizer.
        """
        with file.open("rb") as opened:
            start = opened.read(len(MAGIC))
        if start != MAGIC:
            raise ConfigError(
                f"{name} is no GGUF file: it begins with {start!r} and not with {MAGIC!r}. Give a GGUF file, or a "
                "model folder."
            )
        try:
            metadata, _ = read_gguf_metadata(str(file))
            source = cls(file, name, metadata, gguf.GGUFReader(file))
            _refuse_what_is_no_generator(source)
        except RagError:
            raise
        except Exception as error:  # struct, numpy, UTF-8 and the two readers raise whatever a damaged file leads to
            raise ConfigError(
                f"{name} is damaged or was cut off, or is of a version that cannot be read: {reason_of(error)} "
                "Download the file again."
            ) from error
        return source


def reason_of(error: Exception) -> str:
    """The first line of an error's message, as a sentence."""
    lines = str(error).strip().splitlines()
    return f"{lines[0].rstrip('.!')[:300] if lines else type(error).__name__}."


def _refuse_what_is_no_generator(source: GgufFile) -> None:
    name, parts = source.name, source.metadata.get("split.count", 0)
    if parts > 1:
        raise ConfigError(
            f"{name} is one of {parts} parts of a model. Join them first, with llama.cpp's `llama-gguf-split --merge`, "
            "and give the whole file."
        )
    if "bert" in source.architecture or source.architecture == "t5encoder":
        raise source.encoder_refused()
    if "tokenizer.ggml.tokens" not in source.metadata:
        raise ConfigError(f"{name} has no tokenizer, so it cannot read or write text. {REMEDY}")
    if int(source.setting("block_count", 0)) > len(source.tensors):
        raise ConfigError(f"{name} is damaged: it says that it has more layers than tensors. Download it again.")
