"""JSON that is too large to be parsed whole: the items of a list, one at a time.

DPR's training files are lists of hundreds of megabytes. The text is decoded in chunks, and only the item at hand is
parsed; `json`'s own parser does the work. An item that lies across the end of the chunk is parsed again with more text.
"""

from __future__ import annotations

import codecs
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

from rag_core.errors import InputError
from rag_core.readers.rows import excerpt

CHUNK_BYTES = 2**20
# A single item beyond this is no question; without a bound, a lost quote would have the rest of the file in memory.
MAX_ITEM_CHARS = 2**28
_DECODER = json.JSONDecoder()
_BLANK = " \t\n\r"
# An error so near to the end of the text may be due to the end: a literal, an escape or a separator that is cut.
_NEAR_END = 16


class JsonText:
    """The text of a JSON file from the current place on. `line` counts from 1.

    Raises:
        InputError: (every method) not UTF-8, broken JSON, or an item beyond `MAX_ITEM_CHARS`.
    """

    def __init__(self, path: Path, file: BinaryIO) -> None:
        self.path, self.line = path, 1
        self._file = file
        self._decode = codecs.getincrementaldecoder("utf-8-sig")().decode
        self._text, self._at, self._ended = "", 0, False

    def next_mark(self) -> str:
        """The next character that is no white space, which is not consumed; "" at the end."""
        while True:
            while self._at < len(self._text) and self._text[self._at] in _BLANK:
                self._at += 1
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
                raise InputError(f"{self.path}: broken JSON ({error}). Correct the file.") from error
            # A number may go on beyond the text that was read.
            if end < len(self._text) or not self._more():
                self._at = end
                return value

    def items(self) -> Iterator[Any]:
        """The items of the list that begins here, which is consumed."""
        self.take("[")
        if self.next_mark() == "]":
            self.take("]")
            return
        while True:
            yield self.value()
            if self.take(",]") == "]":
                return

    def end(self) -> None:
        """Nothing but white space may follow."""
        if self.next_mark():
            self._refuse("more text after the end of the JSON")

    def _more(self) -> bool:
        """Read on, drop what was consumed; False at the end of the file."""
        if self._ended:
            return False
        self.line += self._text.count("\n", 0, self._at)
        rest = self._text[self._at :]
        if len(rest) > MAX_ITEM_CHARS:
            self._at = 0
            self._refuse(f"a single value of more than {MAX_ITEM_CHARS} characters", 0)
        # As much again, so that a long item is parsed a few times only.
        raw = self._file.read(max(CHUNK_BYTES, len(rest)))
        self._ended = not raw
        try:
            more = self._decode(raw, self._ended)
        except UnicodeDecodeError as error:
            at = error.start
            line = self.line + rest.count("\n") + error.object.count(b"\n", 0, at)
            raise InputError(
                f"{self.path} line {line}: undecodable: byte {at} is not UTF-8; found "
                f"{excerpt(error.object[max(0, at - 20) : at + 20])!r}, expected UTF-8. Convert the file to UTF-8."
            ) from error
        self._text, self._at = rest + more, 0
        return bool(more) or self._more()

    def _refuse(self, fault: str, at: int | None = None) -> Any:
        at = self._at if at is None else at
        line = self.line + self._text.count("\n", 0, at)
        raise InputError(
            f"{self.path} line {line}: broken JSON ({fault}). Found {excerpt(self._text[max(0, at - 20) : at + 40])!r}. "
            "Correct the file."
        )
