"""Containers of corpus files: JSON objects and lists are streamed, tables are joined over lines, faults are located."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from rag_core.corpus.formats import Row, read_rows
from rag_core.corpus.formats.containers import json_file, json_text
from rag_core.corpus.passages import Passage
from rag_core.errors import InputError
from tests.corpus.layout_samples import put, read, table


@pytest.mark.parametrize(
    ("content", "passages"),
    [
        ('{"d1": {"title": "T", "text": "one"}, "d2": {"text": "two"}}', [("d1", "T", "one"), ("d2", "", "two")]),
        ('{"d1": {"_id": "own", "text": "one"}}', [("own", "", "one")]),
        ('{\n"1": "one",\n"2": "two"}\n', [("1", "", "one"), ("2", "", "two")]),
        ('{"7": {"contents": "\\"T\\"\\none"}}', [("7", "T", "one")]),
    ],
)
def test_an_object_of_records_by_their_ids_is_read(
    tmp_path: Path, content: str, passages: list[tuple[str, str, str]]
) -> None:
    assert read(put(tmp_path / "c.json", content)) == ([Passage(*passage) for passage in passages], [])


def test_a_collection_without_header_is_read_if_its_first_column_is_a_number(tmp_path: Path) -> None:
    file = put(tmp_path / "collection.tsv", '0\tone "quoted" word\n1\ttwo\n')
    assert read(file) == ([Passage("0", "", 'one "quoted" word'), Passage("1", "", "two")], [])


def test_a_json_list_is_streamed_and_broken_json_is_refused_when_it_is_reached(tmp_path: Path) -> None:
    item = json.dumps({"id": "1", "text": "x" * 1000})
    file = put(tmp_path / "c.json", "[" + ", ".join([item] * 5_000) + ', {"id": ')
    rows = read_rows([file])
    assert isinstance(next(rows), Row)
    with pytest.raises(InputError, match=r"c\.json is not JSON: item 5001: Expecting .* \(line 1\)"):
        list(rows)


@pytest.mark.parametrize(
    "content", ['[{}, "x"', '[{"id": 1} {', '{"a": {"text": "x"}', '{"a": "x"} x', '[{"id": ' + "9" * 5000]
)
def test_broken_json_is_refused_by_name(tmp_path: Path, content: str) -> None:
    with pytest.raises(InputError, match=r"c\.json is not JSON"):
        read(put(tmp_path / "c.json", content), format="json")


def test_a_long_object_of_records_is_streamed_too_and_a_value_that_is_too_long_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(json_file, "MAX_LINE_BYTES", 2000)
    monkeypatch.setattr(json_text, "CHUNK_BYTES", 100)
    long = "x" * 500
    data = {"version": "1", "data": [{"id": number, "text": long} for number in range(20)]}
    assert [passage.id for passage in read(put(tmp_path / "c.json", json.dumps(data)))[0]] == [
        str(n) for n in range(20)
    ]
    members = {f"d{number}": {"text": long} for number in range(20)}
    assert [passage.id for passage in read(put(tmp_path / "c.json", json.dumps(members)))[0]] == list(members)
    with pytest.raises(InputError, match=r"c\.json: item 2 is longer than .* characters"):
        read(put(tmp_path / "c.json", json.dumps([{"id": "1", "text": "y"}, {"id": "2", "text": "x" * 9000}])))


def test_a_csv_field_may_hold_commas_and_many_line_ends_and_a_stray_quote_costs_one_row(tmp_path: Path) -> None:
    long = "\n".join(f'line {number}, "quoted"' for number in range(500))
    file = put(tmp_path / "c.csv", table([{"id": "1", "text": long}, {"id": "2", "text": "two"}], ","))
    assert read(file) == ([Passage("1", "", long), Passage("2", "", "two")], [])
    file = put(tmp_path / "c.csv", 'id,text\n1,"open\n2,two\n3,three\n')
    passages, rejects = read(file)
    assert [passage.id for passage in passages] == ["2", "3"]
    assert rejects == [(2, "broken row: a quoted field does not end as it should")]
