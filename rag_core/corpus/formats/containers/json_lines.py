"""JSON Lines: one object per line, streamed. Blank lines are skipped; a line that is not an object becomes a reject."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

from rag_core.corpus.formats.rows import Record, Reject, excerpt, numbered_lines


def records(path: Path) -> Iterator[Record | Reject]:
    """Records and rejects of one JSON Lines file."""
    for number, line in numbered_lines(path):
        if isinstance(line, Reject):
            yield line
        elif line.strip():
            yield _record(path, number, line)


def _record(path: Path, number: int, line: str) -> Record | Reject:
    try:
        fields = json.loads(line)
    except (ValueError, RecursionError) as error:
        # ValueError, not only JSONDecodeError: an integer of thousands of digits raises a plain ValueError.
        return Reject(str(path), number, f"broken JSON: {error}", excerpt(line))
    if not isinstance(fields, dict):
        reason = f"wrong type: the line is {type(fields).__name__}, expected an object"
        return Reject(str(path), number, reason, excerpt(line))
    return Record(number, fields, line, fields)
