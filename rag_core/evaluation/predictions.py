"""The predictions artifact: answers to a question file, in its order.

Owner of its layout: `predictions.jsonl` (for people and scripts) and `predictions.parquet` (for tables), with the same
rows: id, question, answer, log_prob, candidates (answer, log_prob) and passages (id, title, text, prior p(z|q),
posterior p(z|q,a)). A part is one shard of questions, written by one worker; parts are joined in order.
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
    """One row of the artifact."""
    return {
        "id": question.id,
        "question": question.question,
        "answer": answer.text,
        "log_prob": answer.log_prob,
        "candidates": [{"answer": one.text, "log_prob": one.log_prob} for one in answer.candidates],
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
    """Write one shard of rows as JSON lines; the file appears whole or not at all."""
    with finished_file(out_file) as unfinished, unfinished.open("w", encoding="utf-8") as file:
        for row in rows:
            file.write(_line(row))


def join_parts(parts: Sequence[Path], folder: Path) -> int:
    """Join the parts, in order, into `predictions.jsonl` and `predictions.parquet`; returns the number of rows."""
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
    """Rows as `predictions.jsonl`, the same bytes as those that `join_parts` wrote from them."""
    with out_file.open("w", encoding="utf-8") as file:
        for row in rows:
            file.write(_line(row))


def write_parquet(jsonl: Path, out_file: Path, shard_questions: int) -> None:
    """`predictions.parquet` from `predictions.jsonl`, with row groups of one part's size, as `join_parts` writes them."""
    with jsonl.open(encoding="utf-8", newline="\n") as lines, pq.ParquetWriter(out_file, SCHEMA) as writer:
        while rows := [json.loads(line) for line in islice(lines, shard_questions)]:
            writer.write_table(pa.Table.from_pylist(rows, schema=SCHEMA))


def _line(row: dict[str, Any]) -> str:
    return json.dumps(row, ensure_ascii=False) + "\n"


def read_predictions(folder: Path) -> Iterator[dict[str, Any]]:
    """The rows of a published predictions artifact, in order.

    Raises:
        ArtifactError: missing, damaged, or a line that is not a row.
    """
    folder = local_copy(folder)
    open_artifact(folder, KIND)
    for number, line in numbered_lines(folder / JSONL):
        row = _row(line)
        if row is None:
            found = line.reason if isinstance(line, Reject) else excerpt(line)
            raise ArtifactError(
                f"{folder / JSONL} line {number} is not a prediction: an object with the strings id, question and answer "
                f"and the list passages was expected, found {found!r}. Run `rag infer` again."
            )
        yield row


def _row(line: str | Reject) -> dict[str, Any] | None:
    """A line as a row of the artifact, None if it is none. Checked is what others read of it."""
    try:
        row = json.loads(line) if isinstance(line, str) else None
    except (ValueError, RecursionError):
        return None
    if not isinstance(row, dict) or not all(_is_text(row.get(name)) for name in ("id", "question", "answer")):
        return None
    passages = row.get("passages")
    if not isinstance(passages, list) or not all(isinstance(one, dict) for one in passages):
        return None
    return row if all(_is_text(one.get(name)) for one in passages for name in ("id", "title", "text")) else None


def _is_text(value: object) -> bool:
    """A string that can be written; it may be empty."""
    return isinstance(value, str) and not _SURROGATES.search(value)
