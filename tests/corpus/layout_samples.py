"""Sample rows of every corpus layout with the passages they give, and writers for every container."""

from __future__ import annotations

import csv
import gzip
import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from rag_core.corpus.formats import CorpusFormat, Reject, Row, read_rows
from rag_core.corpus.formats.squad import context_id
from rag_core.corpus.passages import Passage

Rows = list[dict[str, Any]]
LYON, OSLO = "Lyon is a city.", "Oslo is not, it is\na capital."


def read(
    *files: Path, format: CorpusFormat = "auto", **options: Any
) -> tuple[list[Passage], list[tuple[int | None, str]]]:
    rows = list(read_rows(files, format, **options))
    rejects = [(row.line, row.reason) for row in rows if isinstance(row, Reject)]
    return [row.passage for row in rows if isinstance(row, Row)], rejects


def put(path: Path, content: str | bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def lines(rows: Rows) -> str:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def table(rows: Rows, delimiter: str) -> str:
    writer = csv.DictWriter(file := io.StringIO(), list(rows[0]), delimiter=delimiter)
    writer.writeheader()
    writer.writerows(rows)
    return file.getvalue()


def parquet(rows: Rows) -> bytes:
    pq.write_table(pa.Table.from_pylist(rows), file := io.BytesIO())
    return file.getvalue()


CONTAINERS: dict[str, Callable[[Rows], str | bytes]] = {
    "c.jsonl": lines,
    "c.ndjson": lines,
    "lines.json": lines,
    "no_suffix": lines,
    "c.jsonl.gz": lambda rows: gzip.compress(lines(rows).encode()),
    "list.json": json.dumps,
    "list.json.gz": lambda rows: gzip.compress(json.dumps(rows).encode()),
    "indented.json": lambda rows: "\ufeff" + json.dumps(rows, indent=2),
    "objects.json": lambda rows: "\n".join(json.dumps(row, indent=2) for row in rows),
    "data.json": lambda rows: json.dumps({"version": "1", "data": rows}),
    "c.parquet": parquet,
}
TABLES: dict[str, Callable[[Rows], str | bytes]] = {
    "c.csv": lambda rows: table(rows, ","),
    "semicolons.csv": lambda rows: table(rows, ";"),
    "c.tsv": lambda rows: table(rows, "\t"),
    "c.tsv.gz": lambda rows: gzip.compress(table(rows, "\t").encode()),
}
TITLED = [Passage("1", "Lyon", LYON), Passage("x", "", OSLO)]
FLAT_LAYOUTS: dict[str, tuple[Rows, list[Passage]]] = {
    "id-text": ([{"id": "1", "title": "Lyon", "text": LYON}, {"id": "x", "title": "", "text": OSLO}], TITLED),
    "beir": ([{"_id": "1", "title": "Lyon", "text": LYON}, {"_id": "x", "title": "", "text": OSLO}], TITLED),
    "docid": ([{"docid": "1", "title": "Lyon", "text": LYON}, {"docid": "x", "title": "", "text": OSLO}], TITLED),
    "contents": ([{"id": "1", "contents": f'"Lyon"\n{LYON}'}, {"id": "x", "contents": OSLO}], TITLED),
    "squad-rows": (
        [{"id": "q1", "title": "Lyon", "context": LYON, "question": f"{n}?"} for n in range(3)],
        [Passage(context_id("Lyon", LYON), "Lyon", LYON)],
    ),
}
LIST_LAYOUTS: dict[str, tuple[Rows, list[Passage]]] = {
    "kilt": (
        [{"_id": "7", "wikipedia_id": "7", "wikipedia_title": "Lyon",
          "text": ["Lyon\n", "Section::::History.\n", "", LYON, f"BULLET::::- {OSLO}\n"]}],
        [Passage("7:3", "Lyon", LYON), Passage("7:4", "Lyon", f"- {OSLO}")],
    ),
    "abstracts": (
        [{"id": "12", "title": "Lyon", "text": [LYON, " It is old.", "Very."], "url": "u"}],
        [Passage("Lyon", "Lyon", f"{LYON} It is old. Very.")],
    ),
    "2wiki-abstracts": (
        [{"id": "12", "title": "Lyon", "sentences": [LYON, "It is old."]}],
        [Passage("Lyon", "Lyon", f"{LYON} It is old.")],
    ),
    "id-sentences": ([{"id": "1", "text": [LYON, "It is old."]}], [Passage("1", "", f"{LYON} It is old.")]),
    "hotpotqa": (
        [
            {"_id": "q", "question": "q?", "context": {"title": ["Lyon", "Oslo"], "sentences": [[LYON, " Old."], [OSLO]]}},
            {"_id": "r", "question": "r?", "context": {"title": ["Oslo"], "sentences": [[OSLO]]}},
        ],
        [Passage("Lyon", "Lyon", f"{LYON} Old."), Passage("Oslo", "Oslo", OSLO)],
    ),
}  # fmt: skip
