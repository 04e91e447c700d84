"""Containers of questions (JSON, gzip, CSV, Parquet): read as a whole-file parser would, or refused with the place."""

from __future__ import annotations

import csv
import gc
import gzip
import io
import json
import time
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from rag_core.corpus.formats.containers import json_text
from rag_core.errors import InputError
from rag_core.questions.formats import containers
from rag_core.questions.questions import Question, read_questions


def put(path: Path, content: str | bytes) -> Path:
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('[{"question": "q"},\n\n {"question": }]', r"line 3: broken JSON \(Expecting value\)"),
        ('[{"question": "q"}\n{"question": "r"}]', "line 2: broken JSON"),
        ('[{"question": "q"}]\n[]', r"line 2: broken JSON \(more text after the end"),
        ('[{"question": "q"},\n', "line 2: broken JSON"),
        ('[{"question": "q"}', "line 1: broken JSON"),
        ('{"data": [{"question": "q"}]\n', "line 2: broken JSON"),
        ('{"data": [{"question": "q"}]} x', "broken JSON"),
        ('[{"question": "' + "9" * 9 + '"}, ' + "9" * 5000 + "]", "broken JSON"),
        (b'[{"question": "q"},\n\n{"question": "caf\xe9"}]', "line 3: undecodable"),
    ],
)
def test_broken_json_is_refused_by_its_line(content: str | bytes, message: str, tmp_path: Path) -> None:
    file = put(tmp_path / "q.json", content)
    with pytest.raises(InputError, match=message) as caught:
        read_questions(file)
    assert str(caught.value).startswith(str(file))


def test_a_value_without_end_is_refused_before_it_fills_the_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(json_text, "CHUNK_BYTES", 1000)
    monkeypatch.setattr(containers, "MAX_VALUE_CHARS", 5000)
    file = put(tmp_path / "q.json", '[{"question": "' + "x" * 100_000)
    with pytest.raises(InputError, match=r"line 1: broken JSON \(a single value of more than 5000 characters\)"):
        read_questions(file)


def test_dprs_training_file_is_read_in_a_fraction_of_its_size(tmp_path: Path) -> None:
    hard = [{"title": "t", "text": "x" * 700, "passage_id": str(n)} for n in range(50)]
    record = {"question": "q?", "answers": ["a"], "positive_ctxs": hard[:1], "hard_negative_ctxs": hard}
    file = put(tmp_path / "train.json", json.dumps([record] * 700))
    size = file.stat().st_size
    assert size > 2.5e7
    tracemalloc.start()
    try:
        assert len(read_questions(file)) == 700
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < size / 2, f"{peak:,} bytes for a file of {size:,}"


def test_a_squad_file_on_one_line_may_be_longer_than_a_line_of_json_lines(tmp_path: Path) -> None:
    paragraphs = [{"context": "x" * 1_000_000, "qas": []}] * 20
    paragraphs.append({"context": "c", "qas": [{"id": "1", "question": "q?", "answers": [{"text": "c"}]}]})
    file = put(tmp_path / "q.json", json.dumps({"data": [{"title": "T", "paragraphs": paragraphs}]}))
    assert read_questions(file) == [Question("1", "q?", ("c",), None, ("T#20",))]


@pytest.mark.parametrize("name", ["q.jsonl", "q.json"])
def test_a_null_in_a_list_is_a_bad_record_at_any_position(name: str, tmp_path: Path) -> None:
    for content in ('[null, {"question": "q"}]', '[{"question": "q"}, null]'):
        with pytest.raises(InputError, match=r"record [12]: a NoneType; expected an object"):
            read_questions(put(tmp_path / name, content))


def test_csv_cells_keep_commas_quotes_and_line_ends_and_name_the_line(tmp_path: Path) -> None:
    content = 'id,question,answer,type\n1,"who, ""me""?\nyes","a, b",\n2,what?,"[\'c\', \'d\']",t\n'
    assert read_questions(put(tmp_path / "q.csv", content)) == [
        Question("1", 'who, "me"?\nyes', ("a, b",)),
        Question("2", "what?", ("c", "d"), "t"),
    ]
    with pytest.raises(InputError, match=r"q\.csv line 4: 3 columns, the header has 4"):
        read_questions(put(tmp_path / "q.csv", content.replace("2,what?,", "2,")))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("question,answers\nq?,Paris\n", "line 2: `answers` is str"),
        ("question,answers\nq?,\"['Lyon' 'Paris']\"\n", "line 2: `answers` holds strings without a comma"),
        ("question,answers\nq?,\"{'text': array(['Lyon'], dtype=object)}\"\n", "line 2: `answers` holds NumPy's print"),
        ("question,question\nq?,r?\n", "line 1: two columns with the same name"),
        ("question,is_impossible\nq?,perhaps\n", "line 2: `is_impossible` is 'perhaps'"),
        ("question,answer\nq?,\"['a', nan]\"\n", None),
        ("q?\t['Lyon' 'Paris']\n", "line 1: the second column holds strings without a comma"),
        ("Question,Answer\nq?,a\n", "did you mean `question`"),
        ("1\tq?\n2\tr?\tx\n", "line 2: not two columns"),
        ("qid\tquery\n1\twho?\n", "missing question among the keys 'qid', 'query'"),
        ("questions\tanswers\nwho is?\t['a']\n", "line 2: not two columns, an id and a question; .*has `question`"),
        ("301 0 d1 1\n302 0 d2 1\n", "line 1: 1 tab-separated columns"),
    ],
)
def test_a_bad_cell_is_refused(content: str, message: str | None, tmp_path: Path) -> None:
    file = put(tmp_path / "q.csv", content)
    if message is None:  # not a list: the cell is the answer
        assert read_questions(file)[0].answers == ("['a', nan]",)
        return
    with pytest.raises(InputError, match=message):
        read_questions(file)


def test_lists_whose_strings_hold_quotes_side_by_side_are_not_taken_for_numpys_print(tmp_path: Path) -> None:
    answers = ["it's 'a' 'b'", 'say "x" "y"', "c"]
    for cell in (repr(answers), json.dumps(answers)):
        with (tmp_path / "q.csv").open("w", newline="") as file:
            csv.writer(file, delimiter="\t").writerow(("q?", cell))
        assert list(read_questions(tmp_path / "q.csv")[0].answers) == answers


def test_pyserinis_topics_are_an_id_and_a_question_in_which_quotes_are_ordinary_characters(tmp_path: Path) -> None:
    file = put(tmp_path / "topics.tsv", '301\twho "is" it\n302\t"half\n')
    assert read_questions(file) == [Question("301", 'who "is" it'), Question("302", '"half')]


def test_parquet_as_pandas_writes_it_reads_nan_as_missing_and_ignores_other_columns(tmp_path: Path) -> None:
    frame = pd.DataFrame(
        {
            "id": [1, 2],
            "question": ["a?", "b?"],
            "answers": [np.array(["x", "y"], dtype=object), None],
            "type": [np.nan, "t"],
            "embedding": [np.zeros(3)] * 2,
            "stamp": pd.to_datetime(["2020-01-01", None]),
        }
    )
    frame.to_parquet(tmp_path / "q.parquet")
    assert read_questions(tmp_path / "q.parquet") == [Question("1", "a?", ("x", "y")), Question("2", "b?", type="t")]


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"question": ["a?"], "answers": [[1, 2]]}, "row 1: wrong type: answers is int"),
        ({"question": ["a?"], "answer": [True]}, "row 1: `answers` is bool"),
        ({"question": ["a?"], "id": [1.5]}, "row 1: wrong type: id is float"),
        ({"question": ["a?", None]}, "row 2: missing question"),
        ({"text": ["a?"]}, "row 1: missing question among the keys 'text'"),
        ({"words": ["a?"]}, "no column that a question is read from; found words"),
        ({"question": pa.array([b"\xff\xfe"]).cast(pa.binary())}, "row 1: undecodable"),
        ({"Question": ["a?"], "answers": [["x"]]}, "did you mean `question`"),
    ],
)
def test_a_bad_row_of_parquet_is_refused(columns: dict[str, Any], message: str, tmp_path: Path) -> None:
    pq.write_table(pa.table(columns), tmp_path / "q.parquet")
    with pytest.raises(InputError, match=message):
        read_questions(tmp_path / "q.parquet")


def test_a_string_of_parquet_that_is_not_utf_8_is_refused_by_its_row(tmp_path: Path) -> None:
    column = pa.Array.from_buffers(
        pa.string(), 2, [None, pa.py_buffer(np.array([0, 2, 4], np.int32)), pa.py_buffer(b"ok\xff\xfe")]
    )
    pq.write_table(pa.table({"question": column}), tmp_path / "q.parquet")
    with pytest.raises(InputError, match="row 2: undecodable: question is not UTF-8"):
        read_questions(tmp_path / "q.parquet")


def test_only_a_few_parquet_rows_with_a_hundred_passages_each_are_in_memory_at_a_time(tmp_path: Path) -> None:
    hard = [{"title": "t", "text": "x" * 700, "passage_id": str(n)} for n in range(100)]
    columns = {"question": ["q?"] * 600, "answers": [["a"]] * 600, "positive_ctxs": [hard] * 600}
    pq.write_table(pa.table(columns), tmp_path / "q.parquet")
    tracemalloc.start()
    try:
        assert len(read_questions(tmp_path / "q.parquet")) == 600
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 15e6, f"{peak:,} bytes; a record takes 0.1 MB"


def test_cut_gzip_and_gzipped_parquet_are_refused(tmp_path: Path) -> None:
    lines = "".join(f'{{"question": "q{n}"}}\n' for n in range(2000))
    cells = "".join(f"q{n}?\t['a']\n" for n in range(2000))
    for name, content in (("q.jsonl.gz", lines), ("q.json.gz", lines), ("q.csv.gz", cells)):
        whole = gzip.compress(content.encode())
        assert len(read_questions(put(tmp_path / name, whole))) == 2000
        with pytest.raises(InputError, match="cut or damaged gzip"):
            read_questions(put(tmp_path / name, whole[:-9]))
    pq.write_table(pa.table({"question": ["q?"]}), buffer := io.BytesIO())
    with pytest.raises(InputError, match=r"of no known format: it starts with 'P'|undecodable"):
        read_questions(put(tmp_path / "q.parquet.gz", gzip.compress(buffer.getvalue())))


def least_seconds(call: Callable[[], object]) -> float:
    """Processor seconds of this thread: the least of three calls, without the garbage of earlier tests."""
    seconds = []
    gc.collect()
    gc.disable()
    try:
        for _ in range(3):
            began = time.thread_time()
            call()
            seconds.append(time.thread_time() - began)
    finally:
        gc.enable()
    return min(seconds)


def test_many_small_records_are_read_in_linear_time(tmp_path: Path) -> None:
    record = {"question": "who is it?", "golden_answers": ["a", "b"], "metadata": {"x": 1}, "anything": "else"}
    fewer, more = (put(tmp_path / f"{count}.json", json.dumps([record] * count)) for count in (5_000, 20_000))
    assert (len(read_questions(fewer)), len(read_questions(more))) == (5_000, 20_000)
    # Four times the records take 4 times as long if time is linear, 16 times if it is quadratic.
    assert least_seconds(lambda: read_questions(more)) < 10 * least_seconds(lambda: read_questions(fewer))
