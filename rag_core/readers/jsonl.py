"""JSON Lines: one object a line with `id` (string or integer), `text`, and an optional `title`.

Streams the file line by line. Other keys are ignored, blank lines are skipped, and a line that is not such an
object becomes a reject.
"""

from __future__ import annotations

import json
from collections.abc import Iterator

from rag_core.readers.rows import Reject, Row, check_row, excerpt, numbered_lines
from rag_core.readers.sources import SourceFile


def read(source: SourceFile) -> Iterator[Row | Reject]:
    """Rows and rejects of one JSON Lines file."""
    for number, line in numbered_lines(source.path):
        if isinstance(line, Reject):
            yield line
        elif line.strip():
            yield _row(source, number, line)


def _row(source: SourceFile, number: int, line: str) -> Row | Reject:
    try:
        record = json.loads(line)
    except (ValueError, RecursionError) as error:
        # ValueError, not JSONDecodeError: an integer of thousands of digits raises the former.
        return Reject(str(source.path), number, f"broken JSON: {error}", excerpt(line))
    if not isinstance(record, dict):
        reason = f"wrong type: the line is {type(record).__name__}, expected an object"
        return Reject(str(source.path), number, reason, excerpt(line))
    return check_row(source.path, number, record.get("id"), record.get("title"), record.get("text"), line)
