"""The passage file of DPR (psgs_w100.tsv): tab-separated, csv-quoted, with the header `id`, `text`, `title`.

DPR writes one passage a line. A quoted field may still hold line ends, as csv allows; but a stray opening quote must
not swallow the rows after it, so a row is joined over at most `MAX_ROW_LINES` lines and never with a line that has
the tabs of a whole row; if that yields nothing, only its first line is rejected. Quotes inside an unquoted field are
ordinary characters, as in csv.
"""

from __future__ import annotations

import csv
from collections import deque
from collections.abc import Iterator
from pathlib import Path

from rag_core.errors import InputError
from rag_core.readers.rows import MAX_LINE_BYTES, Reject, Row, check_row, excerpt, numbered_lines
from rag_core.readers.sources import SourceFile

MAX_ROW_LINES = 100


def read(source: SourceFile) -> Iterator[Row | Reject]:
    """Rows and rejects of one DPR passage file.

    Raises:
        InputError: the first line is not a header with `id` and `text`.
    """
    # The limit is one for the process and 128 KiB by default; it is only ever raised here.
    csv.field_size_limit(max(csv.field_size_limit(), MAX_LINE_BYTES))
    lines = numbered_lines(source.path)
    columns = _header(source.path, next(lines, (1, ""))[1])
    waiting: deque[tuple[int, str | Reject]] = deque()
    while (entry := waiting.popleft() if waiting else next(lines, None)) is not None:
        number, line = entry
        if isinstance(line, Reject):
            yield line
        elif line:
            fields = _split(line) or _split_over_lines(line, len(columns), lines, waiting)
            yield _row(source.path, number, line, fields, columns)


def _header(path: Path, line: str | Reject) -> list[str]:
    columns = (_split(line) or []) if isinstance(line, str) else []
    if {"id", "text"} <= set(columns):
        return columns
    found = line.found if isinstance(line, Reject) else excerpt(line)
    raise InputError(
        f"{path} line 1: a header with the tab-separated columns id, text and title was expected, found {found!r}. "
        "Add the header, or choose another format."
    )


def _row(path: Path, number: int, line: str, fields: list[str] | None, columns: list[str]) -> Row | Reject:
    if fields is None:
        return Reject(str(path), number, "broken row: a quoted field does not end as it should", excerpt(line))
    if len(fields) != len(columns):
        reason = f"broken row: {len(fields)} columns, expected {len(columns)}"
        return Reject(str(path), number, reason, excerpt(line))
    record = dict(zip(columns, fields, strict=True))
    return check_row(path, number, record["id"], record.get("title"), record["text"], line)


def _split(line: str) -> list[str] | None:
    """The fields of one row; None if its quotes do not match."""
    if '"' not in line:
        return line.split("\t")
    try:
        return next(csv.reader([line], delimiter="\t", strict=True))
    except csv.Error:
        return None


def _split_over_lines(
    line: str,
    width: int,
    lines: Iterator[tuple[int, str | Reject]],
    waiting: deque[tuple[int, str | Reject]],
) -> list[str] | None:
    """The fields of a row whose quoted field spans lines; on failure the lines after it stay in `waiting`."""
    joined, used = line, 0
    # Quotes come in pairs in a whole row (inner ones are doubled), so an odd number says that a field is still open.
    while joined.count('"') % 2 and used < MAX_ROW_LINES:
        if used == len(waiting):
            following = next(lines, None)
            if following is None:
                return None
            waiting.append(following)
        text = waiting[used][1]
        if isinstance(text, Reject) or text.count("\t") >= width - 1:
            return None
        joined, used = f"{joined}\n{text}", used + 1
    fields = _split(joined) if used else None
    if fields is not None:
        for _ in range(used):
            waiting.popleft()
    return fields
