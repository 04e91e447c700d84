"""`rag verify --repair`: make the damaged files of an artifact again, from its inputs, byte for byte.

Files are made in a hidden folder beside the artifact. One takes its place only if its SHA-256 is the manifest's, so an
artifact's fingerprint never changes: where another processor or library gives other bytes, the repair is refused, and
the artifact has to be made again under its own fingerprint.
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
from rag_core.storage.draft import disk_errors_named, draft_folder, sync
from rag_core.storage.inputs import GivenInputs, command_for, find_input
from rag_core.storage.manifest import REPAIRABLE, Manifest, examine_files, read_manifest
from rag_core.storage.places import ObjectPath, as_place
from rag_core.storage.writer_lock import only_writer
from rag_core.verification.stored import replace_damaged
from rag_core.verification.verification import NOT_REPAIRED

# Makes the wanted files again in a folder, under their names in the artifact.
Rebuild = Callable[[Path, Manifest, list[str], GivenInputs, Path], None]


def repair(path: Path, given: GivenInputs | None = None) -> list[str]:
    """Make the damaged files of the artifact at `path` again; returns their names.

    Args:
        path: the artifact's folder, or its place in an object store.
        given: inputs that are not where the manifest says.

    Raises:
        ArtifactError: the manifest cannot be read, the inputs are missing or others, this kind cannot be repaired, what was
            made differs from what was published, another run writes there, or the disk refuses. The message says which
            command makes the artifact again.
    """
    place = as_place(path)
    if isinstance(place, ObjectPath):
        given = replace(given or GivenInputs(), beside=place.parent)
        return replace_damaged(place, lambda copy: repair(copy, given))
    path = Path(os.path.realpath(path))
    manifest = read_manifest(path)
    with disk_errors_named(path), only_writer(path):
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
        made = draft_folder(path, "repair")
        shutil.rmtree(made, ignore_errors=True)  # of a repair that was killed
        made.mkdir()
        try:
            _REBUILD[manifest.kind](path, manifest, damaged, given or GivenInputs(), made)
            _put_in_place(path, manifest, damaged, made)
        finally:
            shutil.rmtree(made, ignore_errors=True)
    return damaged


def _put_in_place(path: Path, manifest: Manifest, names: list[str], made: Path) -> None:
    """Files with the manifest's SHA-256 replace the damaged ones; any other is refused."""
    refused = []
    for name in names:
        file = made / name
        if not file.is_file() or sha256_of_file(file) != manifest.files[name].sha256:
            refused.append(name)
            continue
        sync(file)
        (path / name).parent.mkdir(parents=True, exist_ok=True)
        os.replace(file, path / name)
        sync((path / name).parent)
    if refused:
        raise ArtifactError(
            f"{path}: {', '.join(refused)} could be made again, but not byte for byte (another processor, precision or "
            f"library version), so nothing of it was put there. {_again(path, manifest)}"
        )


def _again(path: Path, manifest: Manifest) -> str:
    return f"Make the artifact again: {command_for(path, manifest)}"


def _corpus(path: Path, manifest: Manifest, names: list[str], given: GivenInputs, made: Path) -> None:
    named = given.sources or manifest.details.get("inputs", {}).get("sources", [])
    sources = [local_file(Path(one)) for one in named]
    try:
        config = CorpusConfig.model_validate(manifest.config | {"max_rejects_share": 1.0})
    except ValidationError as error:
        raise ArtifactError(f"{path} was not made from files, so it cannot be repaired from them.") from error
    absent = [str(source) for source in sources if not source.exists()]
    if not sources or absent:
        found = f"{', '.join(absent)} is not there" if absent else "the manifest does not say where they lie"
        raise ArtifactError(
            f"{path}: repairing {', '.join(names)} needs the sources; {found}. Give them: --source PATH."
        )
    fingerprint = source_fingerprint(sources, config.format)
    if fingerprint != manifest.made_from.get("sources"):
        raise ArtifactError(
            f"{path}: the sources {', '.join(map(str, sources))} have changed since (fingerprint {fingerprint[:16]}…, "
            f"{manifest.made_from.get('sources', '')[:16]}… was expected). Give the former ones as --source, or make the "
            "corpus and all that follows again."
        )
    write_corpus(sources, made / "corpus", config)
    _take(names, made / "corpus", made)


def _embeddings(path: Path, manifest: Manifest, names: list[str], given: GivenInputs, made: Path) -> None:
    corpus = Corpus.open(_needed(path, manifest, "corpus", names, given))
    config = EmbedConfig(encoder=manifest.details["encoder"], **manifest.config)
    encoder = load_document_encoder(config)
    if encoder.fingerprint() != manifest.made_from["encoder"]:
        raise ArtifactError(
            f"{path}: {config.encoder} is not the encoder that made these embeddings (fingerprint "
            f"{encoder.fingerprint()[:16]}…, {manifest.made_from['encoder'][:16]}… was expected), so its vectors would not "
            f"fit the others. Put the former weights there. Or: {_again(path, manifest)}"
        )
    for number, shard in enumerate(corpus.shards):
        if shard_name(number) in names:
            embed_shard(encoder, shard, made / shard_name(number), config)


def _index(path: Path, manifest: Manifest, names: list[str], given: GivenInputs, made: Path) -> None:
    embeddings = Embeddings.open(_needed(path, manifest, "embeddings", names, given))
    corpus = Corpus.open(_needed(path, manifest, "corpus", names, given))
    config = IndexConfig.model_validate(manifest.config)
    if not any(name.endswith(".faiss") for name in names):
        config = config.model_copy(update={"factory": "Flat"})  # vectors and passages are the same, and no training
    build_index(embeddings, corpus, made / "index", config)
    _take(names, made / "index", made)


def _predictions(path: Path, manifest: Manifest, names: list[str], given: GivenInputs, made: Path) -> None:
    if {JSONL, PARQUET} <= set(names):
        raise ArtifactError(
            f"{path}: both {JSONL} and {PARQUET} are damaged, and either is made from the other. {_again(path, manifest)}"
        )
    if JSONL in names:
        table = pq.read_table(path / PARQUET)
        write_jsonl((row for batch in table.to_batches(max_chunksize=1024) for row in batch.to_pylist()), made / JSONL)
    else:
        # The Parquet file has one row group for each shard of questions.
        write_parquet(path / JSONL, made / PARQUET, manifest.details.get("shard_questions", 256))


_REBUILD: dict[str, Rebuild] = {
    "corpus": _corpus,
    "embeddings": _embeddings,
    "index": _index,
    "predictions": _predictions,
}


def _take(names: list[str], source: Path, made: Path) -> None:
    """Move files of an artifact that was made as a whole to where single ones are expected."""
    for name in names:
        if (source / name).is_file():
            (made / name).parent.mkdir(parents=True, exist_ok=True)
            (source / name).rename(made / name)


def _needed(path: Path, manifest: Manifest, kind: str, names: list[str], given: GivenInputs) -> Path:
    found = find_input(path, manifest, kind, given)
    if found is None:
        expected = manifest.made_from.get(kind, "unknown")
        raise ArtifactError(
            f"{path}: repairing {', '.join(names)} needs the {kind} that it was made from (fingerprint {expected[:16]}…), "
            f"and it was not found. Give its folder: --{kind} PATH. Or: {_again(path, manifest)}"
        )
    return found
