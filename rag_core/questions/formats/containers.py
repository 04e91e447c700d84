"""Reads a file's records: JSON Lines, a JSON list or object, CSV with or without a header (each also gzip), or Parquet.

The container is recognised by content. The suffix decides only where content cannot: `.csv` and `.tsv`, and
`.jsonl` if the first line is broken. Records are streamed, so a file of gigabytes is never in memory whole. This
module knows no layouts except three that are not records with keys: SQuAD's nesting, and two kinds of CSV without
a header.
"""

from __future__ import annotations

import contextlib
import csv
import itertools
import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from rag_core.corpus.formats.containers import parquet
from rag_core.corpus.formats.containers.json_text import open_json
from rag_core.corpus.formats.rows import MAX_LINE_BYTES, Reject, excerpt, numbered_lines
from rag_core.corpus.formats.squad import articles_of, numbered_paragraphs
from rag_core.errors import InputError
from rag_core.questions.formats.literals import numpy_fault, parse_literal
from rag_core.questions.formats.records import Record

FORMATS = "JSON Lines, a JSON list, CSV or TSV, Parquet or SQuAD JSON, in a layout of docs/formats.md"
# The longest JSON value that is read: far more than one of DPR's questions with its hundred passages.
MAX_VALUE_CHARS = 2**28
# Rows of Parquet in memory at a time. Few, because a row of DPR's training data holds a hundred passages.
BATCH_ROWS = 16
_PARQUET = b"PAR1"
_GZIPPED = ".gz"
# Keys of a data set's top-level object that hold its list of records.
_LIST_KEYS = ("data", "Data", "questions")
# A first row of CSV with one of these cells is a header.
_HEADERS = frozenset({"question", "input", "question_text", "query-id", "utterance", "text", "query"})
# CSV columns whose cells are lists or objects written as text.
_NESTED = frozenset(
    {"answers", "answer", "golden_answers", "possible_answers", "gold_passage_ids", "ctxs", "positive_ctxs",
     "supporting_facts", "output"}
)  # fmt: skip
_BOOLEANS = {"true": True, "false": False, "1": True, "0": False}
_DPR = "question, tab, list of answers such as ['Paris', 'City of Paris']"


def read_records(path: Path, wanted: frozenset[str], *, cells_are_answers: bool = False) -> Iterator[Record]:
    """The records of a local file.

    Args:
        path: the file.
        wanted: all keys that layouts read. Other columns of Parquet are not read; records have None for them.
        cells_are_answers: whether an answers cell of CSV that is not a list counts as one answer, as in files of
            regular expressions.

    Raises:
        InputError: an archive other than gzip, or unknown or broken content.
    """
    with path.open("rb") as file:
        if file.read(4) == _PARQUET:
            return _parquet(path, wanted)
    suffixes = [suffix.lower() for suffix in path.suffixes]
    suffix = next((suffix for suffix in reversed(suffixes) if suffix != _GZIPPED), "")
    if suffix in (".csv", ".tsv"):
        return _csv(path, cells_are_answers)
    with open_json(path, MAX_VALUE_CHARS) as text:
        first = text.peek()
    if not first:
        return iter(())
    if first == "[":
        return _json_list(path)
    if suffix in (".jsonl", ".ndjson"):
        return _json_lines(path)
    if first != "{":
        raise InputError(
            f"{path} is of no known format: it starts with {first!r}. Expected {FORMATS}. Convert the file."
        )
    return _json_object(path)


def _json_list(path: Path) -> Iterator[Record]:
    with open_json(path, MAX_VALUE_CHARS) as text:
        yield from _entries(path, text.items())
        text.end()


def _json_object(path: Path) -> Iterator[Record]:
    """A data set's top-level object (its list under one of `_LIST_KEYS`), one record, or JSON Lines by another name."""
    with open_json(path, MAX_VALUE_CHARS) as text:
        value: dict[str, Any] = {}
        has_list = False
        for key in text.names():
            if key in _LIST_KEYS and text.peek() == "[" and not has_list and "question" not in value:
                has_list = True
                yield from _entries(path, text.items())
            else:
                value[key] = text.value()
        if has_list:
            text.end()
            return
        if not text.peek():
            yield Record(f"{path} record 1", "1", value)
            return
    yield from _json_lines(path)


def _entries(path: Path, items: Iterator[Any]) -> Iterator[Record]:
    """Records of a list: its items, or the questions of SQuAD's articles."""
    first = list(itertools.islice(items, 1))
    if first and isinstance(first[0], dict) and "paragraphs" in first[0] and "question" not in first[0]:
        yield from _squad(path, [*first, *items])
        return
    for number, value in enumerate(itertools.chain(first, items), 1):
        yield Record(f"{path} record {number}", str(number), value)


def _squad(path: Path, articles: list[Any]) -> Iterator[Record]:
    count = 0
    for paragraph in numbered_paragraphs(articles_of({"data": articles}, path)):
        qas = paragraph.value.get("qas") if isinstance(paragraph.value, dict) else None
        if not isinstance(qas, list):
            raise Record(f"{path} paragraph {paragraph.id!r}", "", paragraph.value).error(
                "no list `qas`", "SQuAD's layout"
            )
        for number, qa in enumerate(qas, 1):
            count += 1
            place = f"{path} paragraph {paragraph.id!r} question {number}"
            if isinstance(qa, dict):
                qa = {**qa, "gold_passage_ids": [paragraph.id]}
            yield Record(place, str(count), qa, layout="SQuAD")


def _json_lines(path: Path) -> Iterator[Record]:
    for number, line in _lines(path):
        if not line.strip():
            continue
        try:
            value = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise Record(f"{path} line {number}", "", line).error(
                f"broken JSON ({error})", "one object per line"
            ) from error
        yield Record(f"{path} line {number}", str(number), value)


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    for number, line in numbered_lines(path):
        if isinstance(line, Reject):
            expected, remedy = "a shorter line", "Correct the file"
            if line.category == "undecodable":
                expected, remedy = "UTF-8", "Convert the file to UTF-8"
            raise InputError(
                f"{path} line {number}: {line.reason}; found {line.found!r}, expected {expected}. {remedy}."
            )
        yield number, line


def _csv(path: Path, cells_are_answers: bool) -> Iterator[Record]:
    first = next((line for _, line in _lines(path) if line.strip()), "")
    for delimiter in "\t,;":
        cells: list[str] = []
        with contextlib.suppress(csv.Error):  # reading the rows raises this error again, with its line
            cells = next(csv.reader([first], delimiter=delimiter), [])
        if any(cell.strip().casefold() in _HEADERS for cell in cells):
            return _csv_with_header(path, delimiter, cells_are_answers)
    return _topics(path) if _is_topic(first) else _dpr_csv(path, cells_are_answers)


def _is_topic(line: str) -> bool:
    """Whether a line without a header is an id and a question, rather than a question and a list of answers."""
    id, _, question = line.partition("\t")
    is_id = bool(id) and not any(letter.isspace() for letter in id)
    return is_id and bool(question.strip()) and not question.lstrip().startswith(("[", '"[', "{", "("))


def _rows(path: Path, delimiter: str, expected: str) -> Iterator[tuple[int, list[str]]]:
    """Rows of CSV with the line on which each begins. Strict, because a stray quote would swallow the rows after it."""
    csv.field_size_limit(max(csv.field_size_limit(), MAX_LINE_BYTES))
    row_start = ""  # the first line of the current row, for messages

    def lines() -> Iterator[str]:
        nonlocal row_start
        for _, line in _lines(path):
            row_start = row_start or line
            yield line + "\n"

    rows = csv.reader(lines(), delimiter=delimiter, strict=True)
    while True:
        number, row_start = rows.line_num + 1, ""
        try:
            row = next(rows)
        except StopIteration:
            return
        except csv.Error as error:
            raise Record(f"{path} line {number}", "", row_start).error(f"broken row ({error})", expected) from error
        if row and not (len(row) == 1 and row[0].isspace()):
            yield number, row


def _dpr_csv(path: Path, cells_are_answers: bool) -> Iterator[Record]:
    for number, row in _rows(path, "\t", _DPR):
        place = f"{path} line {number}"
        if len(row) != 2:
            raise Record(place, "", "\t".join(row)).error(f"{len(row)} tab-separated columns", _DPR)
        fault = numpy_fault(row[1])
        if fault:
            raise Record(place, "", row[1]).error(f"the second column {fault}", _DPR)
        answers = parse_literal(row[1])
        if not isinstance(answers, list):
            if not (cells_are_answers and row[1].strip()):
                raise Record(place, "", row[1]).error("the second column is not a list", _DPR)
            answers = [row[1]]
        yield Record(place, str(number), {"question": row[0], "answers": answers}, layout="DPR's questions")


def _topics(path: Path) -> Iterator[Record]:
    """Pyserini's topics: an id, a tab and a question; quotes are ordinary characters."""
    for number, line in _lines(path):
        if not line.strip():
            continue
        id, tab, question = line.partition("\t")
        if not tab or "\t" in question or any(letter.isspace() for letter in id):
            raise Record(f"{path} line {number}", "", line).error(
                "not two columns, an id and a question",
                "id, tab, question, or a header that has `question` (of judgements: `query-id`, `corpus-id`, `score`)",
            )
        yield Record(f"{path} line {number}", str(number), {"id": id, "question": question}, layout="topics")


def _csv_with_header(path: Path, delimiter: str, cells_are_answers: bool) -> Iterator[Record]:
    expected = "as many columns as the header has"
    rows = _rows(path, delimiter, expected)
    _, header = next(rows, (1, []))
    header = [name.strip() for name in header]
    if len(set(header)) < len(header):
        raise Record(f"{path} line 1", "", delimiter.join(header)).error(
            "two columns with the same name", "each name once"
        )
    for number, row in rows:
        place = f"{path} line {number}"
        if len(row) != len(header):
            raise Record(place, "", delimiter.join(row)).error(
                f"{len(row)} columns, the header has {len(header)}", expected
            )
        value = {
            name: _cell(Record(place, "", cell), name, cell, cells_are_answers)
            for name, cell in zip(header, row, strict=True)
        }
        yield Record(place, str(number), value)


def _cell(record: Record, name: str, cell: str, cells_are_answers: bool) -> Any:
    if not cell.strip():
        return None
    if name == "is_impossible":
        return _BOOLEANS.get(cell.strip().lower(), cell)
    if name not in _NESTED:
        return cell
    fault = numpy_fault(cell)
    if fault:
        raise record.error(f"`{name}` {fault}", "a list in JSON (`json.dumps(x.tolist())` writes one)")
    parsed = parse_literal(cell)
    if parsed is not None:
        return parsed
    return [cell] if cells_are_answers and name == "answers" else cell


def _parquet(path: Path, wanted: frozenset[str]) -> Iterator[Record]:
    for row in parquet.records(path, wanted, BATCH_ROWS):
        if not row.fields:
            raise InputError(
                f"{path} has no column that a question is read from; found {excerpt(', '.join(row.keys)) or 'none'}. "
                f"Expected {FORMATS}. Rename the columns."
            )
        value = dict.fromkeys(row.keys) | {name: _as_json(field) for name, field in row.fields.items()}
        yield Record(f"{path} row {row.line}", str(row.line), value)


def _as_json(value: Any) -> Any:
    """None for NaN, which pandas writes for missing values; other values unchanged."""
    return None if isinstance(value, float) and math.isnan(value) else value
