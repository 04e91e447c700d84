"""JSON values one after the other, out of a file of any size: the items of a list, the members of an object.

The file is read in pieces, and one value is in memory at a time, so a list of a million records takes no more than its
longest record; that may have `MAX_LINE_BYTES` characters, as a line of JSON Lines may.
"""

from __future__ import annotations

import codecs
import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

from rag_core.errors import InputError
from rag_core.readers.first_bytes import opened_lines
from rag_core.readers.rows import MAX_LINE_BYTES

PIECE_BYTES = 2**20
_SPACE = re.compile(r"[ \t\r\n]*")
_DECODER = json.JSONDecoder()


class TooLongError(Exception):
    """A value is longer than `MAX_LINE_BYTES`."""


class JsonStream:
    """A place in a JSON file. `peek` shows the next character that is not space, `value` reads a whole value."""

    def __init__(self, path: Path, file: BinaryIO) -> None:
        self._path = path
        self._file = file
        self._begin()

    def rewind(self) -> None:
        """Back to the start of the file."""
        self._file.seek(0)
        self._begin()

    def _begin(self) -> None:
        self._decode = codecs.getincrementaldecoder("utf-8-sig")().decode
        self._text = ""
        self._at = 0
        self._ended = False

    def peek(self) -> str:
        """The next character that is not space; "" at the end of the file."""
        while True:
            self._at = _SPACE.match(self._text, self._at).end()  # type: ignore[union-attr]
            if self._at < len(self._text) or self._ended:
                return self._text[self._at : self._at + 1]
            self._read_on(PIECE_BYTES)

    def take(self, expected: str, where: str) -> str:
        """The next character, which must be one of `expected`."""
        found = self.peek()
        if not found or found not in expected:
            wanted = " or ".join(f"{one!r}" for one in expected)
            raise self.fault(f"{where}: {wanted} was expected, found {found!r}" if found else f"{where}: the file ends")
        self._at += 1
        return found

    def value(self, where: str) -> Any:
        """The next value.

        Raises:
            InputError: what follows is no JSON, or not UTF-8.
            TooLongError: the value is too long.
        """
        self.peek()
        size = PIECE_BYTES
        while True:
            try:
                value, end = _DECODER.raw_decode(self._text, self._at)
            except json.JSONDecodeError as error:
                if self._ended:
                    raise self.fault(f"{where}: {error.msg}") from error
            except (ValueError, RecursionError) as error:
                raise self.fault(f"{where}: {error}") from error
            else:
                # A number at the end of what was read may go on in the next piece.
                if end < len(self._text) or self._ended or isinstance(value, str | list | dict):
                    self._at = end
                    return value
            if len(self._text) - self._at > MAX_LINE_BYTES:
                raise TooLongError(where)
            self._read_on(size)
            size *= 2

    def fault(self, what: str) -> InputError:
        """The error that says where JSON ends to be JSON."""
        return InputError(f"{self._path} is not JSON: {what}. Correct the file, or copy or download it again.")

    def _read_on(self, size: int) -> None:
        raw = self._file.read(size)
        self._ended = not raw
        try:
            text = self._decode(raw, final=self._ended)
        except UnicodeDecodeError as error:
            raise InputError(f"{self._path} is not JSON in UTF-8 ({error}). Convert it to UTF-8.") from error
        self._text, self._at = self._text[self._at :] + text, 0


@contextmanager
def opened_json(path: Path) -> Iterator[JsonStream]:
    """The file, gzip or not, as a stream of JSON values.

    Raises:
        InputError: another archive, cut gzip, or text in UTF-16.
    """
    with opened_lines(path) as file:
        yield JsonStream(path, file)


def items(stream: JsonStream) -> Iterator[tuple[int, Any]]:
    """The items of the list that comes next, numbered from 1."""
    stream.take("[", "a list")
    number = 0
    if stream.peek() == "]":
        stream.take("]", "a list")
        return
    while True:
        number += 1
        yield number, stream.value(f"item {number}")
        if stream.take(",]", f"after item {number}") == "]":
            return


def names(stream: JsonStream) -> Iterator[str]:
    """The names of the members of the object that comes next; who asks must read each one's value before the next name."""
    stream.take("{", "an object")
    if stream.peek() == "}":
        stream.take("}", "an object")
        return
    number = 0
    while True:
        number += 1
        where = f"member {number}"
        name = stream.value(where)
        if not isinstance(name, str):
            raise stream.fault(f"{where}: a name was expected, found {name!r:.80}")
        stream.take(":", f"after the name of {where}")
        yield name
        if stream.take(",}", f"after {where}") == "}":
            return
