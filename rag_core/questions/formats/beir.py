"""BEIR's relevance judgements as a question file: its questions are the queries that `qrels/SPLIT.tsv` judges.

BEIR (Thakur et al. 2021, arXiv 2104.08663) has one `queries.jsonl` and one file of judgements per split, so the
user names the split by the latter: `--questions scifact/qrels/test.tsv`. The queries are looked for in the folder
above, then beside the file. A passage with a score of 0 or less is not gold, and a query without a gold passage
is left out.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from rag_core.corpus.formats.rows import id_as_text
from rag_core.errors import ArtifactError, InputError
from rag_core.questions.formats.records import Record, number, text
from rag_core.storage.artifact import local_file
from rag_core.storage.places import ObjectPath, as_place

LAYOUT = "BEIR's qrels"
QUERIES = ("queries.jsonl", "queries.jsonl.gz", "queries.json", "queries.parquet", "queries.tsv")


def is_judgement(record: Record) -> bool:
    """Whether a record is a line of BEIR's qrels."""
    return isinstance(record.value, dict) and {"query-id", "corpus-id"} <= record.value.keys()


def queries_of(place: Path) -> Path:
    """The file of queries (a local copy) that belongs to the judgements at `place`, a path here or in an object store.

    Raises:
        InputError: there is no such file.
    """
    place = as_place(place)
    folders = (place.parent.parent, place.parent)
    for candidate in (folder / name for folder in folders for name in QUERIES):
        if not isinstance(candidate, ObjectPath):
            if candidate.is_file():
                return candidate
        elif candidate.prefix and candidate.parent.bucket:
            try:
                local = local_file(candidate)
            except ArtifactError as error:
                if not isinstance(error.__cause__, FileNotFoundError):
                    raise
                continue
            if local.is_file():
                return local
    raise InputError(
        f"{place} holds BEIR's relevance judgements, but there is no {QUERIES[0]} in {folders[0]} or {folders[1]} "
        f"(nor {', '.join(QUERIES[1:])}). Put the data set's queries there."
    )


def gold_passages(records: Iterator[Record]) -> dict[str, tuple[list[str], str]]:
    """For each query with a relevant passage: the passages' ids in the file's order, and the place of the first.

    Raises:
        InputError: a line without an id, or with a score that is not a number.
    """
    gold: dict[str, tuple[list[str], str]] = {}
    for record in records:
        if not is_judgement(record):
            raise record.error("not a judgement", "`query-id`, `corpus-id` and `score`")
        query = text(record, "query-id", id_as_text(record.get("query-id")))
        passage = text(record, "corpus-id", id_as_text(record.get("corpus-id")))
        score = number(record.get("score"))
        if score != score:
            raise record.error(f"`score` is {record.get('score')!r}", "a number")
        if score > 0:
            ids, _ = gold.setdefault(query, ([], record.place))
            if passage not in ids:
                ids.append(passage)
    return gold
