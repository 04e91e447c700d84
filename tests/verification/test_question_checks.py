"""Commands check question files before they start work; misspelt keys are named."""

from __future__ import annotations

import gc
import json
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from flows.cli.main import run
from rag_core.errors import ConfigError, InputError
from rag_core.questions.formats.near_keys import FIELDS, intended_key
from rag_core.questions.formats.patterns import pattern_fault
from rag_core.questions.questions import (
    Question,
    as_answers_are,
    files_of_questions,
    read_question_file,
    read_questions,
    write_questions,
)
from rag_core.verification.question_checks import check_answers, check_retrieval, trainable
from tests.support.small_corpus import make_encoder, make_index

Row = dict[str, Any]


def put(path: Path, *rows: Row) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.mark.parametrize(
    ("key", "right"),
    [
        ("golden_answer", "golden_answers"),
        ("Question", "question"),
        ("answer_s", "answers"),
        ("anwsers", "answers"),
        ("goldenAnswers", "golden_answers"),
        ("ANSWER", "answer"),
        ("quesiton", "question"),
        ("gold_passage_id", "gold_passage_ids"),
        ("ID", "id"),
        ("is_imposible", "is_impossible"),
        ("CTXS", "ctxs"),
    ],
)
def test_a_misspelt_key_is_named_with_the_right_one(key: str, right: str, tmp_path: Path) -> None:
    row = {"id": "1", "question": "who?", "answers": ["a"], key: "a"}
    row.pop({"answers": "answers", "question": "question", "id": "id"}.get(FIELDS[right], ""), None)
    file = put(tmp_path / "q.jsonl", row)
    with pytest.raises(InputError) as caught:
        read_questions(file)
    assert str(caught.value).startswith(f"{file} line 1: `{key}` is not a key of a question; did you mean `{right}`?")


@pytest.mark.parametrize(
    "key",
    ["question_id", "answer_id", "answer_type", "qid", "title", "context", "contexts", "level", "subtype", "typed", "ids",
     "metadata", "answer_start", "answered", "question_type", "Frage", "质问", "", "meta"],
)  # fmt: skip
def test_unrelated_keys_are_ignored(key: str, tmp_path: Path) -> None:
    file = put(tmp_path / "q.jsonl", {"id": "1", "question": "who?", "answers": ["a"], key: "x"})
    assert read_questions(file) == [Question("1", "who?", ("a",))]
    # Also if the key it resembles is missing, as in a file for inference.
    assert read_questions(put(tmp_path / "bare.jsonl", {"question": "who?", key: "x"})) == [Question("1", "who?")]


def test_a_misspelt_key_is_ignored_if_the_question_has_the_right_one(tmp_path: Path) -> None:
    file = put(
        tmp_path / "q.jsonl", {"id": "1", "question": "who?", "answers": ["a"], "golden_answer": "b", "Question": 1}
    )
    assert read_questions(file)[0].answers == ("a",)
    assert all(intended_key(key) is None for key in FIELDS)


GOLD = {"gold_passage_ids": ["p"]}
FINE = {"question": "fine?", "answers": ["a"], **GOLD}


def test_a_question_without_answers_is_named_with_its_line_and_the_number_of_such_questions(tmp_path: Path) -> None:
    file = put(
        tmp_path / "q.jsonl", FINE, {"id": "x", "question": "who?", "correct": "a", **GOLD}, {"question": "what?"}
    )
    read = read_question_file(file)
    with pytest.raises(InputError) as caught:
        check_answers(read)
    assert str(caught.value).startswith(
        f"{file} line 2: question 'x' has no answer, so it cannot be evaluated (2 of 3 questions have none). Keys that "
        "were not read: correct."
    )
    with pytest.raises(InputError, match="cannot be trained on"):
        trainable(read)
    with pytest.raises(InputError, match=r"line 3: .* no answer and no gold passage.* \(1 of 3"):
        check_retrieval(read)


def test_a_complete_file_passes_the_checks(tmp_path: Path) -> None:
    unanswerable = {"id": "u", "question": "who?", "is_impossible": True}
    read = read_question_file(put(tmp_path / "q.jsonl", FINE, unanswerable))
    check_answers(read)
    check_retrieval(read)
    assert [question.question for question in trainable(read)] == ["fine?"]
    check_retrieval(read_question_file(put(tmp_path / "gold.jsonl", {"question": "who?", **GOLD})))
    with pytest.raises(InputError, match="nothing to learn"):
        trainable(read_question_file(put(tmp_path / "u.jsonl", unanswerable)))


def test_regular_expressions_are_evaluated_and_not_learnt(tmp_path: Path) -> None:
    row = {"question": "when?", "answers": [r"19\d\d", "the (19)?60s"]}
    file = put(tmp_path / "q.jsonl", row, row | {"answers_are": "text"})
    read = read_question_file(file, answers_are="regex")
    assert [question.answers_are for question in read.questions] == ["regex", "text"]
    check_answers(read)
    with pytest.raises(InputError, match=r"line 1: the answers of question '1' are regular expressions"):
        trainable(read)
    write_questions(read.questions, tmp_path / "again.jsonl")
    assert read_questions(tmp_path / "again.jsonl") == read.questions


def test_curated_trec_is_read_as_dpr_and_drqa_write_it(tmp_path: Path) -> None:
    patterns = (r"France|French\s?Republic",)
    for name, content in (
        ("dpr.csv", "which country?\t['France|French\\\\s?Republic']\n"),
        ("raw.tsv", "which country?\tFrance|French\\s?Republic\n"),
        ("header.csv", "question,answers\nwhich country?,France|French\\s?Republic\n"),
        ("drqa.jsonl", json.dumps({"question": "which country?", "answer": list(patterns)})),
    ):
        (tmp_path / name).write_text(content)
        (question,) = read_questions(tmp_path / name, answers_are="regex")
        assert (question.answers, question.answers_are) == (patterns, "regex")


@pytest.mark.parametrize(
    ("pattern", "fault"),
    [
        ("(", "missing )"),
        ("*a", "nothing to repeat"),
        ("(" * 3000 + ")" * 3000, "recursion"),
        ("((a{1000}){1000}){1000}", "written out"),
        ("(?:(?:(?:x?){999}){999}){999}", "written out"),
        ("(((ab){0,99}){99}){99}", "written out"),
        ("a{999999999999}", "written out"),
        ("(?#[)((a{1000}){1000}){1000}", "written out"),
        ("a" * 20_000, "20000 characters"),
        ("[" * 9_999, ""),
    ],
)
def test_a_pattern_that_does_not_compile_or_would_take_gigabytes_is_refused_by_its_line(
    pattern: str, fault: str, tmp_path: Path
) -> None:
    file = put(tmp_path / "q.jsonl", {"question": "q?", "answers": ["fine"]}, {"question": "q?", "answers": [pattern]})
    gc.collect()  # otherwise garbage of earlier tests may be finalised, and fail, at the deepest point of the recursion
    began = time.thread_time()
    with pytest.raises(InputError, match=r"line 2: the answer .* cannot be used as a regular expression: ") as caught:
        read_questions(file, answers_are="regex")
    assert fault in str(caught.value)
    assert time.thread_time() - began < 2


@pytest.mark.parametrize(
    "pattern",
    [
        r"\d{4}-\d{2}-\d{2}",
        r"(19|20)\d{2}",
        r"[{(]x{3}[)}]",
        r"\(a\){2}",
        "a|" * 500 + "b",
        r"(\d{1,3},)*\d{3}",
        "{}",
        "x{,5}",
    ],
)
def test_ordinary_patterns_are_accepted(pattern: str) -> None:
    assert pattern_fault(pattern) is None


def test_answers_are_accepts_only_text_and_regex() -> None:
    assert (as_answers_are(None), as_answers_are("regex")) == (None, "regex")
    with pytest.raises(ConfigError, match="'regexp'; known are text and regex"):
        as_answers_are("regexp")


QUERIES = [{"_id": f"q{n}", "text": f"what is {n}?", "metadata": {}} for n in range(4)]


def beir(folder: Path, judgements: str, queries: list[Row] | None = None) -> Path:
    put(folder / "queries.jsonl", *(QUERIES if queries is None else queries))
    (folder / "qrels").mkdir(exist_ok=True)
    (folder / "qrels/test.tsv").write_text("query-id\tcorpus-id\tscore\n" + judgements)
    return folder / "qrels/test.tsv"


def test_a_split_of_beir_is_named_by_its_judgements_and_scores_of_0_are_no_gold(tmp_path: Path) -> None:
    file = beir(tmp_path, "q2\td5\t1\nq0\td1\t2\nq0\td2\t0\nq0\t7\t1\nq0\td1\t1\nq3\td1\t0\nq3\td2\t-1\n")
    read = read_question_file(file)
    assert read.layout == "BEIR's qrels"
    assert read.questions == [
        Question("q0", "what is 0?", gold_passage_ids=("d1", "7")),
        Question("q2", "what is 2?", gold_passage_ids=("d5",)),
    ]
    check_retrieval(read)
    with pytest.raises(InputError, match="has no answer"):
        check_answers(read)
    assert files_of_questions(file) == [file, tmp_path / "queries.jsonl"]
    assert files_of_questions(tmp_path / "queries.jsonl") == [tmp_path / "queries.jsonl"]


def test_the_queries_alone_have_no_gold_passage_and_the_message_names_the_judgements(tmp_path: Path) -> None:
    beir(tmp_path, "q0\td1\t1\n")
    read = read_question_file(tmp_path / "queries.jsonl")
    assert len(read.questions) == 4
    with pytest.raises(InputError, match=r"Name the split's judgements \(qrels/test\.tsv"):
        check_retrieval(read)
    with pytest.raises(InputError, match=r"has no answer.*\. Add `answers`\.$"):
        check_answers(read)


@pytest.mark.parametrize(
    ("judgements", "message"),
    [
        ("q0\td1\thigh\n", r"test\.tsv line 2: `score` is 'high'"),
        ("q0\t\t1\n", r"test\.tsv line 2: missing corpus-id"),
        ("q9\td1\t1\n", r"test\.tsv line 2: the query 'q9' is not in .*queries\.jsonl \(1 of 1 are not\)"),
        ("q0\td1\t0\n", r"test\.tsv names no relevant passage"),
        ("", r"test\.tsv is empty or holds no question"),
    ],
)
def test_bad_judgements_are_refused(judgements: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=message):
        read_questions(beir(tmp_path, judgements))


def test_judgements_without_queries_are_refused_with_the_searched_folders(tmp_path: Path) -> None:
    file = beir(tmp_path, "q0\td1\t1\n")
    (tmp_path / "queries.jsonl").unlink()
    with pytest.raises(InputError, match=rf"there is no queries\.jsonl in {tmp_path} or {tmp_path}/qrels"):
        read_questions(file)
    assert files_of_questions(file) == [file]


@pytest.fixture(scope="module")
def index(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("index")
    make_index(folder, make_encoder(folder / "encoder"))
    return folder / "index"


def command(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *arguments: object
) -> tuple[int, str, str]:
    monkeypatch.setattr(sys, "argv", ["rag", *map(str, arguments)])
    with pytest.raises(SystemExit) as ended:
        run()
    output = capsys.readouterr()
    return int(ended.value.code or 0), output.out, output.err


def test_retrieve_refuses_a_file_without_answers_and_never_prints_a_table(
    index: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    file = put(tmp_path / "q.jsonl", {"question": "which country is Lyon in?"})
    code, out, error = command(monkeypatch, capsys, "retrieve", "--index", index, "--questions", file, "--k", 1)
    assert (code, out) == (2, "")
    assert "question '1' has no answer and no gold passage" in " ".join(error.split())


def test_retrieve_scores_a_split_of_beir_by_its_judgements(
    index: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    file = beir(tmp_path, "q0\tlyon:country\t1\n", [{"_id": "q0", "text": "Lyon is a city in France."}])
    code, out, error = command(
        monkeypatch, capsys, "retrieve", "--index", index, "--questions", file, "--k", 1, "--json"
    )
    assert code == 0, error
    assert json.loads(out)["recall@1"] == 1.0
    assert "gold passages are not in the index" not in error


def test_retrieve_says_which_gold_passages_the_index_does_not_have(
    index: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    file = beir(tmp_path, "q0\tlyon:country\t1\nq0\tMED-10\t1\n", [{"_id": "q0", "text": "Lyon is a city in France."}])
    code, out, error = command(
        monkeypatch, capsys, "retrieve", "--index", index, "--questions", file, "--k", 1, "--json"
    )
    assert code == 0, error
    assert "1 of 2 gold passages are not in the index (such as 'MED-10')" in " ".join(error.split())
    assert json.loads(out)["count"] == 1


def test_an_unknown_kind_of_answers_is_refused(
    index: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    file = put(tmp_path / "q.jsonl", FINE)
    arguments = ("retrieve", "--index", index, "--questions", file, "--answers-are", "regexp")
    code, _, error = command(monkeypatch, capsys, *arguments)
    assert code == 2
    assert "'regexp'" in error
