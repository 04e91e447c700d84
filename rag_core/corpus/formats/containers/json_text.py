"""Streams JSON from a file of any size: consecutive values, the items of a list, the members of an object.

DPR's training files are lists of hundreds of megabytes. The file is decoded in chunks, and one value at a time is
parsed, by Python's `json`. If the text read so far ends inside a value, the text is doubled and the value parsed
again, so even a long value is parsed only a few times. Broken JSON raises an error as soon as it is reached, with
its line.
"""

from __future__ import annotations

import codecs
import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, NoReturn

from rag_core.corpus.formats.first_bytes import open_lines
from rag_core.corpus.formats.rows import excerpt
from rag_core.errors import InputError

CHUNK_BYTES = 2**20
_DECODER = json.JSONDecoder()
_SPACE = re.compile(r"[ \t\r\n]*")
# An error within this many characters of the end may come from a cut literal, escape or separator: read on and retry.
_NEAR_END = 16


class BrokenJsonError(InputError):
    """The text is not JSON. `within` names the item or member being read; `fault` says what is wrong, with the line."""

    within = fault = ""


class TooLongError(BrokenJsonError):
    """A value has more than `max_chars` characters."""


class JsonText:
    """A JSON file that is read from the current position on.

    Args:
        path: the file, for messages.
        file: its bytes; UTF-8, with or without a byte order mark.
        max_chars: the maximum length of a value; without it, a missing quote would load the rest of the file.

    Raises:
        BrokenJsonError: (every method) not JSON.
        TooLongError: (every method) a value is longer than `max_chars`.
        InputError: (every method) not UTF-8.
    """

    def __init__(self, path: Path, file: BinaryIO, max_chars: int) -> None:
        self._path, self._file, self._max_chars = path, file, max_chars
        self._decode = codecs.getincrementaldecoder("utf-8-sig")().decode
        self._text, self._position, self._ended = "", 0, False
        self._line = 1  # the line on which `_text` begins, from 1
        self._within = "the first value"

    def peek(self) -> str:
        """The next character that is not white space, without consuming it; "" at the end."""
        while True:
            self._position = _SPACE.match(self._text, self._position).end()  # type: ignore[union-attr]
            if self._position < len(self._text):
                return self._text[self._position]
            if not self._read_more():
                return ""

    def take(self, characters: str) -> str:
        """Consume the next character that is not white space; it must be one of `characters`."""
        character = self.peek()
        if not character or character not in characters:
            expected = " or ".join(map(repr, characters))
            self._refuse(
                f"{character!r} instead of {expected}" if character else f"the file ends where {expected} should be"
            )
        self._position += 1
        return character

    def value(self) -> Any:
        """The next value, parsed."""
        self.peek()
        while True:
            try:
                value, end = _DECODER.raw_decode(self._text, self._position)
            except json.JSONDecodeError as error:
                cut = error.msg.startswith("Unterminated string") or error.pos >= len(self._text) - _NEAR_END
                if cut and self._read_more():
                    continue
                self._refuse(error.msg, error.pos)
            except (ValueError, RecursionError) as error:  # an integer of thousands of digits; nested very deeply
                raise self._error(BrokenJsonError, "", str(error), "") from error
            # A number may continue beyond the text read so far.
            if end < len(self._text) or isinstance(value, str | list | dict) or not self._read_more():
                self._position = end
                return value

    def values(self) -> Iterator[Any]:
        """Consecutive values up to the end of the file."""
        number = 0
        while self.peek():
            number += 1
            self._within = f"value {number}"
            yield self.value()

    def items(self) -> Iterator[Any]:
        """The items of the list that begins here."""
        self.take("[")
        if self.peek() == "]":
            self.take("]")
            return
        number = 0
        while True:
            number += 1
            self._within = f"item {number}"
            yield self.value()
            if self.take(",]") == "]":
                return

    def names(self) -> Iterator[str]:
        """The member names of the object that begins here. Read each member's value before the next name."""
        self.take("{")
        if self.peek() == "}":
            self.take("}")
            return
        number = 0
        while True:
            number += 1
            self._within = f"member {number}"
            if self.peek() != '"':
                self._refuse("a name in double quotes was expected")
            name = self.value()
            self.take(":")
            yield name
            if self.take(",}") == "}":
                return

    def end(self) -> None:
        """Raise BrokenJsonError if anything but white space follows."""
        if self.peek():
            self._refuse("more text after the end of the JSON")

    def _read_more(self) -> bool:
        """Drop the consumed text and read more; False at the end of the file."""
        if self._ended:
            return False
        if len(self._text) - self._position > self._max_chars:
            self._refuse(f"a single value of more than {self._max_chars} characters", error=TooLongError)
        self._line += self._text.count("\n", 0, self._position)
        rest = self._text[self._position :]
        # Double the text each time, so that a long value is parsed only a few times.
        raw = self._file.read(max(CHUNK_BYTES, len(rest)))
        self._ended = not raw
        try:
            more = self._decode(raw, self._ended)
        except UnicodeDecodeError as error:
            at = error.start
            line = self._line + rest.count("\n") + error.object.count(b"\n", 0, at)
            raise InputError(
                f"{self._path} line {line}: undecodable: not UTF-8; found "
                f"{excerpt(error.object[max(0, at - 20) : at + 20])!r}, expected UTF-8. Convert the file to UTF-8."
            ) from error
        self._text, self._position = rest + more, 0
        return bool(more) or self._read_more()

    def _refuse(self, fault: str, at: int | None = None, error: type[BrokenJsonError] = BrokenJsonError) -> NoReturn:
        at = self._position if at is None else at
        line = self._line + self._text.count("\n", 0, at)
        raise self._error(error, f" line {line}", fault, f" Found {excerpt(self._text[max(0, at - 20) : at + 40])!r}.")

    def _error(self, type: type[BrokenJsonError], line: str, fault: str, found: str) -> BrokenJsonError:
        error = type(f"{self._path}{line}: broken JSON ({fault}).{found} Correct the file.")
        error.within, error.fault = self._within, fault + (f" ({line.strip()})" if line else "")
        return error


@contextmanager
def open_json(path: Path, max_chars: int) -> Iterator[JsonText]:
    """Open a JSON file, plain or gzip, whose values have at most `max_chars` characters.

    Raises:
        InputError: another archive, cut gzip, or text in UTF-16.
    """
    with open_lines(path) as file:
        yield JsonText(path, file, max_chars)
