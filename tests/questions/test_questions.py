"""Questions: every known format gives the same questions, and nothing is silently left out or guessed."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import pytest

from rag_core.corpus.corpus import Corpus, CorpusConfig, write_corpus
from rag_core.corpus.passages import Passage
from rag_core.errors import InputError
from rag_core.questions.questions import Question, read_questions, write_questions

XQUAD = Path(__file__).resolve().parents[3] / "shared/data/xquad.en.json"


def put(path: Path, content: str | bytes) -> Path:
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def squad(*qas: Any) -> str:
    return json.dumps({"data": [{"title": "A", "paragraphs": [{"context": "c", "qas": list(qas)}]}]})


def test_json_lines_reads_every_field(tmp_path: Path) -> None:
    line = {"id": 5, "question": "q?", "answers": ["a", "b"], "type": "2hop", "gold_passage_ids": ["p", 7], "more": 1}
    file = put(tmp_path / "q.jsonl", "\ufeff" + json.dumps(line) + "\r\n\n")
    assert read_questions(file) == [Question("5", "q?", ("a", "b"), "2hop", ("p", "7"))]


def test_nq_open_answers_may_be_a_string_or_a_list(tmp_path: Path) -> None:
    file = put(tmp_path / "q.jsonl", '{"question": "1?", "answer": ["a", "b"]}\n{"question": "2?", "answer": "c"}\n')
    assert [question.answers for question in read_questions(file)] == [("a", "b"), ("c",)]


def test_a_question_without_id_gets_its_line_even_if_another_question_has_that_number_as_id(tmp_path: Path) -> None:
    file = put(tmp_path / "q.jsonl", '{"id": "2", "question": "1?"}\n{"question": "2?"}\n\n{"question": "4?"}\n')
    assert [(q.id, q.question) for q in read_questions(file)] == [("2", "1?"), ("line-2", "2?"), ("4", "4?")]


def test_dpr_csv_reads_what_dpr_wrote(tmp_path: Path) -> None:
    answers = [["Linda Davis"], ["it's", 'the "X"'], ["a\tb", "ü"], []]
    with (tmp_path / "q.csv").open("w", newline="", encoding="utf-8") as file:
        csv.writer(file, delimiter="\t").writerows((f'who "{n}"', repr(a)) for n, a in enumerate(answers))
    questions = read_questions(tmp_path / "q.csv")
    assert [(q.question, list(q.answers)) for q in questions] == [(f'who "{n}"', a) for n, a in enumerate(answers)]
    assert [question.id for question in questions] == ["1", "2", "3", "4"]


def test_dpr_csv_takes_a_json_list_and_runs_no_code(tmp_path: Path) -> None:
    assert read_questions(put(tmp_path / "q.csv", 'q\t["a\\/b", "\\ud83d\\ude00"]\n'))[0].answers == ("a/b", "😀")
    mark = tmp_path / "mark"
    with pytest.raises(InputError, match="second column is not a list"):
        read_questions(put(tmp_path / "q.csv", f"q\t[open('{mark}', 'w').name]\n"))
    assert not mark.exists()


def test_squad_answers_are_distinct_and_the_gold_passage_is_the_paragraph(tmp_path: Path) -> None:
    qa = {"id": "1", "question": "q?", "answers": [{"text": "x"}, {"text": "y"}, {"text": "x"}]}
    unanswerable = {"id": "2", "question": "r?", "answers": [], "is_impossible": True}
    file = put(tmp_path / "dev.json", squad(qa, unanswerable))
    assert read_questions(file) == [
        Question("1", "q?", ("x", "y"), None, ("A#0",)),
        Question("2", "r?", (), None, ("A#0",), is_impossible=True),
    ]


def test_every_squad_gold_passage_is_in_the_corpus_and_holds_the_answer(tmp_path: Path) -> None:
    if not XQUAD.is_file():
        pytest.skip(f"the shared test data is absent: {XQUAD}")
    write_corpus([XQUAD], tmp_path / "corpus", CorpusConfig(format="squad"))
    texts = {passage.id: passage.text for passage in Corpus.open(tmp_path / "corpus").iter_passages()}
    questions = read_questions(XQUAD)
    assert len(questions) == 1190
    for question in questions:
        assert all(answer in texts[question.gold_passage_ids[0]] for answer in question.answers)


CTXS = [{"id": "p", "title": "T", "text": "t", "score": "81.5"}, {"id": 2, "text": "u", "score": -1}]


@pytest.mark.parametrize("form", ["list", "lines", "one object"])
def test_given_contexts_are_read_with_their_scores_from_a_list_or_lines(tmp_path: Path, form: str) -> None:
    record = json.dumps({"id": "1", "question": "q?", "answers": ["a"], "ctxs": CTXS})
    second = record.replace('"id": "1"', '"id": "2"')
    content = {"list": f"[{record}, {second}]", "lines": f"{record}\n{second}\n", "one object": record}[form]
    questions = read_questions(put(tmp_path / "q.json", content))
    assert [question.id for question in questions] == ["1", "2"][: len(questions)]
    assert len(questions) == (1 if form == "one object" else 2)
    assert questions[0].contexts == (Passage("p", "T", "t"), Passage("2", "", "u"))
    assert questions[0].context_scores == (81.5, -1.0)


def test_contexts_without_scores_have_none(tmp_path: Path) -> None:
    file = put(tmp_path / "q.jsonl", json.dumps({"question": "q", "ctxs": [{"id": "p", "title": "", "text": "t"}]}))
    assert read_questions(file)[0].contexts == (Passage("p", "", "t"),)
    assert read_questions(file)[0].context_scores is None


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "broken JSON"),
        ('"q"', "a str; expected an object"),
        ("{}", "missing question"),
        ('{"question": " "}', "empty question"),
        ('{"question": ["q"]}', "wrong type: question is list"),
        ('{"question": "nul \\u0000"}', "NUL character"),
        ('{"question": "half \\ud800"}', "undecodable"),
        ('{"question": "q", "answers": "a"}', "`answers` is str"),
        ('{"question": "q", "answers": ["a", 1999]}', "wrong type: answers is int"),
        ('{"question": "q", "answers": [""]}', "empty answers"),
        ('{"question": "q", "answers": ["a"], "answer": "b"}', "both `answers` and `answer`"),
        ('{"question": "q", "id": 1.5}', "wrong type: id is float"),
        ('{"question": "q", "id": ""}', "empty id"),
        ('{"question": "q", "type": 3}', "wrong type: type is int"),
        ('{"question": "q", "gold_passage_ids": "p"}', "`gold_passage_ids` is str"),
        ('{"question": "q", "gold_passage_ids": [null]}', "missing gold_passage_ids"),
        ('{"question": "q", "ctxs": []}', "`ctxs` is not a list of objects, or is empty"),
        ('{"question": "q", "ctxs": [{"title": "T", "text": "t"}]}', "missing ctxs id"),
        ('{"question": "q", "ctxs": [{"id": "p", "text": ""}]}', "empty ctxs text"),
        ('{"question": "q", "ctxs": [{"id": "p", "text": "t", "score": NaN}]}', "ctxs score nan"),
        ('{"question": "q", "ctxs": [{"id": "p", "text": "t", "score": "high"}]}', "ctxs score 'high'"),
        (
            '{"question": "q", "ctxs": [{"id": "p", "text": "t", "score": 1}, {"id": "r", "text": "t"}]}',
            "1 of 2 ctxs have a score",
        ),
    ],
)
def test_a_bad_line_stops_the_reading_with_file_line_and_what_was_found(
    tmp_path: Path, line: str, message: str
) -> None:
    file = put(tmp_path / "q.jsonl", '{"question": "good"}\n' + line + "\n")
    with pytest.raises(InputError) as caught:
        read_questions(file)
    assert str(caught.value).startswith(f"{file} line 2: ")
    assert message in str(caught.value)
    assert "Found" in str(caught.value)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ("only a question", "1 tab-separated columns"),
        ("q,['a']", "1 tab-separated columns"),
        ("q\t['a']\tx", "3 tab-separated columns"),
        ("q\tParis", "second column is not a list"),
        ("q\t['a', 3]", "wrong type: answers is int"),
        ("\t['a']", "empty question"),
        ("\"open\t['a']", "broken row"),
        ('"shut" early\t[]', "broken row"),
    ],
)
def test_a_bad_dpr_csv_row_stops_the_reading_with_its_line(tmp_path: Path, row: str, message: str) -> None:
    file = put(tmp_path / "q.csv", f"good\t['a']\n{row}\nnext\t['b']\n")
    with pytest.raises(InputError, match=r"q\.csv line 2: ") as caught:
        read_questions(file)
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("qa", "message"),
    [
        ("q", "a str; expected an object"),
        ({"id": "1"}, "missing question"),
        ({"answers": {"text": []}}, "not an object"),
    ],
)
def test_a_bad_squad_question_is_named_by_its_paragraph(tmp_path: Path, qa: Any, message: str) -> None:
    with pytest.raises(InputError, match=rf"q\.json paragraph 'A#0' question 2: {message}"):
        read_questions(put(tmp_path / "q.json", squad({"id": "0", "question": "q"}, qa)))


@pytest.mark.parametrize("name", ["q.jsonl", "q.json"])
def test_duplicate_ids_are_refused_naming_both_places(tmp_path: Path, name: str) -> None:
    file = put(tmp_path / name, '{"id": "7", "question": "a"}\n{"question": "b"}\n{"id": 7, "question": "c"}\n')
    with pytest.raises(InputError, match=rf"{name} line 3: the id '7' was already used at .*{name} line 1"):
        read_questions(file)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("q.jsonl", "", "is empty or holds no question"),
        ("q.csv", "\n \n", "is empty or holds no question"),
        ("q.json", "[]", "is empty or holds no question"),
        ("q.json", '{"data": []}', "is empty or holds no question"),
        ("q.json", '{"rows": []}', "record 1: missing question among the keys 'rows'"),
        ("q.json", '[{"question": "q"},\n{', "line 2: broken JSON"),
        ("q.txt", "who is it?\n", "is of no known format"),
        ("q.jsonl", b'{"question": "q"}\n{"question": "caf\xe9"}\n', "line 2: undecodable"),
    ],
)
def test_an_unusable_file_is_refused_by_name(tmp_path: Path, name: str, content: str | bytes, message: str) -> None:
    with pytest.raises(InputError, match=rf"{name} {message}"):
        read_questions(put(tmp_path / name, content))


def test_a_missing_file_and_a_folder_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"nowhere\.jsonl cannot be read: it does not exist"):
        read_questions(tmp_path / "nowhere.jsonl")
    with pytest.raises(InputError, match="it is a folder"):
        read_questions(tmp_path)


QUESTIONS = [
    Question(
        "a", "q ü\u2028?", ("x", "y"), "t", ("p",), (Passage("p", "T", "t\n"), Passage("r", "", "u")), (0.1, -3e-17)
    ),
    Question("2", "plain"),
    Question("c", "no scores", contexts=(Passage("p", "T", "t"),)),
]


def test_written_questions_read_back_equal(tmp_path: Path) -> None:
    write_questions(QUESTIONS, tmp_path / "new" / "q.jsonl")
    assert read_questions(tmp_path / "new" / "q.jsonl") == QUESTIONS
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["q.jsonl"]


def test_a_failed_write_leaves_the_older_file_and_nothing_else(tmp_path: Path) -> None:
    file = tmp_path / "q.jsonl"
    write_questions(QUESTIONS, file)
    broken = Question("x", "q", contexts=(Passage("p", "", "t"),), context_scores=(1.0, 2.0))
    with pytest.raises(ValueError, match="zip"):
        write_questions([QUESTIONS[0], broken], file)
    assert read_questions(file) == QUESTIONS
    assert list(tmp_path.iterdir()) == [file]


def test_a_file_is_replaced_whole_so_a_reader_of_the_older_file_is_not_disturbed(tmp_path: Path) -> None:
    file = tmp_path / "q.jsonl"
    write_questions(QUESTIONS, file)
    before = file.read_text(encoding="utf-8")
    with file.open(encoding="utf-8") as reader:
        write_questions(QUESTIONS[1:2], file)
        assert reader.read() == before
    assert read_questions(file) == QUESTIONS[1:2]
