"""`rag verify --repair`: make the damaged files of an artifact again from its inputs, byte for byte.

Files are made in a hidden folder beside the artifact. A file is put in place only if its SHA-256 is that of the
manifest, so a repair never changes an artifact's fingerprint. If another processor or library gives other bytes, the
repair is refused, and the whole artifact has to be made again, with a new fingerprint.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pyarrow.parquet as pq
from pydantic import ValidationError

from rag_core.corpus.corpus import Corpus, CorpusConfig, source_fingerprint, write_corpus
from rag_core.embeddings.embeddings import EmbedConfig, Embeddings, embed_shard, load_document_encoder, shard_name
from rag_core.errors import ArtifactError
from rag_core.evaluation.predictions import JSONL, PARQUET, write_jsonl, write_parquet
from rag_core.index.passage_index import IndexConfig, build_index
from rag_core.storage.artifact import local_file, sha256_of_file
from rag_core.storage.draft import draft_folder, explain_disk_errors, sync
from rag_core.storage.inputs import GivenInputs, command_for, find_input
from rag_core.storage.manifest import REPAIRABLE, Manifest, examine_files, read_manifest
from rag_core.storage.places import ObjectPath, as_place
from rag_core.storage.writer_lock import only_writer
from rag_core.verification.stored import replace_damaged
from rag_core.verification.verification import NOT_REPAIRED

# (artifact, manifest, names of files, inputs, folder): makes these files again in `folder`, under these names.
Rebuild = Callable[[Path, Manifest, list[str], GivenInputs, Path], None]


def repair(path: Path, inputs: GivenInputs | None = None) -> list[str]:
    """Make the damaged files of the artifact at `path` again; returns their names.

    Args:
        path: the artifact's folder, or its place in an object store.
        inputs: paths of inputs that are not where the manifest says.

    Raises:
        ArtifactError: the manifest cannot be read, inputs are missing or have changed, this kind cannot be repaired, a
            file came out differently, another run is writing there, or the disk refuses. The message names the command
            that makes the artifact again.
    """
    place = as_place(path)
    if isinstance(place, ObjectPath):
        inputs = replace(inputs or GivenInputs(), beside=place.parent)
        return replace_damaged(place, lambda copy: repair(copy, inputs))
    path = Path(os.path.realpath(path))
    manifest = read_manifest(path)
    with explain_disk_errors(path), only_writer(path):
        findings = list(examine_files(path, manifest, check_content=True))
        for finding in findings:
            if finding.state in NOT_REPAIRED:
                raise ArtifactError(f"{finding.sentence(path)} {_again(path, manifest)}")
        damaged = [finding.file for finding in findings]
        if not damaged:
            return []
        if manifest.kind not in REPAIRABLE:
            raise ArtifactError(
                f"{path}: {', '.join(damaged)} cannot be repaired, because training cannot be repeated in parts. "
                f"{_again(path, manifest)}"
            )
        rebuilt = draft_folder(path, "repair")
        shutil.rmtree(rebuilt, ignore_errors=True)  # left by a repair that was killed
        rebuilt.mkdir()
        try:
            _REBUILD[manifest.kind](path, manifest, damaged, inputs or GivenInputs(), rebuilt)
            _put_in_place(path, manifest, damaged, rebuilt)
        finally:
            shutil.rmtree(rebuilt, ignore_errors=True)
    return damaged


def _put_in_place(path: Path, manifest: Manifest, names: list[str], rebuilt: Path) -> None:
    """Replace damaged files by rebuilt ones whose SHA-256 is the manifest's; refuse others."""
    refused = []
    for name in names:
        file = rebuilt / name
        if not file.is_file() or sha256_of_file(file) != manifest.files[name].sha256:
            refused.append(name)
            continue
        sync(file)
        (path / name).parent.mkdir(parents=True, exist_ok=True)
        os.replace(file, path / name)
        sync((path / name).parent)
    if refused:
        raise ArtifactError(
            f"{path}: made again, but not byte for byte (another processor, precision or library version), and so not "
            f"replaced: {', '.join(refused)}. {_again(path, manifest)}"
        )


def _again(path: Path, manifest: Manifest) -> str:
    return f"Make the artifact again: {command_for(path, manifest)}"


def _corpus(path: Path, manifest: Manifest, names: list[str], inputs: GivenInputs, rebuilt: Path) -> None:
    source_paths = inputs.sources or manifest.details.get("inputs", {}).get("sources", [])
    sources = [local_file(Path(source)) for source in source_paths]
    try:
        config = CorpusConfig.model_validate(manifest.config | {"max_rejects_share": 1.0})
    except ValidationError as error:
        raise ArtifactError(f"{path} was not made from files, so it cannot be repaired from them.") from error
    absent = [str(source) for source in sources if not source.exists()]
    if not sources or absent:
        reason = f"{', '.join(absent)} does not exist" if absent else "the manifest does not say where they are"
        raise ArtifactError(
            f"{path}: repairing {', '.join(names)} needs the sources, but {reason}. Give them: --source PATH."
        )
    fingerprint = source_fingerprint(sources, config.format)
    if fingerprint != manifest.made_from.get("sources"):
        raise ArtifactError(
            f"{path}: the sources {', '.join(map(str, sources))} have changed since (fingerprint {fingerprint[:16]}…, "
            f"{manifest.made_from.get('sources', '')[:16]}… was expected). Give the original files as --source, or "
            "make the corpus and everything made from it again."
        )
    write_corpus(sources, rebuilt / "corpus", config)
    _move_files(names, rebuilt / "corpus", rebuilt)


def _embeddings(path: Path, manifest: Manifest, names: list[str], inputs: GivenInputs, rebuilt: Path) -> None:
    corpus = Corpus.open(_require_input(path, manifest, "corpus", names, inputs))
    config = EmbedConfig(encoder=manifest.details["encoder"], **manifest.config)
    encoder = load_document_encoder(config)
    if encoder.fingerprint() != manifest.made_from["encoder"]:
        raise ArtifactError(
            f"{path}: {config.encoder} is not the encoder that made these embeddings (fingerprint "
            f"{encoder.fingerprint()[:16]}…, {manifest.made_from['encoder'][:16]}… was expected), so its vectors "
            f"would not fit the others. Put the original weights there. Or: {_again(path, manifest)}"
        )
    for number, shard in enumerate(corpus.shards):
        if shard_name(number) in names:
            embed_shard(encoder, shard, rebuilt / shard_name(number), config)


def _index(path: Path, manifest: Manifest, names: list[str], inputs: GivenInputs, rebuilt: Path) -> None:
    embeddings = Embeddings.open(_require_input(path, manifest, "embeddings", names, inputs))
    corpus = Corpus.open(_require_input(path, manifest, "corpus", names, inputs))
    config = IndexConfig.model_validate(manifest.config)
    if not any(name.endswith(".faiss") for name in names):
        # Vectors and passages do not depend on the factory, and Flat needs no training.
        config = config.model_copy(update={"factory": "Flat"})
    build_index(embeddings, corpus, rebuilt / "index", config)
    _move_files(names, rebuilt / "index", rebuilt)


def _predictions(path: Path, manifest: Manifest, names: list[str], inputs: GivenInputs, rebuilt: Path) -> None:
    if {JSONL, PARQUET} <= set(names):
        raise ArtifactError(
            f"{path}: both {JSONL} and {PARQUET} are damaged, and each can only be made from the other. "
            f"{_again(path, manifest)}"
        )
    if JSONL in names:
        table = pq.read_table(path / PARQUET)
        rows = (row for batch in table.to_batches(max_chunksize=1024) for row in batch.to_pylist())
        write_jsonl(rows, rebuilt / JSONL)
    else:
        # The Parquet file has one row group per shard of questions.
        write_parquet(path / JSONL, rebuilt / PARQUET, manifest.details.get("shard_questions", 256))


_REBUILD: dict[str, Rebuild] = {
    "corpus": _corpus,
    "embeddings": _embeddings,
    "index": _index,
    "predictions": _predictions,
}


def _move_files(names: list[str], source: Path, target: Path) -> None:
    """Move the named files from a whole artifact at `source` to `target`."""
    for name in names:
        if (source / name).is_file():
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            (source / name).rename(target / name)


def _require_input(path: Path, manifest: Manifest, kind: str, names: list[str], inputs: GivenInputs) -> Path:
    input_path = find_input(path, manifest, kind, inputs)
    if input_path is None:
        expected = manifest.made_from.get(kind, "unknown")
        raise ArtifactError(
            f"{path}: repairing {', '.join(names)} needs the {kind} it was made from (fingerprint {expected[:16]}…), "
            f"but that was not found. Give its folder: --{kind} PATH. Or: {_again(path, manifest)}"
        )
    return input_path
