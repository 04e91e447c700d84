"""The corpus artefact: its one owner, for writing and for reading.

Layout: `passages-00000.parquet`, … (columns id, title, text; zstd), and `rejects.jsonl` with one object for every row
that was left out. Ids are unique: the first row with an id is kept, a later one is rejected. That check keeps every
id in memory, about 200 bytes each: 4 GB for the 21 million passages of DPR's Wikipedia. This module knows nothing
about file formats (the readers do) nor about tokens, embeddings or indexes.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from pydantic import BaseModel, ConfigDict, Field

from rag_core.artefact import (
    Draft,
    Manifest,
    fingerprint_of_files,
    fingerprint_of_json,
    local_copy,
    open_artefact,
    publish,
    sha256_of_file,
)
from rag_core.artefact_inputs import input_paths
from rag_core.errors import ArtefactError, InputError
from rag_core.passages import Passage
from rag_core.places import as_place
from rag_core.readers import CorpusFormat, Reject, Row, expand_sources, read_rows
from rag_core.readers.rows import check_row

KIND = "corpus"
REJECTS = "rejects.jsonl"
SHARD_ROWS = 50_000
SCHEMA = pa.schema([("id", pa.string()), ("title", pa.string()), ("text", pa.string())])


class CorpusConfig(BaseModel):
    """Settings of the corpus stage."""

    model_config = ConfigDict(extra="forbid")

    format: CorpusFormat = Field(description="Format of the source files.")
    words_per_passage: int = Field(default=100, ge=1, description="Most words in a passage; only used by format text.")
    shard_rows: int = Field(default=SHARD_ROWS, ge=1, description="Passages in one Parquet file of the corpus.")


def source_files(sources: Sequence[Path], format: CorpusFormat) -> list[Path]:
    """The files that `sources` stand for, in the order in which they are read."""
    return [file.path for file in expand_sources(sources, format)]


def source_fingerprint(sources: Sequence[Path], format: CorpusFormat) -> str:
    """Identity of what the sources hold, wherever they lie.

    Names do not count, save for format "text", where passage ids and titles are made from the names below the source
    folder: there a renamed file does make another corpus.
    """
    files = expand_sources(sources, format)
    if format == "text":
        return fingerprint_of_json([[file.name, sha256_of_file(file.path)] for file in files])
    return fingerprint_of_files(file.path for file in files)


def write_corpus(
    sources: Sequence[Path], out: Path, config: CorpusConfig, *, on_progress: Callable[[int], None] | None = None
) -> Manifest:
    """Read the sources and publish them as a corpus at `out`.

    Args:
        sources: files or folders of `config.format`.
        out: folder of the artefact; an older artefact there is replaced at the end.
        config: see `CorpusConfig`.
        on_progress: called with the number of passages so far, after every shard.

    Returns:
        The manifest; `counts` has passages and rejects, `details["rejects_by_reason"]` the rejects by category.

    Raises:
        InputError: a source that cannot be read at all, or no passage left.
        ArtefactError: `out` holds something that is not ours.
    """
    made_from = {"sources": source_fingerprint(sources, config.format)}
    rows = read_rows(sources, config.format, words_per_passage=config.words_per_passage)
    with publish(Path(out), KIND, config=config.model_dump(mode="json"), made_from=made_from) as draft:
        _fill(draft, rows, config.shard_rows, ", ".join(str(source) for source in sources), on_progress)
        draft.details["inputs"] = input_paths(sources=list(sources))
    return open_artefact(Path(out), KIND, check_content=False)


def write_passages(
    passages: Iterable[Passage],
    out: Path,
    *,
    made_from: dict[str, str],
    config: dict[str, Any],
    shard_rows: int = SHARD_ROWS,
) -> Manifest:
    """Publish passages made by code as a corpus; checked and counted as `write_corpus` does.

    `made_from` and `config` go to the manifest and make the artefact's key.
    """
    place = "generated passages"
    rows = (
        check_row(place, number, passage.id, passage.title, passage.text, found=passage)
        for number, passage in enumerate(passages, 1)
    )
    with publish(Path(out), KIND, config=config, made_from=made_from) as draft:
        _fill(draft, rows, shard_rows, place, None)
    return open_artefact(Path(out), KIND, check_content=False)


class Corpus:
    """A published corpus. Open it with `Corpus.open`; `len()` is its number of passages."""

    def __init__(self, path: Path, manifest: Manifest) -> None:
        self.path = path
        self.place = path  # what it was opened as: `path`, or where in an object store that is a copy of
        self.manifest = manifest
        names = [name for name in manifest.files if name.startswith("passages-")]
        # By length first: from the 100,000th shard on, the number is wider than its five digits.
        self.shards = [path / name for name in sorted(names, key=lambda name: (len(name), name))]

    @classmethod
    def open(cls, path: Path, check_content: bool = True) -> Corpus:
        """Open a corpus.

        Args:
            path: the artefact's folder.
            check_content: compare the SHA-256 of every file (default), or only presence and size.

        Raises:
            ArtefactError: not a corpus, or damaged.
        """
        local = local_copy(path)
        corpus = cls(local, open_artefact(local, KIND, check_content=check_content))
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
    """One shard of a corpus as a table with the string columns id, title and text.

    Raises:
        ArtefactError: not such a file.
    """
    try:
        with pq.ParquetFile(path) as file:
            table = file.read()
    except (pa.ArrowException, OSError) as error:
        raise ArtefactError(f"{path} cannot be read ({str(error).splitlines()[0]}). Make the corpus again.") from error
    if not table.schema.equals(SCHEMA):
        raise ArtefactError(
            f"{path} has the columns {table.schema.names}; {SCHEMA.names} were expected. Correct the path."
        )
    return table


def _fill(
    draft: Draft,
    rows: Iterable[Row | Reject],
    shard_rows: int,
    place: str,
    on_progress: Callable[[int], None] | None,
) -> None:
    """Write shards and rejects into the draft, and count."""
    first_reject: Reject | None = None
    by_reason: Counter[str] = Counter()
    passages, shards = 0, 0
    shard: list[Passage] = []
    # A file name may hold undecodable bytes; backslashreplace turns them into what JSON reads as an escape.
    with (draft.folder / REJECTS).open("w", encoding="utf-8", errors="backslashreplace", newline="\n") as rejects:
        for row in _without_duplicates(rows):
            if isinstance(row, Reject):
                first_reject = first_reject or row
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
    if not passages:
        raise InputError(_nothing_left(place, by_reason.total(), first_reject))
    if shard:
        _write_shard(draft.folder, shards, shard)
        if on_progress:
            on_progress(passages)
    draft.counts.update(passages=passages, rejects=by_reason.total())
    draft.details["rejects_by_reason"] = dict(sorted(by_reason.items()))


def _without_duplicates(rows: Iterable[Row | Reject]) -> Iterator[Row | Reject]:
    """The rows with every later one of an id turned into a reject that names the first."""
    files: dict[str, int] = {}
    names: list[str] = []
    seen: dict[str, tuple[int, int | None]] = {}
    for row in rows:
        if isinstance(row, Reject):
            yield row
            continue
        if row.file not in files:
            files[row.file] = len(names)
            names.append(row.file)
        if row.passage.id not in seen:
            seen[row.passage.id] = (files[row.file], row.line)
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


def _nothing_left(place: str, rejects: int, first: Reject | None) -> str:
    if first is None:
        return f"{place}: no passage found and no row rejected, so the input is empty. Give another source."
    where = first.file if first.line is None else f"{first.file} line {first.line}"
    return (
        f"{place}: no passage could be read; {rejects} rows were rejected. The first: {where}: {first.reason} "
        f"(found {first.found!r}). Correct the rows, or choose the format that fits the file."
    )
