"""The corpus artifact: the only module that writes or reads its files.

Layout: `passages-00000.parquet`, … (columns id, title, text; zstd), and `rejects.jsonl` with one object for every
rejected row. If too large a share of the rows is rejected, no corpus is published, and the rejects are kept
beside its place for inspection. Ids are unique: the first row with an id is kept, later ones are rejected. This
check keeps every id in memory, about 200 bytes each: 4 GB for the 21 million passages of DPR's Wikipedia. This
module knows nothing about file formats (the readers do), tokens, embeddings or indexes.
"""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from pydantic import BaseModel, ConfigDict, Field

from rag_core.corpus.formats import CorpusFormat, Reading, Reject, Row, expand_sources, read_rows
from rag_core.corpus.formats.rows import check_row, first_line
from rag_core.corpus.formats.sources import is_text
from rag_core.corpus.passages import Passage
from rag_core.errors import ArtifactError, InputError
from rag_core.storage.artifact import (
    Draft,
    Manifest,
    fingerprint_of_files,
    fingerprint_of_json,
    local_copy,
    open_artifact,
    publish,
    sha256_of_file,
    working_place,
)
from rag_core.storage.inputs import input_paths
from rag_core.storage.places import as_place

KIND = "corpus"
REJECTS = "rejects.jsonl"
SHARD_ROWS = 50_000
MAX_REJECTS_SHARE = 0.01
SCHEMA = pa.schema([("id", pa.string()), ("title", pa.string()), ("text", pa.string())])


class CorpusConfig(BaseModel):
    """Settings of the corpus stage."""

    model_config = ConfigDict(extra="forbid")

    format: CorpusFormat = Field(
        default="auto", description="Format of the source files; auto: recognised by their content."
    )
    words_per_passage: int = Field(
        default=100, ge=1, description="Maximum words per passage; only used for plain text."
    )
    shard_rows: int = Field(default=SHARD_ROWS, ge=1, description="Passages in one Parquet file of the corpus.")
    max_rejects_share: float = Field(
        default=MAX_REJECTS_SHARE, ge=0, le=1, description="Largest share of rows that may be rejected; 1: any."
    )

    def decisive(self) -> dict[str, Any]:
        """The settings that determine the content. `max_rejects_share` only decides whether it is published."""
        return self.model_dump(mode="json", exclude={"max_rejects_share"})


def source_files(sources: Sequence[Path], format: CorpusFormat) -> list[Path]:
    """The files that `sources` expand to, in reading order."""
    return [file.path for file in expand_sources(sources, format)]


def source_fingerprint(sources: Sequence[Path], format: CorpusFormat) -> str:
    """Fingerprint of the sources' content, independent of where the files are.

    File names count only for plain text: its passage ids and titles come from the names below the source folder, so a
    renamed file makes a different corpus.
    """
    files = expand_sources(sources, format)
    if format == "text" or (format == "auto" and any(is_text(file.path) for file in files)):
        return fingerprint_of_json([[file.name, sha256_of_file(file.path)] for file in files])
    return fingerprint_of_files(file.path for file in files)


def write_corpus(
    sources: Sequence[Path], out: Path, config: CorpusConfig, *, on_progress: Callable[[int], None] | None = None
) -> Manifest:
    """Read the sources and publish them as a corpus at `out`.

    Args:
        sources: files or folders of `config.format`.
        out: folder of the artifact; an older artifact there is replaced at the end.
        config: see `CorpusConfig`.
        on_progress: called after every shard with the number of passages so far.

    Returns:
        The manifest. `counts` has passages and rejects; `details["rejects_by_reason"]` counts rejects by
        category, `details["layouts"]` counts files by recognised layout, and `details["skipped_by_reason"]` (only
        if anything was skipped) counts what was left out without being a fault.

    Raises:
        InputError: a source cannot be read at all, no passage is left, or more rows were rejected than
            `config.max_rejects_share` allows; the rejects are then in the file that `rejects_beside` names.
        ArtifactError: `out` holds files that are not an artifact.
    """
    made_from = {"sources": source_fingerprint(sources, config.format)}
    reading = Reading()
    rows = read_rows(sources, config.format, words_per_passage=config.words_per_passage, reading=reading)
    place = ", ".join(str(source) for source in sources)
    with publish(Path(out), KIND, config=config.decisive(), made_from=made_from) as draft:
        _write_rows(draft, rows, config.shard_rows, place, on_progress)
        _check_rejects(draft, Path(out), place, config.max_rejects_share)
        draft.details["inputs"] = input_paths(sources=list(sources))
        draft.details["layouts"] = dict(sorted(reading.layouts.items()))
        if reading.skipped:
            draft.details["skipped_by_reason"] = dict(sorted(reading.skipped.items()))
    rejects_beside(Path(out)).unlink(missing_ok=True)
    return open_artifact(Path(out), KIND, check_content=False)


def rejects_beside(out: Path) -> Path:
    """The file with the rejects of a corpus that was refused because of them; the next successful run deletes it."""
    place = working_place(out)
    return place.with_name(f"{place.name}.{REJECTS}")


def refuse_many_rejects(counts: Mapping[str, int], path: Path, max_share: float) -> None:
    """Raise InputError if the existing corpus at `path`, with these counts, has a larger share of rejects."""
    rejects, rows = counts["rejects"], counts["rejects"] + counts["passages"]
    if rejects > max_share * rows:
        raise InputError(
            f"{path} was made with {rejects:,} of {rows:,} rows left out ({rejects / rows:.1%}); at most "
            f"{max_share:.1%} are allowed now. See {path / REJECTS}; correct the rows, or raise max_rejects_share."
        )


def write_passages(
    passages: Iterable[Passage],
    out: Path,
    *,
    made_from: dict[str, str],
    config: dict[str, Any],
    shard_rows: int = SHARD_ROWS,
    max_rejects_share: float = MAX_REJECTS_SHARE,
) -> Manifest:
    """Publish generated passages as a corpus, with the same checks and counts as `write_corpus`.

    `made_from` and `config` are written to the manifest and determine the artifact's key.
    """
    place = "generated passages"
    rows = (
        check_row(place, number, passage.id, passage.title, passage.text, found=passage)
        for number, passage in enumerate(passages, 1)
    )
    with publish(Path(out), KIND, config=config, made_from=made_from) as draft:
        _write_rows(draft, rows, shard_rows, place, None)
        _check_rejects(draft, Path(out), place, max_rejects_share)
    rejects_beside(Path(out)).unlink(missing_ok=True)
    return open_artifact(Path(out), KIND, check_content=False)


class Corpus:
    """A published corpus. Open it with `Corpus.open`; `len()` is its number of passages."""

    def __init__(self, path: Path, manifest: Manifest) -> None:
        self.path = path
        self.place = path  # where it was opened: `path`, or the object-store place of which `path` is a local copy
        self.manifest = manifest
        names = [name for name in manifest.files if name.startswith("passages-")]
        # Sort by length first: from the 100,000th shard on, the number has more than five digits.
        self.shards = [path / name for name in sorted(names, key=lambda name: (len(name), name))]

    @classmethod
    def open(cls, path: Path, check_content: bool = True) -> Corpus:
        """Open a corpus.

        Args:
            path: the artifact's folder.
            check_content: compare the SHA-256 of every file (default), or only presence and size.

        Raises:
            ArtifactError: not a corpus, or damaged.
        """
        local = local_copy(path)
        manifest = open_artifact(local, KIND, check_content=check_content)
        if manifest.counts.get("passages", 0) < 1:
            raise ArtifactError(f"{path}: the manifest does not say how many passages it holds. Make the corpus again.")
        corpus = cls(local, manifest)
        corpus.place = as_place(path)
        return corpus

    def __len__(self) -> int:
        return self.manifest.counts["passages"]

    def iter_passages(self) -> Iterator[Passage]:
        """All passages in the order of the corpus, one shard in memory at a time."""
        for shard in self.shards:
            table = read_shard(shard)
            for id, title, text in zip(*(table[name].to_pylist() for name in SCHEMA.names), strict=True):
                yield Passage(id, title, text)


def read_shard(path: Path) -> pa.Table:
    """Read one shard of a corpus as a table with the string columns id, title and text.

    Raises:
        ArtifactError: the file cannot be read, or has other columns.
    """
    try:
        with pq.ParquetFile(path) as file:
            table = file.read()
    except (pa.ArrowException, OSError, ValueError) as error:
        raise ArtifactError(f"{path} cannot be read ({first_line(error)}). Make the corpus again.") from error
    if not table.schema.equals(SCHEMA):
        raise ArtifactError(
            f"{path} has the columns {table.schema.names}; {SCHEMA.names} were expected. Correct the path."
        )
    return table


def _write_rows(
    draft: Draft,
    rows: Iterable[Row | Reject],
    shard_rows: int,
    place: str,
    on_progress: Callable[[int], None] | None,
) -> None:
    """Write the shards and the rejects into the draft, and count both."""
    by_reason: Counter[str] = Counter()
    passages, shards = 0, 0
    shard: list[Passage] = []
    # A file name may hold undecodable bytes; backslashreplace turns them into valid JSON escapes.
    with (draft.folder / REJECTS).open("w", encoding="utf-8", errors="backslashreplace", newline="\n") as rejects:
        for row in _without_duplicates(rows):
            if isinstance(row, Reject):
                by_reason[row.category] += 1
                rejects.write(json.dumps(asdict(row), ensure_ascii=False) + "\n")
                continue
            shard.append(row.passage)
            passages += 1
            if len(shard) == shard_rows:
                _write_shard(draft.folder, shards, shard)
                shards, shard = shards + 1, []
                if on_progress:
                    on_progress(passages)
    if shard:
        _write_shard(draft.folder, shards, shard)
        if on_progress:
            on_progress(passages)
    draft.counts.update(passages=passages, rejects=by_reason.total())
    draft.details["rejects_by_reason"] = dict(sorted(by_reason.items()))


def _without_duplicates(rows: Iterable[Row | Reject]) -> Iterator[Row | Reject]:
    """Yield the rows; a row whose id was seen before becomes a reject that names the first row with it."""
    file_numbers: dict[str, int] = {}
    names: list[str] = []
    seen: dict[str, tuple[int, int | None]] = {}
    for row in rows:
        if isinstance(row, Reject):
            yield row
            continue
        if row.file not in file_numbers:
            file_numbers[row.file] = len(names)
            names.append(row.file)
        if row.passage.id not in seen:
            seen[row.passage.id] = (file_numbers[row.file], row.line)
            yield row
            continue
        file, line = seen[row.passage.id]
        first = names[file] if line is None else f"{names[file]} line {line}"
        reason = f"duplicate id: {row.passage.id!r} was first read from {first}"
        yield Reject(row.file, row.line, reason, row.passage.text[:200])


def _write_shard(folder: Path, number: int, shard: list[Passage]) -> None:
    columns = [[getattr(passage, name) for passage in shard] for name in SCHEMA.names]
    table = pa.table(columns, schema=SCHEMA)
    pq.write_table(table, folder / f"passages-{number:05}.parquet", compression="zstd")


def _check_rejects(draft: Draft, out: Path, place: str, max_share: float) -> None:
    """Raise InputError if no passage is left or too many rows were rejected.

    Before that, move the rejects to `rejects_beside`, since the draft will be deleted.
    """
    passages, rejects = draft.counts["passages"], draft.counts["rejects"]
    rows = passages + rejects
    if not rows:
        raise InputError(f"{place}: no passage found and no row rejected, so the input is empty. Give another source.")
    if passages and rejects <= max_share * rows:
        return
    with (draft.folder / REJECTS).open(encoding="utf-8") as file:
        first = json.loads(file.readline())
    kept = rejects_beside(out)
    os.replace(draft.folder / REJECTS, kept)
    first_place = first["file"] if first["line"] is None else f"{first['file']} line {first['line']}"
    share = f"{rejects:,} of {rows:,} rows ({rejects / rows:.1%}) were rejected"
    allowed = (
        f", more than the {max_share:.1%} that max_rejects_share allows" if passages else ", so no passage is left"
    )
    remedy = ", or raise --max-rejects-share (max_rejects_share) if they may be left out" if passages else ""
    raise InputError(
        f"{place}: {share}{allowed}. The first: {first_place}: {first['reason']} (found {first['found']!r}). "
        f"All are in {kept}. Correct the rows, choose the format that fits the file{remedy}."
    )
