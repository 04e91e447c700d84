"""Corpus readers: files in, passages out, one at a time; bad rows come out as rejects.

A file has a container (JSON Lines, JSON, Parquet, a table; `containers/`) and a layout (which keys mean what;
`layouts.py`). Both are recognised by the file's content (`recognition.py`). SQuAD's articles and plain text have
their own readers. A bad row becomes a `Reject` and reading continues; a file that cannot be read at all raises
InputError. The readers do not check that ids are unique and write no files: `rag_core.corpus.corpus` does both.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from rag_core.corpus.formats import squad, text
from rag_core.corpus.formats.layout_passages import passages_of
from rag_core.corpus.formats.layouts import Layout
from rag_core.corpus.formats.recognition import TEXT, Container, format_hint, recognise
from rag_core.corpus.formats.rows import Reject, Row, Skipped
from rag_core.corpus.formats.sources import CorpusFormat, SourceFile, expand_sources
from rag_core.corpus.passages import Passage
from rag_core.errors import ConfigError, InputError

__all__ = ["CorpusFormat", "Reading", "Reject", "Row", "SourceFile", "expand_sources", "read_passages", "read_rows"]


@dataclass
class Reading:
    """Counts collected while sources are read: files by recognised layout, and skipped records by reason."""

    layouts: Counter[str] = field(default_factory=Counter)
    skipped: Counter[str] = field(default_factory=Counter)


def read_passages(
    sources: Sequence[Path], format: CorpusFormat = "auto", *, words_per_passage: int = 100
) -> Iterator[Passage | Reject]:
    """Passages and rejects of all sources, in order.

    Args:
        sources: files, or folders; a folder means all its files with the format's suffix, sorted.
        format: a `CorpusFormat`; "auto" recognises each file by its content.
        words_per_passage: maximum words per passage; only used for plain text.

    Raises:
        ConfigError: unknown format, or words_per_passage below 1 (at once).
        InputError: a source that is missing (at once) or not of that format (when it is reached).
    """
    rows = read_rows(sources, format, words_per_passage=words_per_passage)
    return (row.passage if isinstance(row, Row) else row for row in rows)


def read_rows(
    sources: Sequence[Path],
    format: CorpusFormat = "auto",
    *,
    words_per_passage: int = 100,
    reading: Reading | None = None,
) -> Iterator[Row | Reject]:
    """Like `read_passages`, but every passage comes with its file and line. Counts are added to `reading`, if given."""
    if words_per_passage < 1:
        raise ConfigError(f"words_per_passage is {words_per_passage}; it must be at least 1.")
    files = expand_sources(sources, format)
    return _rows_of_all(files, format, words_per_passage, Reading() if reading is None else reading)


def _rows_of_all(
    files: Sequence[SourceFile], format: CorpusFormat, words_per_passage: int, reading: Reading
) -> Iterator[Row | Reject]:
    seen: set[bytes] = set()
    for file in files:
        at_start = True
        try:
            recognised = recognise(file, format)
            reading.layouts[str(recognised)] += 1
            rows: Iterator[Row | Reject | Skipped]
            if recognised.layout:
                rows = _records_as_rows(file, recognised.container, recognised.layout, seen)
            elif recognised.container is TEXT:
                rows = text.read(file, words_per_passage)
            else:
                rows = squad.read(file)
            for row in rows:
                at_start = False
                if isinstance(row, Skipped):
                    reading.skipped[row.reason] += 1
                else:
                    yield row
        except InputError as error:
            if at_start and format != "auto" and (hint := format_hint(file, format)):
                raise InputError(f"{error} {hint}") from error
            raise


def _records_as_rows(
    file: SourceFile, container: Container, layout: Layout, seen: set[bytes]
) -> Iterator[Row | Reject | Skipped]:
    """The rows of one file. Layouts of questions repeat passages: those whose hash is in `seen` are skipped."""
    repeats_passages = layout.holds in ("context", "titled sentences")
    for record in container.open(file.path, layout.all_keys()):
        if isinstance(record, Reject):
            yield record
            continue
        for row in passages_of(layout, file.path, record):
            if repeats_passages and isinstance(row, Row):
                passage = row.passage
                digest = hashlib.blake2b(
                    f"{passage.id}\0{passage.title}\0{passage.text}".encode(), digest_size=16
                ).digest()
                if digest in seen:
                    yield Skipped("passage of an earlier question")
                    continue
                seen.add(digest)
            yield row
