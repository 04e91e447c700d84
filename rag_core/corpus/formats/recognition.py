"""Recognises a file's container by its first bytes and line, and its layout by the keys of its first records.

Any layout may come in any container. There is no guessing: a file that fits no layout is refused, and the message
names its keys. If the caller names a format, that fixes the container; the layout is still recognised by content.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Iterator
from contextlib import closing, suppress
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from rag_core.corpus.formats.containers import delimited, json_file, json_lines, parquet
from rag_core.corpus.formats.first_bytes import open_lines, refuse_other_files
from rag_core.corpus.formats.layouts import KNOWN_KEYS, LAYOUTS, Layout, columns_fit_a_layout, recognised_layout
from rag_core.corpus.formats.near_keys import has_near_key, nearest_layout, printable
from rag_core.corpus.formats.rows import MAX_LINE_BYTES, Record, Reject, excerpt
from rag_core.corpus.formats.sources import CorpusFormat, SourceFile, is_text
from rag_core.errors import InputError

SAMPLE_RECORDS = 50
_DELIMITERS = {delimited.TAB: "tab-separated", ",": "CSV", ";": "CSV with semicolons"}
_JSON_LINES_SUFFIXES = (".jsonl", ".ndjson", ".jsonl.gz", ".ndjson.gz")
Open = Callable[[Path, Collection[str]], Iterator[Record | Reject]]


@dataclass(frozen=True)
class Container:
    """A kind of file: the format that selects it, its name in messages, and the function that reads its records."""

    format: CorpusFormat
    description: str
    open: Open


@dataclass(frozen=True)
class Recognised:
    """A file's container and layout. The layout is None for text and SQuAD's articles, which have their own readers."""

    container: Container
    layout: Layout | None

    def __str__(self) -> str:
        container = self.container.description
        return f"{self.layout.name} ({self.layout.description}), {container}" if self.layout else container


def _is_record(record: Record) -> bool:
    return recognised_layout([record]) is not None or has_near_key(record.keys)


def _table(delimiter: str, description: str, format: CorpusFormat, header: tuple[str, ...] = ()) -> Container:
    return Container(format, description, lambda path, wanted: delimited.records(path, delimiter, wanted, header))


def _no_records(path: Path, _: Collection[str]) -> Iterator[Record | Reject]:
    return iter(())


JSON_LINES = Container("jsonl", "JSON Lines", lambda path, _: json_lines.records(path))
JSON = Container("json", "JSON", lambda path, _: json_file.records(path, _is_record))
PARQUET = Container("parquet", "Parquet", parquet.records)
TABLES = {
    delimiter: _table(delimiter, description, "dpr-tsv" if delimiter == delimited.TAB else "csv")
    for delimiter, description in _DELIMITERS.items()
}
COLLECTION = _table(delimited.TAB, "tab-separated without header", "auto", delimited.NO_HEADER)
SQUAD = Container("squad", "SQuAD's articles, JSON", _no_records)
TEXT = Container("text", "plain text", _no_records)


def recognise(source: SourceFile, format: CorpusFormat) -> Recognised:
    """Recognise a file's container (if `format` is "auto") and layout.

    Raises:
        InputError: no known container or layout, or not the container that `format` names.
    """
    if format in ("text", "squad"):
        return Recognised(TEXT if format == "text" else SQUAD, None)
    container = _container(source, format)
    if container in (TEXT, SQUAD):
        return Recognised(container, None)
    sample = _sample(container, source.path)
    layout = recognised_layout(sample)
    if layout:
        return Recognised(container, layout)
    if container is JSON and any(isinstance(record.fields.get("paragraphs"), list) for record in sample):
        return Recognised(SQUAD, None)
    if sample:
        raise _unrecognised(source.path, sample[0], container)
    if container is JSON_LINES and format == "jsonl" and format_hint(source, format):
        raise InputError(f"{source.path} is not JSON Lines; one object per line was expected.")
    # Only bad rows, or no rows at all: the reader rejects them, or the caller finds the input empty.
    return Recognised(container, LAYOUTS[0])


def format_hint(source: SourceFile, format: CorpusFormat) -> str:
    """For a file that is not in `format`: a sentence that says what it is; empty if unknown."""
    with suppress(InputError):
        actual = recognise(source, "auto")
        if actual.container.format != format and (actual.layout is None or _sample(actual.container, source.path)):
            alternative = "" if actual.container.format == "auto" else f", or name the format {actual.container.format}"
            return f"By its content it is {actual}: leave the format out{alternative}."
    return ""


def _sample(container: Container, path: Path) -> list[Record]:
    with closing(container.open(path, KNOWN_KEYS)) as records:  # type: ignore[type-var]
        return [record for record in islice(records, SAMPLE_RECORDS) if isinstance(record, Record)]


def _container(source: SourceFile, format: CorpusFormat) -> Container:
    if format == "auto":
        return _container_by_content(source)
    if format == "dpr-tsv":
        return _table_with_header(source.path, (delimited.TAB,))
    if format == "csv":
        return _table_with_header(source.path, tuple(_DELIMITERS))
    return {"jsonl": JSON_LINES, "json": JSON, "parquet": PARQUET}[format]


def _container_by_content(source: SourceFile) -> Container:
    if is_text(source.path):
        return TEXT
    with source.path.open("rb") as file:
        if file.read(4) == b"PAR1":
            return PARQUET
    refuse_other_files(source.path)
    line, is_whole, is_only = _first_line(source.path)
    if line.startswith("{"):
        has_lines_suffix = source.path.name.lower().endswith(_JSON_LINES_SUFFIXES)
        return JSON_LINES if has_lines_suffix or (is_whole and _is_line_of_records(line, is_only)) else JSON
    if line.startswith("["):
        return JSON
    if not line:
        return JSON_LINES
    fields = line.split(delimited.TAB)
    if len(fields) == 2 and fields[0].strip().isdecimal():
        return COLLECTION
    return _table_with_header(source.path, tuple(_DELIMITERS))


def _is_line_of_records(line: str, is_only: bool) -> bool:
    """Whether a line is the first of JSON Lines, rather than a JSON file with all its records on one line."""
    try:
        content = json.loads(line)
    except (ValueError, RecursionError):
        return False
    return recognised_layout([Record(1, content, line, content)]) is not None or not is_only


def _first_line(path: Path) -> tuple[str, bool, bool]:
    """The first line that is not blank, whether it was read whole, and whether it is the only one."""
    with open_lines(path) as file:
        while raw := file.readline(MAX_LINE_BYTES + 1):
            line = raw.decode("utf-8-sig", "replace").strip()
            if line:
                return line, len(raw) <= MAX_LINE_BYTES, not file.read(1000).strip()
    return "", True, True


def _table_with_header(path: Path, delimiters: tuple[str, ...]) -> Container:
    line, *_ = _first_line(path)
    headers = {delimiter: delimited.columns_of(path, line, delimiter) for delimiter in delimiters}
    for delimiter, columns in headers.items():
        if columns_fit_a_layout(columns):
            return TABLES[delimiter]
    kinds = " or ".join(_DELIMITERS[delimiter] for delimiter in delimiters)
    columns = max(headers.values(), key=len)
    nearest = nearest_layout({}, columns) if len(columns) > 1 else None
    raise InputError(
        f"{path} line 1: a header ({kinds}) with columns such as id, text and title was expected, found "
        f"{excerpt(line)!r}. {f'{nearest} ' if nearest else ''}Add the header or correct it, or choose another format "
        "(plain text is read from files that end in .txt or .md)."
    )


def _unrecognised(path: Path, record: Record, container: Container) -> InputError:
    keys = [printable(key) for key in list(record.keys)[:20]]
    listing = f"the keys {', '.join(keys)}{', …' if len(record.keys) > 20 else ''}" if keys else "no key"
    start = f"{path} ({container.description}) has {listing}; no known layout of passages has these."
    if _is_column_oriented(record.fields):
        return InputError(f"{start} Write one object per passage (pandas: to_json(orient='records', lines=True)).")
    if {"question", "query", "input"} & set(record.keys):
        return InputError(f"{start} They look like those of questions: give the file as --questions.")
    nearest = nearest_layout(record.fields, record.keys)
    remedy = f"Rename or add {'columns' if container is PARQUET else 'keys'}: id, title and text are always read."
    return InputError(f"{start} {nearest} {remedy}" if nearest else f"{start} {remedy}")


def _is_column_oriented(fields: Any) -> bool:
    """Whether this is one object per column, as pandas writes it: {"id": {"0": …}, "text": {"0": …}}."""
    values = list(fields.values())
    return len(values) > 1 and all(isinstance(value, dict) and set(value) == set(values[0]) for value in values)
