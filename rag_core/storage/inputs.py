"""Where the inputs of an artifact are found again: named by the user, by its manifest's details, or standing beside it.

An artifact knows its inputs by fingerprint; the paths in `details.inputs` only say where they lay when it was made, and
are no part of its key. An input is used only if its fingerprint is the right one.
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
    """Paths that the user named; None or empty: to be found."""

    sources: tuple[Path, ...] = ()
    corpus: Path | None = None
    embeddings: Path | None = None
    beside: Path | None = None  # where neighbours of the artifact are looked for; None: in its parent folder


def input_paths(**paths: object) -> dict[str, Any]:
    """`inputs` for a manifest's details: absolute paths, or lists of them."""
    return {
        name: [absolute(one) for one in path] if isinstance(path, (list, tuple)) else absolute(str(path))
        for name, path in paths.items()
    }


def find_input(folder: Path, manifest: Manifest, kind: str, given: GivenInputs) -> Path | None:
    """The corpus or embeddings that the artifact at `folder` was made from; None where it is not found.

    Raises:
        ArtifactError: the path that was given holds another one.
    """
    wanted = manifest.made_from.get(kind)
    named = getattr(given, kind)
    for place in _places(folder, manifest, kind, given):
        try:
            found = manifest_at(place, kind).fingerprint
        except (ArtifactError, ConfigError):
            if place == named:
                raise
            continue
        if found == wanted:
            return place
        if place == named:
            raise ArtifactError(
                f"{place} is not the {kind} that {folder} was made from: its fingerprint is {found[:16]}…, "
                f"{str(wanted)[:16]}… was expected. Give the one that it was made from, or make {folder} again."
            )
    return None


def _places(folder: Path, manifest: Manifest, kind: str, given: GivenInputs) -> Iterator[Path]:
    named = getattr(given, kind)
    if named is not None:
        yield named
        return
    recorded = manifest.details.get("inputs", {}).get(kind)
    if recorded:
        yield Path(recorded)
    yield (given.beside or folder.parent) / kind  # as `rag pipeline` lays them out


def command_for(folder: Path, manifest: Manifest) -> str:
    """The command that makes the artifact again; what the manifest does not tell stands in capital letters."""
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
    if "hf_rag" in details:
        return shlex.join(["rag", "import-hf", details["hf_rag"], str(folder)])
    if words is None:
        return "the command that made it"
    return shlex.join(["rag", *map(str, words), *more.get(manifest.kind, []), "--out", str(folder)])


def _options(values: dict[str, Any], *names: str) -> list[str]:
    found: list[str] = []
    for name in names:
        value = values.get(name, name.upper())
        if value is not None:
            found += [f"--{name.replace('_', '-')}", str(value)]
    return found
