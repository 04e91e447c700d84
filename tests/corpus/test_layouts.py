"""Corpus layouts: each gives the same passages in every container, and its bad rows are rejected."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest

from rag_core.corpus.corpus import Corpus, CorpusConfig, write_corpus
from rag_core.corpus.formats import Reading
from rag_core.corpus.formats.layouts import LAYOUTS
from rag_core.corpus.formats.squad import context_id
from rag_core.corpus.passages import Passage
from tests.corpus.layout_samples import (
    CONTAINERS,
    FLAT_LAYOUTS,
    LIST_LAYOUTS,
    LYON,
    OSLO,
    TABLES,
    lines,
    parquet,
    put,
    read,
)


@pytest.mark.parametrize("layout", FLAT_LAYOUTS | LIST_LAYOUTS)
def test_a_layout_gives_the_same_passages_in_every_container(tmp_path: Path, layout: str) -> None:
    rows, expected = (FLAT_LAYOUTS | LIST_LAYOUTS)[layout]
    containers = CONTAINERS | (TABLES if layout in FLAT_LAYOUTS else {})
    for name, write in containers.items():
        reading = Reading()
        assert read(put(tmp_path / name, write(rows)), reading=reading) == (expected, []), name
        (recognised,) = reading.layouts
        assert recognised.startswith(f"{layout} ("), name


def test_every_layout_is_tested_here_and_documented() -> None:
    assert [layout.name for layout in LAYOUTS] == [
        "id-text", "beir", "docid", "contents", "kilt", "abstracts", "2wiki-abstracts", "id-sentences", "hotpotqa",
        "squad-rows",
    ]  # fmt: skip
    assert {layout.name for layout in LAYOUTS} == set(FLAT_LAYOUTS | LIST_LAYOUTS)
    page = (Path(__file__).parents[2] / "docs/formats.md").read_text(encoding="utf-8")
    assert not [layout.name for layout in LAYOUTS if f"| `{layout.name}` |" not in page]


@pytest.mark.parametrize(
    ("contents", "title", "text"),
    [
        ('"Lyon"\nA city.', "Lyon", "A city."),
        ('"Lyon" \r\nA city.', "Lyon", "A city."),
        ('""Lyon" (song)"\nA song.', '"Lyon" (song)', "A song."),
        ("Lyon\nA city.", "", "Lyon\nA city."),
        ("A city.", "", "A city."),
        ('"Lyon\nA city.', "", '"Lyon\nA city.'),
        ('"Lyon" is a city.\nOld.', "", '"Lyon" is a city.\nOld.'),
        ('"Lyon"', "", '"Lyon"'),
    ],
)
def test_contents_begin_with_a_title_only_if_their_first_line_is_in_quotes(
    tmp_path: Path, contents: str, title: str, text: str
) -> None:
    assert read(put(tmp_path / "c.jsonl", lines([{"id": 0, "contents": contents}]))) == (
        [Passage("0", title, text)],
        [],
    )


def test_kilt_is_read_in_hugging_faces_form_and_headings_are_skipped_not_rejected(tmp_path: Path) -> None:
    page = {"kilt_id": "7", "wikipedia_id": "7", "wikipedia_title": "Lyon",
            "text": {"paragraph": ["Lyon\n", "Section::::Sights.\n", " \n", f"{LYON}\n"]}}  # fmt: skip
    reading = Reading()
    assert read(put(tmp_path / "c.parquet", parquet([page])), reading=reading) == ([Passage("7:3", "Lyon", LYON)], [])
    assert reading.skipped == {"heading": 2, "empty paragraph": 1}


def test_a_first_paragraph_that_is_not_the_title_is_a_passage_and_paragraphs_that_are_no_text_are_rejected(
    tmp_path: Path,
) -> None:
    page = {"_id": 7, "wikipedia_title": "Lyon", "text": [LYON, None, "a\0b", 5, OSLO]}
    passages, rejects = read(put(tmp_path / "c.jsonl", lines([page])))
    assert passages == [Passage("7:0", "Lyon", LYON), Passage("7:4", "Lyon", OSLO)]
    assert [reason for _, reason in rejects] == [
        "missing text item 1", "NUL character: in text item 2", "wrong type: text item 3 is int, expected a string",
    ]  # fmt: skip


@pytest.mark.parametrize(
    "context",
    [
        [["Lyon", [LYON]], ["Oslo", [OSLO]]],
        [{"title": "Lyon", "sentences": [LYON]}, {"title": "Oslo", "content": [OSLO]}],
        {"title": ["Lyon", "Oslo"], "sentences": [[LYON], [OSLO]]},
    ],
)
def test_contexts_of_hotpotqa_and_2wiki_are_passages_by_their_titles(tmp_path: Path, context: Any) -> None:
    rows = [{"_id": "q", "question": "q?", "context": context}]
    assert read(put(tmp_path / "c.json", json.dumps(rows))) == (
        [Passage("Lyon", "Lyon", LYON), Passage("Oslo", "Oslo", OSLO)],
        [],
    )


def test_a_repeated_passage_is_skipped_and_another_text_with_the_same_title_is_rejected(
    tmp_path: Path,
) -> None:
    def question(*pairs: tuple[str, str]) -> dict[str, Any]:
        return {"question": "q?", "context": [[title, [text]] for title, text in pairs]}

    train = put(tmp_path / "train.jsonl", lines([question(("Lyon", LYON)), question(("Lyon", LYON), ("Oslo", OSLO))]))
    dev = put(tmp_path / "dev.json", json.dumps([question(("Oslo", OSLO), ("Lyon", "another"))]))
    manifest = write_corpus([train, dev], tmp_path / "out", CorpusConfig(max_rejects_share=1))
    assert [passage.id for passage in Corpus.open(tmp_path / "out").iter_passages()] == ["Lyon", "Oslo"]
    assert manifest.details["skipped_by_reason"] == {"passage of an earlier question": 2}
    assert manifest.details["rejects_by_reason"] == {"duplicate id": 1}


@pytest.mark.parametrize(
    ("context", "reason"),
    [
        ([["Lyon"]], "wrong type: an item of context is not a pair of a title and its sentences"),
        ([["Lyon", ["a", None]]], "wrong type: context item 2 is NoneType, expected a string"),
        ([["Lyon", 5]], "wrong type: context is int, expected a list of strings"),
        ([["", ["a"]]], "empty title"),
        ([["Lyon", []]], "empty context"),
    ],
)
def test_a_bad_context_is_rejected_and_the_others_read(tmp_path: Path, context: Any, reason: str) -> None:
    rows = [{"question": "q?", "context": [*context, ["Oslo", [OSLO]]]}]
    assert read(put(tmp_path / "c.jsonl", lines(rows))) == ([Passage("Oslo", "Oslo", OSLO)], [(1, reason)])


def test_the_id_of_a_squad_row_is_its_title_and_a_hash_of_its_context() -> None:
    mark = hashlib.sha256(OSLO.encode()).hexdigest()[:12]
    assert context_id("Oslo", OSLO) == f"Oslo-{mark}"
    assert context_id(None, OSLO) == context_id("", OSLO) == context_id(" ", OSLO) == f"passage-{mark}"
    assert context_id("Oslo", OSLO + ".") != context_id("Oslo", OSLO)


def test_squad_rows_under_data_are_rows_and_articles_are_articles(tmp_path: Path) -> None:
    row = {"id": "q", "title": "Lyon", "context": LYON, "question": "q?"}
    rows = put(tmp_path / "rows.json", json.dumps({"version": "0.1.0", "data": [row]}))
    articles = put(
        tmp_path / "articles.json", json.dumps({"data": [{"title": "Lyon", "paragraphs": [{"context": LYON}]}]})
    )
    assert read(rows)[0] == [Passage(context_id("Lyon", LYON), "Lyon", LYON)]
    assert read(articles)[0] == [Passage("Lyon#0", "Lyon", LYON)]


@pytest.mark.parametrize(
    ("row", "passage", "reason"),
    [
        ('{"_id": 123456789012345678901234567890, "text": "t"}', Passage("123456789012345678901234567890", "", "t"), ""),
        ('{"_id": NaN, "text": "t"}', None, "wrong type: _id is float, expected a string"),
        ('{"_id": "a", "_id": "b", "text": "t"}', Passage("b", "", "t"), ""),
        ('{"_id": "a", "text": "\\u0000"}', None, "NUL character: in text"),
        ('{"_id": "a", "text": "\\ud83d\\ude00"}', Passage("a", "", "😀"), ""),
        ('{"_id": "a", "text": "\\ud83d"}', None, "undecodable: text holds half of a surrogate pair"),
        ('{"_id": "a", "text": ["t"]}', None, "wrong type: text is list, expected a string"),
        ('{"_id": "a", "text": "t", "metadata": ' + "[" * 300 + "]" * 300 + "}", Passage("a", "", "t"), ""),
    ],
)  # fmt: skip
def test_hostile_rows_are_read_or_rejected_under_the_names_of_their_layout(
    tmp_path: Path, row: str, passage: Passage | None, reason: str
) -> None:
    good = ['{"_id": "1", "text": "good"}'] * 2
    passages, rejects = read(put(tmp_path / "c.jsonl", "\n".join([*good, row])))
    assert passages[2:] == ([passage] if passage else [])
    assert rejects == ([(3, reason)] if reason else [])
