"""Shared by all corpus readers: the check of one row, the types of results, and the reader of lines.

A row becomes a `Row` (a passage and its place) or a `Reject` (place, reason, and what was found), so one bad row
never stops the reading of a large file. This module knows no file format. A line longer than `MAX_LINE_BYTES` is
rejected unread: without this limit, a file without line ends would be read into memory whole.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rag_core.corpus.formats.first_bytes import open_lines
from rag_core.corpus.passages import Passage

EXCERPT_CHARS = 200
MAX_LINE_BYTES = 16 * 2**20
_BOM = b"\xef\xbb\xbf"


@dataclass(frozen=True, slots=True)
class Reject:
    """A row that was left out.

    `reason` is a category, or "category: detail", so that rejects can be counted by category. `line` counts from 1
    (rows, for Parquet) and is None if the format has no lines. `found` is an excerpt of the bad content.
    """

    file: str
    line: int | None
    reason: str
    found: str

    @property
    def category(self) -> str:
        """The part of `reason` before the colon."""
        return self.reason.partition(":")[0]


@dataclass(frozen=True, slots=True)
class Row:
    """A passage and the place that it was read from."""

    file: str
    line: int | None
    passage: Passage


@dataclass(slots=True)
class Record:
    """One record of a container, before it is a passage: its fields under the file's own keys.

    `line` counts from 1: lines, or rows or list items if the container has no lines. `found` is shown in a
    reject. `keys` are all keys in the file, also those that were not read. `default_id` is the record's key if it
    is a member of a JSON object.
    """

    line: int | None
    fields: Mapping[str, Any]
    found: object
    keys: Collection[str]
    default_id: str | None = None


@dataclass(frozen=True, slots=True)
class Skipped:
    """A part of a file that is neither a passage nor a fault, such as a heading; counted by `reason`."""

    reason: str


def excerpt(value: object) -> str:
    """At most `EXCERPT_CHARS` characters of a value, always encodable as UTF-8."""
    if isinstance(value, bytes):
        value = value[:EXCERPT_CHARS].decode("utf-8", "backslashreplace")
    text = value if isinstance(value, str) else repr(value)
    return text[:EXCERPT_CHARS].encode("utf-8", "backslashreplace").decode("utf-8")[:EXCERPT_CHARS]


def first_line(error: Exception) -> str:
    """The first line of an error's message; Arrow and others add details below it."""
    return next(iter(str(error).splitlines()), type(error).__name__)


def field_fault(name: str, value: object, *, required: bool = True) -> str | None:
    """Why `value` cannot be stored as the text field `name`, as a reject's reason; None if it can."""
    if value is None:
        return f"missing {name}" if required else None
    if isinstance(value, bytes):
        return f"undecodable: {name} is not UTF-8"
    if not isinstance(value, str):
        return f"wrong type: {name} is {type(value).__name__}, expected a string"
    if required and not value.strip():
        return f"empty {name}"
    if "\0" in value:
        return f"NUL character: in {name}"
    try:
        value.encode("utf-8")
    except UnicodeEncodeError:
        # From JSON escapes such as \ud800, and from undecodable file names: valid in memory, but cannot be stored.
        return f"undecodable: {name} holds half of a surrogate pair"
    return None


def id_as_text(value: object) -> object:
    """An integer id as its decimal string; anything else unchanged, to be checked by `field_fault`."""
    return str(value) if isinstance(value, int) and not isinstance(value, bool) else value


def check_row(
    file: Path | str,
    line: int | None,
    id: object,
    title: object,
    text: object,
    found: object,
    names: tuple[str, str, str] = ("id", "title", "text"),
) -> Row | Reject:
    """A row if the three fields can form a passage, else a reject that shows `found`. `title` may be None.

    `names` are the file's own keys for id, title and text; a reject's reason uses them.
    """
    id = id_as_text(id)
    fault = field_fault(names[0], id) or field_fault(names[2], text) or field_fault(names[1], title, required=False)
    if fault:
        return Reject(str(file), line, fault, excerpt(found))
    return Row(str(file), line, Passage(str(id), str(title or ""), str(text)))


def decode_line(file: Path | str, number: int, raw: bytes) -> str | Reject:
    """One line as text without byte order mark and line end, or a reject if it is not UTF-8."""
    if number == 1:
        raw = raw.removeprefix(_BOM)
    raw = raw.removesuffix(b"\n").removesuffix(b"\r")
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError as error:
        return Reject(str(file), number, f"undecodable: byte {error.start} is not UTF-8", excerpt(raw))


def numbered_lines(path: Path) -> Iterator[tuple[int, str | Reject]]:
    """Stream the lines of a file with their numbers, from 1; a line that cannot be used comes as a reject.

    Raises:
        InputError: an archive other than gzip, cut gzip, or text in UTF-16.
    """
    with open_lines(path) as file:
        number = 0
        while raw := file.readline(MAX_LINE_BYTES + 1):
            number += 1
            if len(raw) <= MAX_LINE_BYTES or raw.endswith(b"\n"):
                yield number, decode_line(path, number, raw)
                continue
            yield number, Reject(str(path), number, f"line too long: more than {MAX_LINE_BYTES} bytes", excerpt(raw))
            while raw and not raw.endswith(b"\n"):
                raw = file.readline(MAX_LINE_BYTES)
