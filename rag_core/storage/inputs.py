"""Find the inputs of an artifact again: where the user says, where its manifest says, or beside it.

An artifact identifies its inputs by fingerprint. The paths in `details.inputs` only record where they were when it was
made and are not part of its key. An input is used only if its fingerprint matches.
"""

from __future__ import annotations

import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rag_core.errors import ArtifactError, ConfigError
from rag_core.storage.artifact import manifest_at
from rag_core.storage.manifest import Manifest
from rag_core.storage.places import absolute


@dataclass(frozen=True, slots=True)
class GivenInputs:
    """Paths of inputs that the user gave; None or empty means: find them."""

    sources: tuple[Path, ...] = ()
    corpus: Path | None = None
    embeddings: Path | None = None
    beside: Path | None = None  # folder to search for inputs beside the artifact; None: its parent folder


def input_paths(**paths: object) -> dict[str, Any]:
    """`inputs` for a manifest's details: absolute paths, or lists of them."""
    return {
        name: [absolute(item) for item in path] if isinstance(path, (list, tuple)) else absolute(str(path))
        for name, path in paths.items()
    }


def find_input(folder: Path, manifest: Manifest, kind: str, inputs: GivenInputs) -> Path | None:
    """The corpus or embeddings that the artifact at `folder` was made from; None if it is not found.

    Raises:
        ArtifactError: the path in `inputs` holds another artifact.
    """
    expected = manifest.made_from.get(kind)
    named_path = getattr(inputs, kind)
    for path in _candidate_paths(folder, manifest, kind, inputs):
        try:
            fingerprint = manifest_at(path, kind).fingerprint
        except (ArtifactError, ConfigError):
            if path == named_path:
                raise
            continue
        if fingerprint == expected:
            return path
        if path == named_path:
            raise ArtifactError(
                f"{path} is not the {kind} that {folder} was made from: its fingerprint is {fingerprint[:16]}…, "
                f"{str(expected)[:16]}… was expected. Give the {kind} it was made from, or make {folder} again."
            )
    return None


def _candidate_paths(folder: Path, manifest: Manifest, kind: str, inputs: GivenInputs) -> Iterator[Path]:
    named_path = getattr(inputs, kind)
    if named_path is not None:
        yield named_path
        return
    recorded = manifest.details.get("inputs", {}).get(kind)
    if recorded:
        yield Path(recorded)
    yield (inputs.beside or folder.parent) / kind  # the layout of `rag pipeline`


def command_for(folder: Path, manifest: Manifest) -> str:
    """The command that makes the artifact again. Values that the manifest does not hold are in capital letters."""
    inputs, config = manifest.details.get("inputs", {}), manifest.config
    sources = inputs.get("sources") or ["SOURCE"]
    details = manifest.details
    words = {
        "corpus": ["corpus", *sources, *_options(config, "format", "words_per_passage", "shard_rows")],
        "embeddings": ["embed", *_options(inputs, "corpus"), *_options(details, "encoder")],
        "index": ["index", *_options(inputs, "embeddings", "corpus"), *_options(config, "factory", "target_recall")],
        "generator": ["pretrain", *_options(inputs, "corpus", "questions", "dev"), "--config", "FILE"],
        "rag-model": ["train", *_options(config, "variant"), *_options(inputs, "index", "questions", "dev")],
        "predictions": ["infer", *_options(details, "model"), *_options(inputs, "index", "questions")],
    }.get(manifest.kind)
    more = {"embeddings": _options(config, "dtype", "precision", "batch_tokens"), "rag-model": ["--config", "FILE"]}
    if "gguf" in details:
        return f"delete the folder; the next command that names {details['gguf']} makes it"
    if "hf_rag" in details:
        return shlex.join(["rag", "import-hf", details["hf_rag"], str(folder)])
    if "exported_from" in details:
        return shlex.join(["rag", "export", details["exported_from"], "--out", str(folder)])
    if words is None:
        return "the command that made it"
    return shlex.join(["rag", *map(str, words), *more.get(manifest.kind, []), "--out", str(folder)])


def _options(values: dict[str, Any], *names: str) -> list[str]:
    options: list[str] = []
    for name in names:
        value = values.get(name, name.upper())
        if value is not None:
            options += [f"--{name.replace('_', '-')}", str(value)]
    return options
