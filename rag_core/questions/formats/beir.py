"""BEIR's relevance judgements as a question file: its questions are those that `qrels/SPLIT.tsv` judges.

BEIR (Thakur et al. 2021, arXiv 2104.08663) has one `queries.jsonl` and a file of judgements for each split, so the split
is named by the latter: `--questions scifact/qrels/test.tsv`. The queries are looked for in the folder above and beside
the file. A score of 0 or less is no gold passage, and a question without a gold passage is no question of the split.
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
    """The queries (a local file) that the judgements at `place`, here or in an object store, are about.

    Raises:
        InputError: there are none.
    """
    place = as_place(place)
    folders = (place.parent.parent, place.parent)
    for candidate in (folder / name for folder in folders for name in QUERIES):
        if not isinstance(candidate, ObjectPath):
            if candidate.is_file():
                return candidate
        elif candidate.prefix and candidate.parent.bucket:
            try:
                found = local_file(candidate)
            except ArtifactError as error:
                if not isinstance(error.__cause__, FileNotFoundError):
                    raise
                continue
            if found.is_file():
                return found
    raise InputError(
        f"{place} holds BEIR's relevance judgements, but there is no {QUERIES[0]} in {folders[0]} or {folders[1]} "
        f"(nor {', '.join(QUERIES[1:])}). Put the data set's queries there."
    )


def gold_passages(records: Iterator[Record]) -> dict[str, tuple[list[str], str]]:
    """For each query with a relevant passage: the passages' ids in the file's order, and the place of the first.

    Raises:
        InputError: a line without an id, or whose score is no number.
    """
    gold: dict[str, tuple[list[str], str]] = {}
    for record in records:
        if not is_judgement(record):
            raise record.error("no judgement", "`query-id`, `corpus-id` and `score`")
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
