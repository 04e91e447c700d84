"""Each data set's layout gives the same questions in every container, with the gold passage ids of the corpus."""

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
import pytest

from rag_core.corpus.formats.squad import context_id, read_articles
from rag_core.errors import InputError
from rag_core.questions.questions import Question, read_question_file, read_questions

Row = dict[str, Any]
RIVER = "The river of Cork is the Lee."


def nq_row(**changes: Any) -> Row:
    text = "<P> The river of <B> Cork </B> is the Lee . </P>"
    answer = {"start_token": 8, "end_token": 10}
    annotations = [
        {"short_answers": [answer], "yes_no_answer": "NONE"},
        {"short_answers": [], "yes_no_answer": "YES"},
    ]
    return {"example_id": 7, "question_text": "q?", "document_text": text, "annotations": annotations, **changes}


def nq_full_row() -> Row:
    row = nq_row()
    tokens = [
        {"token": token, "html_token": token.startswith("<"), "start_byte": 0}
        for token in row.pop("document_text").split()
    ]
    return {**row, "document_tokens": tokens}


KILT = {
    "id": "k1",
    "input": "q?",
    "output": [
        {
            "answer": "Lee",
            "provenance": [
                {"wikipedia_id": "11", "title": "Cork", "start_paragraph_id": 3, "end_paragraph_id": 4},
                {"wikipedia_id": "12", "start_paragraph_id": 0, "end_paragraph_id": 0},
            ],
        },
        {"answer": "river Lee", "provenance": [{"wikipedia_id": "11", "start_paragraph_id": 3, "end_paragraph_id": 3}]},
        {"answer": "Lee"},
        {"provenance": [{"wikipedia_id": "13", "title": "named by its page alone"}]},
    ],
    "meta": {"left_context": "x"},
}
DPR = {
    "dataset": "d",
    "question": "q?",
    "answers": ["Lee"],
    "positive_ctxs": [
        {"title": "Cork", "text": RIVER, "passage_id": "41"},
        {"title": "Lee", "text": "t", "psg_id": 42},
        {"title": "Cork", "text": RIVER, "passage_id": "41"},
        {"title": "none", "text": "without an id"},
    ],
    "hard_negative_ctxs": [{"title": "x", "text": "y", "passage_id": "99"}],
}
FLASH = {"id": "test_0", "question": "q?", "golden_answers": ["Lee", "river Lee"], "metadata": {"type": "x"}}
HF_SQUAD = {
    "id": "s1",
    "title": "Cork",
    "context": RIVER,
    "question": "q?",
    "answers": {"text": ["Lee", "Lee", "the Lee"], "answer_start": [25, 25, 21]},
}
SQUAD_ROWS = HF_SQUAD | {"answers": [{"text": text, "answer_start": 25} for text in ("Lee", "Lee", "the Lee")]}
TRIVIA = {
    "Question": "q?",
    "QuestionId": "tc_1",
    "QuestionSource": "x",
    "Answer": {
        "Value": "Lee",
        "Aliases": ["Lee", "River Lee", " "],
        "NormalizedAliases": ["lee", "river lee"],
        "HumanAnswers": ["the Lee"],
    },
}
HF_TRIVIA = {
    "question": "q?",
    "question_id": "tc_1",
    "entity_pages": {"title": ["x"]},
    "answer": {"value": "Lee", "aliases": ["Lee", "River Lee"], "normalized_aliases": ["lee"]},
}
HOTPOT = {
    "_id": "h1",
    "question": "q?",
    "answer": "Lee",
    "type": "bridge",
    "level": "hard",
    "supporting_facts": [["Cork", 0], ["Lee (river)", 2], ["Cork", 1]],
    "context": [["Cork", [RIVER]]],
}
HF_HOTPOT = {
    "id": "h1",
    "question": "q?",
    "answer": "Lee",
    "type": "bridge",
    "supporting_facts": {"title": ["Cork", "Lee (river)", "Cork"], "sent_id": [0, 2, 1]},
    "context": {"title": ["Cork"], "sentences": [[RIVER]]},
}
HF_NQ = {
    "id": "7",
    "question": {"text": "q?", "tokens": ["q", "?"]},
    "annotations": {
        "id": ["a", "b", "c"],
        "short_answers": [
            {"start_token": [8], "end_token": [10], "text": ["the Lee"]},
            {"start_token": [], "end_token": [], "text": []},
            {"start_token": [], "end_token": [], "text": []},
        ],
        "yes_no_answer": [-1, 1, -1],
    },
}
TITLES = ("Cork", "Lee (river)")
# Hugging Face's copy of KILT writes this for an output without provenance.
NOWHERE = {"wikipedia_id": "", "start_paragraph_id": -1, "end_paragraph_id": -1}
# The layout's name, a row of it, and the expected question.
CASES: dict[str, tuple[str, Row, Question]] = {
    "FlashRAG": ("FlashRAG", FLASH, Question("test_0", "q?", ("Lee", "river Lee"))),
    "KILT": ("KILT", KILT, Question("k1", "q?", ("Lee", "river Lee"), None, ("11:3", "11:4", "12:0"))),
    "KILT (Hugging Face)": (
        "KILT",
        KILT | {"output": [*KILT["output"], {"answer": "", "provenance": [NOWHERE]}]},
        Question("k1", "q?", ("Lee", "river Lee"), None, ("11:3", "11:4", "12:0")),
    ),
    "DPR's training": ("DPR's training", DPR | {"id": "1"}, Question("1", "q?", ("Lee",), None, ("41", "42"))),
    "SQuAD (Hugging Face)": (
        "SQuAD (Hugging Face)",
        HF_SQUAD,
        Question("s1", "q?", ("Lee", "the Lee"), None, (context_id("Cork", RIVER),)),
    ),
    "SQuAD, flat": (
        "SQuAD (Hugging Face)",
        SQUAD_ROWS,
        Question("s1", "q?", ("Lee", "the Lee"), None, (context_id("Cork", RIVER),)),
    ),
    "PopQA, as text": (
        "PopQA",
        {"id": 3, "question": "q?", "possible_answers": '["Lee", "the Lee"]'},
        Question("3", "q?", ("Lee", "the Lee")),
    ),
    "TriviaQA": ("TriviaQA", TRIVIA, Question("tc_1", "q?", ("Lee", "River Lee", "the Lee"))),
    "TriviaQA (Hugging Face)": ("TriviaQA (Hugging Face)", HF_TRIVIA, Question("tc_1", "q?", ("Lee", "River Lee"))),
    "HotpotQA": ("HotpotQA", HOTPOT, Question("h1", "q?", ("Lee",), "bridge", TITLES)),
    "HotpotQA (Hugging Face)": ("HotpotQA", HF_HOTPOT, Question("h1", "q?", ("Lee",), "bridge", TITLES)),
    "NQ, simplified": ("Natural Questions", nq_row(), Question("7", "q?", ("the Lee", "yes"))),
    "NQ, full": ("Natural Questions", nq_full_row(), Question("7", "q?", ("the Lee", "yes"))),
    "NQ (Hugging Face)": ("Natural Questions (Hugging Face)", HF_NQ, Question("7", "q?", ("the Lee", "yes"))),
    "BEIR": ("BEIR", {"_id": "q1", "text": "q?", "metadata": {"url": "u"}}, Question("q1", "q?")),
    "PopQA": (
        "PopQA",
        {"id": 3, "question": "q?", "possible_answers": ["Lee"], "obj": "x"},
        Question("3", "q?", ("Lee",)),
    ),
    "WebQuestions": (
        "WebQuestions",
        {
            "utterance": "q?",
            "targetValue": '(list (description "the \\"Lee\\"") (description Lee))',
            "url": "u",
            "id": 1,
        },
        Question("1", "q?", ('the "Lee"', "Lee")),
    ),
}


def as_lines(rows: list[Row]) -> bytes:
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


def as_parquet(rows: list[Row]) -> bytes:
    pq.write_table(pa.Table.from_pylist(rows), buffer := io.BytesIO())
    return buffer.getvalue()


def as_csv(rows: list[Row], delimiter: str = ",") -> bytes:
    writer = csv.DictWriter(file := io.StringIO(), list(rows[0]), delimiter=delimiter)
    writer.writeheader()
    writer.writerows(rows)
    return file.getvalue().encode()


CONTAINERS: dict[str, tuple[str, Callable[[list[Row]], bytes]]] = {
    "JSON Lines": ("q.jsonl", as_lines),
    "JSON Lines, other suffix": ("q.json", as_lines),
    "JSON Lines, gzip": ("q.jsonl.gz", lambda rows: gzip.compress(as_lines(rows))),
    "JSON list": ("q.json", lambda rows: json.dumps(rows).encode()),
    "JSON list, indented, gzip": ("q.json.gz", lambda rows: gzip.compress(json.dumps(rows, indent=1).encode())),
    "data set's object": ("q.json", lambda rows: json.dumps({"version": 1.1, "data": rows, "more": {"a": 1}}).encode()),
    "object with questions": (
        "q.json",
        lambda rows: json.dumps({"split": "dev", "questions": rows}).encode(),
    ),
    "TriviaQA's object": ("q.json", lambda rows: json.dumps({"Data": rows, "Domain": "Web"}).encode()),
    "Parquet": ("q.parquet", as_parquet),
    "Parquet, no suffix": ("q", as_parquet),
}


@pytest.mark.parametrize("container", CONTAINERS)
@pytest.mark.parametrize("case", CASES)
def test_a_layout_gives_the_same_question_in_every_container(case: str, container: str, tmp_path: Path) -> None:
    layout, row, question = CASES[case]
    name, write = CONTAINERS[container]
    if container.startswith("Parquet") and case == "HotpotQA":
        pytest.skip("Parquet has no lists of a string and a number; Hugging Face's form is the other case")
    (tmp_path / name).write_bytes(write([row]))
    file = read_question_file(tmp_path / name)
    assert file.questions == [question]
    assert file.layout == layout


@pytest.mark.parametrize("delimiter", [",", "\t", ";"])
@pytest.mark.parametrize("case", ["FlashRAG", "DPR's training", "HotpotQA", "HotpotQA (Hugging Face)", "PopQA", "KILT"])
def test_csv_with_a_header_has_the_keys_as_columns_and_lists_as_text(case: str, delimiter: str, tmp_path: Path) -> None:
    _, row, question = CASES[case]
    file = tmp_path / "q.csv.gz"
    file.write_bytes(gzip.compress(as_csv([row], delimiter)))  # lists as Python prints them
    assert read_questions(file) == [question]
    in_json = {key: json.dumps(value) if isinstance(value, list | dict) else value for key, value in row.items()}
    file.write_bytes(gzip.compress(as_csv([in_json], delimiter)))
    assert read_questions(file) == [question]


def test_a_file_may_mix_rows_of_several_layouts(tmp_path: Path) -> None:
    (tmp_path / "q.jsonl").write_bytes(as_lines([FLASH, HOTPOT, KILT]))
    file = read_question_file(tmp_path / "q.jsonl")
    assert [question.id for question in file.questions] == ["test_0", "h1", "k1"]
    assert set(file.layout.split(" and ")) == {"FlashRAG", "HotpotQA", "KILT"}


def test_two_wiki_with_supporting_facts_as_rows(tmp_path: Path) -> None:
    row = HOTPOT | {"supporting_facts": [{"title": "Cork", "sent_id": 0}], "evidences": [["a", "b", "c"]]}
    (tmp_path / "q.jsonl").write_bytes(as_lines([row]))
    assert read_questions(tmp_path / "q.jsonl")[0].gold_passage_ids == ("Cork",)


@pytest.mark.parametrize(
    "row",
    [
        KILT | {"output": []},
        {"id": "k1", "input": "q?"},
        TRIVIA | {"Answer": None},
        HF_TRIVIA | {"answer": {"value": "<unk>", "aliases": []}},
        {"example_id": 7, "question_text": "q?", "document_text": "x"},
        FLASH | {"golden_answers": None},
    ],
    ids=["KILT, empty", "KILT, none", "TriviaQA", "TriviaQA (Hugging Face)", "NQ", "FlashRAG"],
)
def test_a_test_set_with_hidden_answers_has_no_answers_and_is_not_unanswerable(row: Row, tmp_path: Path) -> None:
    (tmp_path / "q.jsonl").write_bytes(as_lines([row, {"question": "other?", "answer": "a"}]))
    question = read_questions(tmp_path / "q.jsonl")[0]
    assert question.answers == ()
    assert not question.is_impossible


def test_natural_questions_without_a_short_answer_are_unanswerable(tmp_path: Path) -> None:
    none = [{"short_answers": [], "yes_no_answer": "NONE"}]
    (tmp_path / "q.jsonl").write_bytes(as_lines([nq_row(annotations=none)]))
    assert read_questions(tmp_path / "q.jsonl")[0] == Question("7", "q?", is_impossible=True)


SQUAD_2 = {
    "data": [
        {
            "title": "Cork",
            "paragraphs": [
                {
                    "context": RIVER,
                    "qas": [
                        {"id": "1", "question": "a?", "answers": [{"text": "Lee", "answer_start": 25}], "is_impossible": False},
                        {"id": "2", "question": "b?", "answers": [], "plausible_answers": [{"text": "Lee"}], "is_impossible": True},
                        {"id": "3", "question": "c?", "answers": []},
                    ],
                }
            ],
        }
    ]
}  # fmt: skip


def test_squad_2_marks_unanswerable_questions_and_plausible_answers_are_ignored(tmp_path: Path) -> None:
    (tmp_path / "dev.json").write_text(json.dumps(SQUAD_2))
    questions = read_questions(tmp_path / "dev.json")
    assert [(question.answers, question.is_impossible) for question in questions] == [
        (("Lee",), False),
        ((), True),
        ((), True),
    ]


def test_an_empty_list_of_answers_means_unanswerable_only_if_other_questions_have_answers(tmp_path: Path) -> None:
    rows = [HF_SQUAD, HF_SQUAD | {"id": "s2", "answers": {"text": [], "answer_start": []}}]
    (tmp_path / "q.jsonl").write_bytes(as_lines(rows))
    assert [question.is_impossible for question in read_questions(tmp_path / "q.jsonl")] == [False, True]
    (tmp_path / "q.jsonl").write_bytes(as_lines(rows[1:]))
    assert [question.is_impossible for question in read_questions(tmp_path / "q.jsonl")] == [False]
    (tmp_path / "q.jsonl").write_bytes(as_lines([{"question": "a?", "answers": ["x"]}, {"question": "b?"}]))
    assert [question.is_impossible for question in read_questions(tmp_path / "q.jsonl")] == [False, False]


@pytest.mark.parametrize("titles", [[None, None], ["", "Cork"], ["Cork", "Cork"], ["article-2", None]])
def test_squad_with_empty_or_equal_titles_names_the_passages_that_the_corpus_has(
    titles: list[str | None], tmp_path: Path
) -> None:
    articles = [
        {
            "title": title,
            "paragraphs": [{"context": f"c{n}", "qas": [{"id": n, "question": "q?", "answers": [{"text": "c"}]}]}],
        }
        for n, title in enumerate(titles)
    ]
    file = tmp_path / "dev.json"
    file.write_text(json.dumps({"data": articles}))
    corpus_ids = [f"{article.name}#0" for article in read_articles(file)]
    assert len(set(corpus_ids)) == 2
    assert [question.gold_passage_ids for question in read_questions(file)] == [(id,) for id in corpus_ids]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (FLASH | {"answers": ["x"]}, "both `answers` and `golden_answers`"),
        (FLASH | {"golden_answers": "Lee"}, "`golden_answers` is str"),
        (FLASH | {"golden_answers": [["Lee"]]}, "wrong type: golden_answers is list"),
        (FLASH | {"golden_answers": [1999]}, "wrong type: golden_answers is int"),
        (FLASH | {"golden_answers": [True]}, "wrong type: golden_answers is bool"),
        (FLASH | {"golden_answers": [None]}, "missing golden_answers"),
        (FLASH | {"golden_answers": [""]}, "empty golden_answers"),
        (KILT | {"input": ""}, "empty input"),
        (KILT | {"output": [{"answer": "a", "provenance": "p"}]}, "`provenance` is str"),
        (
            KILT
            | {"output": [{"provenance": [{"wikipedia_id": "1", "start_paragraph_id": 2, "end_paragraph_id": 1}]}]},
            "a provenance of page '1' from paragraph 2 to 1",
        ),
        (
            KILT
            | {"output": [{"provenance": [{"wikipedia_id": "1", "start_paragraph_id": 0, "end_paragraph_id": 10**9}]}]},
            "to 1000000000",
        ),
        (DPR | {"positive_ctxs": ["p"]}, "`positive_ctxs` holds a str"),
        (DPR | {"positive_ctxs": [{"passage_id": 1.5}]}, "gold_passage_ids is float"),
        (HF_SQUAD | {"answers": {"text": "Lee"}}, "`answers text` is str"),
        (HF_SQUAD | {"is_impossible": True}, "`is_impossible` is true, but there are answers"),
        (HF_SQUAD | {"is_impossible": "no"}, "`is_impossible` is 'no'"),
        (TRIVIA | {"Answer": "Lee"}, "`Answer` is str"),
        (TRIVIA | {"Answer": {"Value": 7}}, "Answer is int"),
        (HOTPOT | {"supporting_facts": "Cork"}, "`supporting_facts` is str"),
        (HOTPOT | {"supporting_facts": [[None, 0]]}, "missing supporting_facts"),
        (HOTPOT | {"supporting_facts": {"title": ["a"], "sent_id": []}}, "not equally long"),
        (HOTPOT | {"answer": 7}, "`answers` is int"),
        (nq_row(annotations=[{"short_answers": [{"start_token": 9, "end_token": 99}]}]), "from token 9 to 99"),
        (nq_row(document_text=None), "short answers, but no document"),
        ({"utterance": "q?", "targetValue": "(list)"}, "`targetValue` without a description"),
        (
            {"_id": "d1", "title": "Lyon", "text": "Lyon is a city."},
            "missing question among the keys '_id', 'title', 'text'",
        ),
        ({"_id": "d1", "text": ["Lyon\n"]}, "text is list"),
    ],
)
def test_a_bad_row_of_a_layout_is_refused_by_its_line_and_its_own_key(row: Row, message: str, tmp_path: Path) -> None:
    file = tmp_path / "q.jsonl"
    file.write_bytes(as_lines([{"question": "good?"}, row]))
    with pytest.raises(InputError) as caught:
        read_questions(file)
    assert str(caught.value).startswith(f"{file} line 2: ")
    assert message in str(caught.value)


def test_ten_thousand_aliases_are_read_and_each_kept_once(tmp_path: Path) -> None:
    aliases = [f"alias {n}" for n in range(10_000)]
    row = HF_TRIVIA | {"answer": {"value": "alias 5", "aliases": aliases * 2}}
    (tmp_path / "q.jsonl").write_bytes(as_lines([row]))
    (question,) = read_questions(tmp_path / "q.jsonl")
    assert question.answers == ("alias 5", *aliases[:5], *aliases[6:])
