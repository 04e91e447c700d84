"""Parquet with the columns `id` and `text`, and `title` if there is one; other columns are not read.

Streams record batches. Strings are fetched as bytes and decoded row by row, because Arrow fails for a whole batch
when one value is not UTF-8. Integer ids become decimal strings; values of any other type are rejected with their
1-based row.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from rag_core.errors import InputError
from rag_core.readers.rows import Reject, Row, check_row, first_line
from rag_core.readers.sources import SourceFile

BATCH_ROWS = 1024


def read(source: SourceFile) -> Iterator[Row | Reject]:
    """Rows and rejects of one Parquet file.

    Raises:
        InputError: not a Parquet file, damaged, or without the columns `id` and `text`.
    """
    number = 0
    try:
        with pq.ParquetFile(source.path) as file:
            columns = _columns(source.path, file.schema_arrow.names)
            for batch in file.iter_batches(batch_size=BATCH_ROWS, columns=columns):
                values = [_values(batch.column(name)) for name in columns]
                for fields in zip(*values, strict=True):
                    number += 1
                    record = dict(zip(columns, fields, strict=True))
                    yield check_row(
                        source.path, number, record["id"], record.get("title"), record["text"], found=record
                    )
    except (pa.ArrowException, OSError, ValueError, OverflowError) as error:
        # The last two: a column's name that is not UTF-8, a date before the year 1.
        raise InputError(
            f"{source.path} cannot be read as Parquet after row {number}: {first_line(error)} "
            "Write the file again, or choose the format that fits it."
        ) from error


def _columns(path: Path, found: list[str]) -> list[str]:
    missing = [name for name in ("id", "text") if name not in found]
    if missing:
        raise InputError(
            f"{path} has no column {' and no column '.join(missing)}; found {', '.join(found) or 'no column'}. "
            "Expected id, text and, if there is one, title. Rename the columns."
        )
    return [name for name in ("id", "title", "text") if name in found]


def _values(column: pa.Array) -> list[object]:
    if pa.types.is_dictionary(column.type):
        column = column.dictionary_decode()
    if pa.types.is_string(column.type) or pa.types.is_large_string(column.type) or pa.types.is_string_view(column.type):
        column = column.cast(pa.large_binary())
    return [_decoded(value) for value in column.to_pylist()]


def _decoded(value: object) -> object:
    """Bytes as text where they are UTF-8; else unchanged, for the row check to reject."""
    if not isinstance(value, bytes):
        return value
    try:
        return value.decode("utf-8")
    except UnicodeDecodeError:
        return value
