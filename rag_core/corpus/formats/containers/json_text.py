"""JSON in a file of any size: values one after the other, the items of a list, the members of an object.

DPR's training files are lists of hundreds of megabytes. The text is decoded in chunks, and only the value at hand is
parsed; `json`'s own parser does the work. A value that lies across the end of the text is parsed again with twice the
text, so a long one is parsed a few times only. Broken JSON is refused as soon as it is reached, with its line.
"""

from __future__ import annotations

import codecs
import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, NoReturn

from rag_core.corpus.formats.first_bytes import opened_lines
from rag_core.corpus.formats.rows import excerpt
from rag_core.errors import InputError

CHUNK_BYTES = 2**20
_DECODER = json.JSONDecoder()
_SPACE = re.compile(r"[ \t\r\n]*")
# An error so near to the end of the text may be due to the end: a literal, an escape or a separator that is cut.
_NEAR_END = 16


class BrokenJsonError(InputError):
    """What follows is no JSON. `within` is the item or member that was read last, `fault` what is wrong, with the line."""

    within = fault = ""


class TooLongError(BrokenJsonError):
    """A value has more characters than may be in memory."""


class JsonText:
    """The text of a JSON file from the current place on.

    Args:
        path: the file, for messages.
        file: its bytes; UTF-8, with a byte order mark or without.
        max_chars: the most characters of a value; without a bound, a lost quote would have the rest of the file in memory.

    Raises:
        BrokenJsonError: (every method) no JSON.
        TooLongError: (every method) a value that is longer than `max_chars`.
        InputError: (every method) not UTF-8.
    """

    def __init__(self, path: Path, file: BinaryIO, max_chars: int) -> None:
        self._path, self._file, self._max_chars = path, file, max_chars
        self._decode = codecs.getincrementaldecoder("utf-8-sig")().decode
        self._text, self._at, self._ended = "", 0, False
        # The line on which `_text` begins, from 1.
        self._line = 1
        self._within = "the first value"

    def next_mark(self) -> str:
        """The next character that is no white space, which is not consumed; "" at the end."""
        while True:
            self._at = _SPACE.match(self._text, self._at).end()  # type: ignore[union-attr]
            if self._at < len(self._text):
                return self._text[self._at]
            if not self._more():
                return ""

    def take(self, marks: str) -> str:
        """The next character that is no white space, which must be one of `marks`."""
        mark = self.next_mark()
        if not mark or mark not in marks:
            expected = " or ".join(repr(one) for one in marks)
            self._refuse(f"{mark!r} instead of {expected}" if mark else f"the file ends where {expected} should be")
        self._at += 1
        return mark

    def value(self) -> Any:
        """The next value, parsed."""
        self.next_mark()
        while True:
            try:
                value, end = _DECODER.raw_decode(self._text, self._at)
            except json.JSONDecodeError as error:
                cut = error.msg.startswith("Unterminated string") or error.pos >= len(self._text) - _NEAR_END
                if cut and self._more():
                    continue
                self._refuse(error.msg, error.pos)
            except (ValueError, RecursionError) as error:  # an integer of thousands of digits; nested very deeply
                raise self._error(BrokenJsonError, "", str(error), "") from error
            # A number may go on beyond the text that was read.
            if end < len(self._text) or isinstance(value, str | list | dict) or not self._more():
                self._at = end
                return value

    def values(self) -> Iterator[Any]:
        """The values that follow one another, up to the end of the file."""
        number = 0
        while self.next_mark():
            number += 1
            self._within = f"value {number}"
            yield self.value()

    def items(self) -> Iterator[Any]:
        """The items of the list that begins here, which is consumed."""
        self.take("[")
        if self.next_mark() == "]":
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
        """The names of the members of the object that begins here; take each one's value before the next name."""
        self.take("{")
        if self.next_mark() == "}":
            self.take("}")
            return
        number = 0
        while True:
            number += 1
            self._within = f"member {number}"
            if self.next_mark() != '"':
                self._refuse("a name in double quotes was expected")
            name = self.value()
            self.take(":")
            yield name
            if self.take(",}") == "}":
                return

    def end(self) -> None:
        """Nothing but white space may follow."""
        if self.next_mark():
            self._refuse("more text after the end of the JSON")

    def _more(self) -> bool:
        """Read on, drop what was consumed; False at the end of the file."""
        if self._ended:
            return False
        if len(self._text) - self._at > self._max_chars:
            self._refuse(f"a single value of more than {self._max_chars} characters", error=TooLongError)
        self._line += self._text.count("\n", 0, self._at)
        rest = self._text[self._at :]
        # As much again, so that a long value is parsed a few times only.
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
        self._text, self._at = rest + more, 0
        return bool(more) or self._more()

    def _refuse(self, fault: str, at: int | None = None, error: type[BrokenJsonError] = BrokenJsonError) -> NoReturn:
        at = self._at if at is None else at
        line = self._line + self._text.count("\n", 0, at)
        raise self._error(error, f" line {line}", fault, f" Found {excerpt(self._text[max(0, at - 20) : at + 40])!r}.")

    def _error(self, type: type[BrokenJsonError], line: str, fault: str, found: str) -> BrokenJsonError:
        error = type(f"{self._path}{line}: broken JSON ({fault}).{found} Correct the file.")
        error.within, error.fault = self._within, fault + (f" ({line.strip()})" if line else "")
        return error


@contextmanager
def opened_json(path: Path, max_chars: int) -> Iterator[JsonText]:
    """The file, gzip or not, as JSON whose values have at most `max_chars` characters.

    Raises:
        InputError: another archive, cut gzip, or text in UTF-16.
    """
    with opened_lines(path) as file:
        yield JsonText(path, file, max_chars)
