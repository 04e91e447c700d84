"""Corpus readers: files of a known format in, passages out, one at a time; bad rows come out as rejects.

Each format has one module with a `read` function. A bad row is a `Reject` and reading goes on; a file that cannot be
of the format at all raises InputError. The readers do not know whether an id was seen before, nor where the passages
go: `rag_core.corpus` does.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path

from rag_core.errors import ConfigError
from rag_core.passages import Passage
from rag_core.readers import dpr_tsv, jsonl, parquet, squad, text
from rag_core.readers.rows import Reject, Row
from rag_core.readers.sources import CorpusFormat, SourceFile, expand_sources

__all__ = ["CorpusFormat", "Reject", "Row", "SourceFile", "expand_sources", "read_passages", "read_rows"]


def read_passages(
    sources: Sequence[Path], format: CorpusFormat, *, words_per_passage: int = 100
) -> Iterator[Passage | Reject]:
    """Passages and rejects of all sources, in order.

    Args:
        sources: files, or folders that stand for all their files of the format's suffix, sorted.
        format: "jsonl", "dpr-tsv", "parquet", "squad" or "text".
        words_per_passage: the most words in a passage; only used by "text".

    Raises:
        ConfigError: unknown format, or words_per_passage below 1 (at once).
        InputError: a source that is missing (at once) or not of that format (when it is reached).
    """
    rows = read_rows(sources, format, words_per_passage=words_per_passage)
    return (row.passage if isinstance(row, Row) else row for row in rows)


def read_rows(sources: Sequence[Path], format: CorpusFormat, *, words_per_passage: int = 100) -> Iterator[Row | Reject]:
    """Like `read_passages`, but every passage comes with its file and line."""
    if words_per_passage < 1:
        raise ConfigError(f"words_per_passage is {words_per_passage}; it must be at least 1.")
    files = expand_sources(sources, format)
    readers: dict[CorpusFormat, Callable[[SourceFile], Iterator[Row | Reject]]] = {
        "jsonl": jsonl.read,
        "dpr-tsv": dpr_tsv.read,
        "parquet": parquet.read,
        "squad": squad.read,
        "text": partial(text.read, words_per_passage=words_per_passage),
    }
    read = readers[format]
    return (row for file in files for row in read(file))
