"""The predictions artifact: answers to a question file, in the file's order.

This module owns the layout: `predictions.jsonl` (for people and scripts) and `predictions.parquet` (for tables) hold
the same rows: id, question, answer, log_prob, candidates (answer, log_prob) and passages (id, title, text, prior
p(z|q), posterior p(z|q,a)). A part holds one shard of questions; one worker writes it. Parts are joined in order.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from rag_core.corpus.formats.rows import Reject, excerpt, numbered_lines
from rag_core.errors import ArtifactError
from rag_core.model.reader import Answer
from rag_core.questions.questions import Question
from rag_core.storage.artifact import finished_file, local_copy, open_artifact

KIND = "predictions"
_SURROGATES = re.compile("[\ud800-\udfff]")
JSONL, PARQUET = "predictions.jsonl", "predictions.parquet"
SCHEMA = pa.schema(
    [
        ("id", pa.string()),
        ("question", pa.string()),
        ("answer", pa.string()),
        ("log_prob", pa.float64()),
        ("candidates", pa.list_(pa.struct([("answer", pa.string()), ("log_prob", pa.float64())]))),
        (
            "passages",
            pa.list_(
                pa.struct(
                    [
                        ("id", pa.string()),
                        ("title", pa.string()),
                        ("text", pa.string()),
                        ("prior", pa.float64()),
                        ("posterior", pa.float64()),
                    ]
                )
            ),
        ),
    ]
)


def prediction_row(question: Question, answer: Answer) -> dict[str, Any]:
    """Make a row of the artifact."""
    return {
        "id": question.id,
        "question": question.question,
        "answer": answer.text,
        "log_prob": answer.log_prob,
        "candidates": [{"answer": candidate.text, "log_prob": candidate.log_prob} for candidate in answer.candidates],
        "passages": [
            {
                "id": read.passage.id,
                "title": read.passage.title,
                "text": read.passage.text,
                "prior": read.prior,
                "posterior": read.posterior,
            }
            for read in answer.passages
        ],
    }


def write_part(rows: Sequence[dict[str, Any]], out_file: Path) -> None:
    """Write one shard of rows as JSON lines; the file appears complete or not at all."""
    with finished_file(out_file) as unfinished, unfinished.open("w", encoding="utf-8") as file:
        for row in rows:
            file.write(_line(row))


def join_parts(parts: Sequence[Path], folder: Path) -> int:
    """Join the parts, in order, into `predictions.jsonl` and `predictions.parquet`; return the number of rows."""
    count = 0
    with (folder / JSONL).open("w", encoding="utf-8") as file, pq.ParquetWriter(folder / PARQUET, SCHEMA) as writer:
        for part in parts:
            text = part.read_text(encoding="utf-8")
            file.write(text)
            # Not splitlines: JSON strings may hold U+2028 and U+0085, which it takes for line ends.
            rows = [json.loads(line) for line in text.split("\n") if line]
            writer.write_table(pa.Table.from_pylist(rows, schema=SCHEMA))
            count += len(rows)
    return count


def write_jsonl(rows: Iterable[dict[str, Any]], out_file: Path) -> None:
    """Write rows as `predictions.jsonl`, byte for byte as `join_parts` writes them."""
    with out_file.open("w", encoding="utf-8") as file:
        for row in rows:
            file.write(_line(row))


def write_parquet(jsonl: Path, out_file: Path, shard_questions: int) -> None:
    """Write `predictions.parquet` from `predictions.jsonl`, with one row group per part, as `join_parts` does."""
    with jsonl.open(encoding="utf-8", newline="\n") as lines, pq.ParquetWriter(out_file, SCHEMA) as writer:
        while rows := [json.loads(line) for line in islice(lines, shard_questions)]:
            writer.write_table(pa.Table.from_pylist(rows, schema=SCHEMA))


def _line(row: dict[str, Any]) -> str:
    return json.dumps(row, ensure_ascii=False) + "\n"


def read_predictions(folder: Path) -> Iterator[dict[str, Any]]:
    """Yield the rows of a published predictions artifact, in order.

    Raises:
        ArtifactError: the artifact is missing or damaged, or a line is not a row.
    """
    folder = local_copy(folder)
    open_artifact(folder, KIND)
    for number, line in numbered_lines(folder / JSONL):
        row = _row(line)
        if row is None:
            found = line.reason if isinstance(line, Reject) else excerpt(line)
            raise ArtifactError(
                f"{folder / JSONL} line {number} is not a prediction: expected an object with the strings id, question "
                f"and answer and the list passages, found {found!r}. Run `rag infer` again."
            )
        yield row


def _row(line: str | Reject) -> dict[str, Any] | None:
    """Parse a line as a row of the artifact, or return None. Only the keys that readers use are checked."""
    try:
        row = json.loads(line) if isinstance(line, str) else None
    except (ValueError, RecursionError):
        return None
    if not isinstance(row, dict) or not all(_is_text(row.get(name)) for name in ("id", "question", "answer")):
        return None
    passages = row.get("passages")
    if not isinstance(passages, list) or not all(isinstance(passage, dict) for passage in passages):
        return None
    texts = (passage.get(name) for passage in passages for name in ("id", "title", "text"))
    return row if all(map(_is_text, texts)) else None


def _is_text(value: object) -> bool:
    """Whether a value is a string that UTF-8 can encode; it may be empty."""
    return isinstance(value, str) and not _SURROGATES.search(value)
