"""A JSON file of records: a list, an object with the list `data`, an object of records by their ids, or one record.

Streamed (see `json_values`). What an object is, its content decides: a record if it has a record's keys; else what is in
`data`, if that is a list; else a record for each of its members, which have the members' names as ids:
{"d1": {"text": "…"}} or {"d1": "…"}. Several records may follow one another.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal

from rag_core.errors import InputError
from rag_core.readers.containers.json_values import JsonStream, TooLongError, items, names, opened_json
from rag_core.readers.rows import MAX_LINE_BYTES, Record, Reject, excerpt

Shape = Literal["list", "data", "members", "objects"]
IsRecord = Callable[[Record], bool]
# So many members of an object that is too long to be looked at whole may come before its list `data`.
MOST_BEFORE_DATA = 20


def records(path: Path, is_record: IsRecord) -> Iterator[Record | Reject]:
    """Records and rejects of one JSON file; a record's line is its place among them, from 1.

    Args:
        path: the file.
        is_record: whether an object is a record, by its keys.

    Raises:
        InputError: not JSON, not UTF-8, no list or object, or a record that is too long.
    """
    try:
        with opened_json(path) as stream:
            shape = _shape(stream, is_record)
        with opened_json(path) as stream:
            yield from _READERS[shape](path, stream)
            if rest := stream.peek():
                raise stream.fault(f"{rest!r} follows the end")
    except TooLongError as error:
        raise InputError(
            f"{path}: {error} is longer than {MAX_LINE_BYTES} characters; a list of records was expected. "
            "Correct it, or write the file as JSON Lines, where a line that is too long is left out."
        ) from error


def _shape(stream: JsonStream, is_record: IsRecord) -> Shape:
    start = stream.peek()
    if start != "{":
        if start not in ("[", ""):
            raise stream.fault(f"it starts with {start!r}; a list or an object was expected")
        return "list" if start else "objects"
    try:
        content = stream.value("the first object")
    except TooLongError:
        stream.rewind()
        return _shape_of_long(stream)
    if is_record(Record(1, content, content, content)):
        return "objects"
    return "data" if isinstance(content.get("data"), list) else "members"


def _shape_of_long(stream: JsonStream) -> Shape:
    for number, name in enumerate(names(stream), 1):
        if name == "data" and stream.peek() == "[":
            return "data"
        if number > MOST_BEFORE_DATA:
            break
        stream.value(f"member {number}")
    return "members"


def _list(path: Path, stream: JsonStream) -> Iterator[Record | Reject]:
    return (_record(path, number, value) for number, value in items(stream))


def _data(path: Path, stream: JsonStream) -> Iterator[Record | Reject]:
    for number, name in enumerate(names(stream), 1):
        if name == "data" and stream.peek() == "[":
            yield from _list(path, stream)
        else:
            stream.value(f"member {number}")


def _members(path: Path, stream: JsonStream) -> Iterator[Record | Reject]:
    for number, name in enumerate(names(stream), 1):
        yield _member(path, number, name, stream.value(f"member {number}"))


def _objects(path: Path, stream: JsonStream) -> Iterator[Record | Reject]:
    number = 0
    while stream.peek():
        number += 1
        yield _record(path, number, stream.value(f"object {number}"))


def _record(path: Path, number: int, value: Any) -> Record | Reject:
    if isinstance(value, dict):
        return Record(number, value, value, value)
    reason = f"wrong type: item {number} is {type(value).__name__}, expected an object"
    return Reject(str(path), number, reason, excerpt(value))


def _member(path: Path, number: int, name: str, value: Any) -> Record | Reject:
    if isinstance(value, dict):
        return Record(number, value, value, value, default_id=name)
    if isinstance(value, str):
        return Record(number, {"text": value}, value, ("text",), default_id=name)
    reason = f"wrong type: the member {name[:80]!r} is {type(value).__name__}, expected an object or a string"
    return Reject(str(path), number, reason, excerpt(value))


_READERS: dict[Shape, Callable[[Path, JsonStream], Iterator[Record | Reject]]] = {
    "list": _list,
    "data": _data,
    "members": _members,
    "objects": _objects,
}
