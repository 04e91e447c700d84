"""Corpus readers: files in, passages out, one at a time; bad rows come out as rejects.

A file has a container (JSON Lines, JSON, Parquet, a table; `containers/`) and a layout (which keys mean what; `layouts.py`),
and both are recognised by its content (`recognition.py`). SQuAD's articles and plain text have a reader each. A bad row is a
`Reject` and reading goes on; a file that cannot be read at all raises InputError. The readers do not know whether an id was
seen before, nor where the passages go: `rag_core.corpus.corpus` does.
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
from rag_core.corpus.formats.recognition import TEXT, Container, recognise, resemblance
from rag_core.corpus.formats.rows import Reject, Row, Skipped
from rag_core.corpus.formats.sources import CorpusFormat, SourceFile, expand_sources
from rag_core.corpus.passages import Passage
from rag_core.errors import ConfigError, InputError

__all__ = ["CorpusFormat", "Reading", "Reject", "Row", "SourceFile", "expand_sources", "read_passages", "read_rows"]


@dataclass
class Reading:
    """What was found out while sources were read: files by what they were recognised as, and what was skipped, by reason."""

    layouts: Counter[str] = field(default_factory=Counter)
    skipped: Counter[str] = field(default_factory=Counter)


def read_passages(
    sources: Sequence[Path], format: CorpusFormat = "auto", *, words_per_passage: int = 100
) -> Iterator[Passage | Reject]:
    """Passages and rejects of all sources, in order.

    Args:
        sources: files, or folders that stand for all their files of the format's suffix, sorted.
        format: a `CorpusFormat`; "auto" recognises each file by its content.
        words_per_passage: the most words in a passage; only used for plain text.

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
    """Like `read_passages`, but every passage comes with its file and line; `reading`, if given, is filled meanwhile."""
    if words_per_passage < 1:
        raise ConfigError(f"words_per_passage is {words_per_passage}; it must be at least 1.")
    files = expand_sources(sources, format)
    return _rows_of_all(files, format, words_per_passage, Reading() if reading is None else reading)


def _rows_of_all(
    files: Sequence[SourceFile], format: CorpusFormat, words_per_passage: int, reading: Reading
) -> Iterator[Row | Reject]:
    repeated: set[bytes] = set()
    for file in files:
        at_start = True
        try:
            found = recognise(file, format)
            reading.layouts[str(found)] += 1
            rows: Iterator[Row | Reject | Skipped]
            if found.layout:
                rows = _records_as_rows(file, found.container, found.layout, repeated)
            elif found.container is TEXT:
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
            if at_start and format != "auto" and (resembles := resemblance(file, format)):
                raise InputError(f"{error} {resembles}") from error
            raise


def _records_as_rows(
    file: SourceFile, container: Container, layout: Layout, repeated: set[bytes]
) -> Iterator[Row | Reject | Skipped]:
    comes_again = layout.holds in ("context", "titled sentences")
    for record in container.open(file.path, layout.all_keys()):
        if isinstance(record, Reject):
            yield record
            continue
        for row in passages_of(layout, file.path, record):
            if comes_again and isinstance(row, Row):
                passage = row.passage
                mark = hashlib.blake2b(
                    f"{passage.id}\0{passage.title}\0{passage.text}".encode(), digest_size=16
                ).digest()
                if mark in repeated:
                    yield Skipped("passage of an earlier question")
                    continue
                repeated.add(mark)
            yield row
