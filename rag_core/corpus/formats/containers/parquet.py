"""Parquet: one record per row, with only the requested columns; so vectors, for example, are never read.

Record batches are streamed. Strings, also those in lists, are fetched as bytes and decoded row by row, because
Arrow fails for a whole batch when one value is not UTF-8.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from rag_core.corpus.formats.rows import Record, first_line
from rag_core.errors import InputError

BATCH_ROWS = 1024


def records(path: Path, wanted: Collection[str], batch_rows: int = BATCH_ROWS) -> Iterator[Record]:
    """The records of one Parquet file; their `line` is the row, from 1.

    Args:
        path: the file.
        wanted: the columns to read, if the file has them.
        batch_rows: rows in memory at a time.

    Raises:
        InputError: not a Parquet file, or damaged; or two of the wanted columns have the same name.
    """
    number = 0
    try:
        with pq.ParquetFile(path) as file:
            keys = tuple(file.schema_arrow.names)
            columns = [name for name in keys if name in wanted]
            if len(set(columns)) < len(columns):
                raise InputError(
                    f"{path} has two columns with the same name among {', '.join(columns)}. Rename one of them."
                )
            for batch in file.iter_batches(batch_size=batch_rows, columns=columns):
                values = [_values(batch.column(name)) for name in columns]
                for fields in zip(*values, strict=True) if values else [()] * batch.num_rows:
                    number += 1
                    record = dict(zip(columns, fields, strict=True))
                    yield Record(number, record, record, keys)
    except (pa.ArrowException, OSError, ValueError, OverflowError) as error:
        # ValueError and OverflowError: a column's name is not UTF-8, or a date is before the year 1.
        raise InputError(
            f"{path} cannot be read as Parquet after row {number}: {first_line(error)} "
            "Write the file again, or give a Parquet file."
        ) from error


def _values(column: pa.Array) -> list[object]:
    if pa.types.is_dictionary(column.type):
        column = column.dictionary_decode()
    as_bytes = _as_bytes(column.type)
    if as_bytes != column.type:
        column = column.cast(as_bytes)
    return [_decoded(value) for value in column.to_pylist()]


def _as_bytes(type: pa.DataType) -> pa.DataType:
    """The type with strings replaced by bytes, also within lists and structs."""
    if pa.types.is_string(type) or pa.types.is_large_string(type) or pa.types.is_string_view(type):
        return pa.large_binary()
    if pa.types.is_list(type):
        return pa.list_(type.value_field.with_type(_as_bytes(type.value_type)))
    if pa.types.is_large_list(type):
        return pa.large_list(type.value_field.with_type(_as_bytes(type.value_type)))
    if pa.types.is_struct(type):
        return pa.struct([field.with_type(_as_bytes(field.type)) for field in type])
    return type


def _decoded(value: object) -> object:
    """Bytes as text, also within lists and objects; bytes that are not UTF-8 stay, for the row check to reject."""
    if isinstance(value, list):
        return [_decoded(item) for item in value]
    if isinstance(value, dict):
        return {name: _decoded(item) for name, item in value.items()}
    if not isinstance(value, bytes):
        return value
    try:
        return value.decode("utf-8")
    except UnicodeDecodeError:
        return value
