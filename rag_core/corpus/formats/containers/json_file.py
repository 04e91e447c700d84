"""A JSON file of records: a list, an object with a list `data`, an object of records by id, or single records.

The file is streamed (see `json_text`). The content of an object decides how it is read. If it has a record's
keys, it is a record, and more records may follow. Else, if `data` is a list, the records are in that list. Else
each member is a record, and its key is the id: {"d1": {"text": "…"}} or {"d1": "…"}.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any, Literal

from rag_core.corpus.formats.containers.json_text import BrokenJsonError, JsonText, TooLongError, open_json
from rag_core.corpus.formats.rows import MAX_LINE_BYTES, Record, Reject, excerpt
from rag_core.errors import InputError

Shape = Literal["list", "data", "members", "objects"]
IsRecord = Callable[[Record], bool]
# For an object that is too long to parse whole: how many members may come before its list `data`.
MAX_MEMBERS_BEFORE_DATA = 20


def records(path: Path, is_record: IsRecord) -> Iterator[Record | Reject]:
    """Records and rejects of one JSON file; a record's line is its number in the file, from 1.

    Args:
        path: the file.
        is_record: whether an object is a record, judged by its keys.

    Raises:
        InputError: not JSON, not UTF-8, neither a list nor an object, or a record is too long.
    """
    try:
        shape = _shape(path, is_record)
        with open_json(path, MAX_LINE_BYTES) as text:
            yield from _READERS[shape](path, text)
            text.end()
    except TooLongError as error:
        raise InputError(
            f"{path}: {error.within} is longer than {MAX_LINE_BYTES} characters; a list of records was expected. "
            "Correct it, or write the file as JSON Lines, where only the line that is too long is rejected."
        ) from error
    except BrokenJsonError as error:
        raise _not_json(path, f"{error.within}: {error.fault}") from error


def _not_json(path: Path, fault: str) -> InputError:
    return InputError(f"{path} is not JSON: {fault}. Correct the file, or copy or download it again.")


def _shape(path: Path, is_record: IsRecord) -> Shape:
    with open_json(path, MAX_LINE_BYTES) as text:
        start = text.peek()
        if start != "{":
            if start not in ("[", ""):
                raise _not_json(path, f"it starts with {start!r}; a list or an object was expected")
            return "list" if start else "objects"
        try:
            content = text.value()
        except TooLongError:
            return _shape_of_long(path)
    if is_record(Record(1, content, content, content)):
        return "objects"
    return "data" if isinstance(content.get("data"), list) else "members"


def _shape_of_long(path: Path) -> Shape:
    """The shape of an object that is too long to parse whole."""
    with open_json(path, MAX_LINE_BYTES) as text:
        for name in islice(text.names(), MAX_MEMBERS_BEFORE_DATA + 1):
            if name == "data" and text.peek() == "[":
                return "data"
            text.value()
    return "members"


def _list(path: Path, text: JsonText) -> Iterator[Record | Reject]:
    return (_record(path, number, value) for number, value in enumerate(text.items(), 1))


def _data(path: Path, text: JsonText) -> Iterator[Record | Reject]:
    for name in text.names():
        if name == "data" and text.peek() == "[":
            yield from _list(path, text)
        else:
            text.value()


def _members(path: Path, text: JsonText) -> Iterator[Record | Reject]:
    for number, name in enumerate(text.names(), 1):
        yield _member(path, number, name, text.value())


def _objects(path: Path, text: JsonText) -> Iterator[Record | Reject]:
    return (_record(path, number, value) for number, value in enumerate(text.values(), 1))


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


_READERS: dict[Shape, Callable[[Path, JsonText], Iterator[Record | Reject]]] = {
    "list": _list,
    "data": _data,
    "members": _members,
    "objects": _objects,
}
