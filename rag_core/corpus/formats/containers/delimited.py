"""Tables of text: DPR's passage file (psgs_w100.tsv), CSV, and MS MARCO's collection, which has no header.

Fields are separated by tabs, commas or semicolons and quoted as in Python's csv module; the first line names the
columns. Quotes inside an unquoted field are ordinary characters.

A quoted field may hold line ends, but a stray opening quote must not swallow the rows after it. So a row may span
at most `MAX_ROW_LINES` lines (`MAX_CSV_ROW_LINES` for CSV, whose texts often have many paragraphs). In a
tab-separated file, where text has no tabs, a row is never joined with a line that has the tabs of a whole row. If
joining fails, only the first line is rejected.
"""

from __future__ import annotations

import csv
from collections import deque
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path

from rag_core.corpus.formats.rows import MAX_LINE_BYTES, Record, Reject, excerpt, numbered_lines
from rag_core.errors import InputError

TAB = "\t"
MAX_ROW_LINES = 100
MAX_CSV_ROW_LINES = 2000
NO_HEADER = ("id", "text")


def records(
    path: Path, delimiter: str, wanted: Collection[str], header: Sequence[str] = ()
) -> Iterator[Record | Reject]:
    """Records and rejects of one table.

    Args:
        path: the file.
        delimiter: the separator of fields.
        wanted: the columns to read; each may occur only once.
        header: the column names of a file without a header.

    Raises:
        InputError: the first line is not a row, or names one of the `wanted` columns twice.
    """
    # The limit holds for the whole process, 128 KiB by default. It is only raised here, never lowered.
    csv.field_size_limit(max(csv.field_size_limit(), MAX_LINE_BYTES))
    lines = numbered_lines(path)
    columns = tuple(header) or columns_of(path, next(lines, (1, ""))[1], delimiter)
    duplicates = sorted({name for name in columns if name in wanted and columns.count(name) > 1})
    if duplicates:
        raise InputError(
            f"{path} line 1: two columns with the same name ({', '.join(duplicates)}). Rename one of them."
        )
    pending: deque[tuple[int, str | Reject]] = deque()
    while (entry := pending.popleft() if pending else next(lines, None)) is not None:
        number, line = entry
        if isinstance(line, Reject):
            yield line
        elif line:
            fields = _split(line, delimiter) or _split_over_lines(line, delimiter, len(columns), lines, pending)
            yield _record(path, number, line, fields, columns)


def columns_of(path: Path, line: str | Reject, delimiter: str) -> tuple[str, ...]:
    """The column names in a header; InputError if the line cannot be read."""
    columns = _split(line, delimiter) if isinstance(line, str) else None
    if columns is None:
        found = line.found if isinstance(line, Reject) else excerpt(line)
        raise InputError(f"{path} line 1: a header such as id, text and title was expected, found {found!r}. Add it.")
    return tuple(column.strip() for column in columns)


def _record(path: Path, number: int, line: str, fields: list[str] | None, columns: tuple[str, ...]) -> Record | Reject:
    if fields is None:
        return Reject(str(path), number, "broken row: a quoted field does not end as it should", excerpt(line))
    if len(fields) != len(columns):
        reason = f"broken row: {len(fields)} columns, expected {len(columns)}"
        return Reject(str(path), number, reason, excerpt(line))
    return Record(number, dict(zip(columns, fields, strict=True)), line, columns)


def _split(line: str, delimiter: str) -> list[str] | None:
    """The fields of one row; None if its quotes do not pair up."""
    if '"' not in line:
        return line.split(delimiter)
    try:
        return next(csv.reader([line], delimiter=delimiter, strict=True))
    except csv.Error:
        return None


def _split_over_lines(
    line: str,
    delimiter: str,
    width: int,
    lines: Iterator[tuple[int, str | Reject]],
    pending: deque[tuple[int, str | Reject]],
) -> list[str] | None:
    """The fields of a row that spans several lines; None on failure, and the lines after it stay in `pending`."""
    joined, quotes, length = [line], line.count('"'), len(line)
    max_lines = MAX_ROW_LINES if delimiter == TAB else MAX_CSV_ROW_LINES
    # In a whole row quotes come in pairs (inner ones are doubled), so an odd number means that a field is still open.
    while quotes % 2 and len(joined) <= max_lines and length <= MAX_LINE_BYTES:
        used = len(joined) - 1
        if used == len(pending):
            following = next(lines, None)
            if following is None:
                return None
            pending.append(following)
        text = pending[used][1]
        if isinstance(text, Reject) or (delimiter == TAB and text.count(TAB) >= width - 1):
            return None
        joined.append(text)
        quotes, length = quotes + text.count('"'), length + len(text)
    fields = _split("\n".join(joined), delimiter) if len(joined) > 1 else None
    if fields is not None:
        for _ in joined[1:]:
            pending.popleft()
    return fields
