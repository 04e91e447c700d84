"""Scores of small cases, counted by hand, and the predictions artifact that they are read from."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from rag_core.corpus.passages import NO_PASSAGE, Passage
from rag_core.embeddings.text_encoder import TextEncoder
from rag_core.errors import ArtifactError, InputError
from rag_core.evaluation.evaluation import (
    answer_scores,
    evaluate_predictions,
    evaluate_retrieval,
    mean_scores,
    retrieval_scores,
    spaceless_hint,
)
from rag_core.evaluation.predictions import JSONL, PARQUET, join_parts, prediction_row, read_predictions, write_part
from rag_core.model.reader import Answer, Candidate, ReadPassage
from rag_core.questions.questions import Question
from rag_core.storage.artifact import publish
from tests.support.small_corpus import FACTS, QUESTIONS, make_encoder, make_index

LYON, OSLO, CORK = (Passage(passage_id, title, text) for passage_id, title, text in (FACTS[0], FACTS[3], FACTS[6]))
# Line ends of other systems, which must not cut a row of JSON lines.
ODD = Passage("odd", "Zürich\u2028x", "one\u2028two\x85three\nfour\r\nfive\x0csix “é”")


def _answer(text: str, *passages: Passage) -> Answer:
    read = tuple(ReadPassage(passage, 0.5**place, 0.25**place) for place, passage in enumerate(passages, 1))
    return Answer(text, -1.25, (Candidate(text, -1.25), Candidate("other", -3.5)), read)


CASES = [
    # EM 1, F1 1; gold passage first.
    (
        Question("a", "country of Lyon?", ("France", "the French Republic"), "country", (LYON.id,)),
        _answer("france", LYON, OSLO),
    ),
    # EM 0, F1 2/3 against "the river Rhone" (river, rhone): precision 1, recall 1/2. Gold passage second.
    (Question("b", "river of Lyon?", ("the river Rhone",), "river", (LYON.id,)), _answer("Rhone", OSLO, LYON)),
    # EM 0, F1 0; no gold id; the second passage contains the answer's string.
    (Question("c", "country of Cork?", ("Ireland",), "country"), _answer("Norway", OSLO, CORK)),
    # EM 1, F1 1; the gold passage is missing, but another contains the answer's string.
    (Question("d", "where is Oslo?", ("Norway",), None, ("oslo:other",)), _answer("Norway", OSLO, ODD)),
]


def _published(folder: Path, cases: list[tuple[Question, Answer]], cut: int = 2) -> Path:
    rows = [prediction_row(question, answer) for question, answer in cases]
    parts = [folder.parent / f"{folder.name}-part-{number}" for number in (0, 1)]
    write_part(rows[:cut], parts[0])
    write_part(rows[cut:], parts[1])
    with publish(folder, "predictions") as draft:
        draft.counts["questions"] = join_parts(parts, draft.folder)
    assert draft.counts["questions"] == len(cases)
    return folder


def test_scores_are_means_over_all_questions_and_by_type(tmp_path: Path) -> None:
    scores = evaluate_predictions(
        _published(tmp_path / "out", CASES), [question for question, _ in CASES], ks=(1, 2, 5)
    )
    assert (set(scores.by_type), scores.overall.count) == ({"country", "river"}, 4)
    assert scores.overall.means == pytest.approx(
        {
            "em": 2 / 4,
            "f1": (1 + 2 / 3 + 0 + 1) / 4,
            "recall@1": 1 / 4,
            "recall@2": 3 / 4,
            "answer_recall@1": 2 / 4,
            "answer_recall@2": 3 / 4,
        }
    )
    assert scores.by_type["country"].means == pytest.approx(
        {"em": 0.5, "f1": 0.5, "recall@1": 0.5, "recall@2": 1, "answer_recall@1": 0.5, "answer_recall@2": 1}
    )
    assert scores.by_type["country"].count == 2
    assert scores.by_type["river"].means["f1"] == pytest.approx(2 / 3)
    assert scores.by_type["river"].count == 1


def test_more_predictions_than_questions_and_another_order_change_nothing(tmp_path: Path) -> None:
    folder = _published(tmp_path / "out", CASES)
    scores = evaluate_predictions(folder, [CASES[1][0], CASES[0][0]], ks=(1,))
    assert scores.overall.means == pytest.approx({"em": 0.5, "f1": 5 / 6, "recall@1": 0.5, "answer_recall@1": 0.5})
    assert scores.overall.count == 2


def test_a_question_without_answers_is_scored_for_retrieval_only_and_every_mean_has_its_count(
    tmp_path: Path,
) -> None:
    silent = Question("e", "?", (), None, (CORK.id,))
    folder = _published(tmp_path / "out", [CASES[0], (silent, _answer("?", CORK)), CASES[1]])
    scores = evaluate_predictions(folder, [CASES[0][0], silent, CASES[1][0]], ks=(1,)).overall
    assert scores.means == pytest.approx({"em": 1 / 2, "f1": 5 / 6, "recall@1": 2 / 3, "answer_recall@1": 1 / 2})
    assert scores.counts == {"em": 2, "f1": 2, "recall@1": 3, "answer_recall@1": 2}
    assert (scores.count, scores.unanswerable) == (3, 0)


def test_unanswerable_questions_are_left_out_of_every_mean_and_counted_separately(tmp_path: Path) -> None:
    """SQuAD 2.0 names a paragraph without an answer: neither it nor an answer may count as a hit."""
    impossible = Question("x", "who rules Lyon?", (), "who", (LYON.id,), is_impossible=True)
    unknown = Question("y", "what else?", (), "country")
    cases = [*CASES, (impossible, _answer("", LYON)), (unknown, _answer("nobody", LYON))]
    scores = evaluate_predictions(_published(tmp_path / "out", cases), [question for question, _ in cases], ks=(1, 2))
    without = evaluate_predictions(
        _published(tmp_path / "without", CASES), [question for question, _ in CASES], ks=(1, 2)
    )
    assert scores.overall.means == without.overall.means
    assert scores.overall.counts == without.overall.counts == dict.fromkeys(scores.overall.means, 4)
    assert (scores.overall.count, scores.overall.unanswerable) == (4, 2)
    assert (scores.by_type["country"].count, scores.by_type["country"].unanswerable) == (2, 1)
    assert (scores.by_type["who"].means, scores.by_type["who"].count, scores.by_type["who"].unanswerable) == ({}, 0, 1)
    report = scores.as_json()
    assert (report["count"], report["unanswerable"], report["counts"]["em"]) == (4, 2, 4)
    assert report["by_type"]["who"] == {"count": 0, "unanswerable": 1, "counts": {}}


def test_closed_book_answers_have_no_recall(tmp_path: Path) -> None:
    cases = [(question, _answer(answer.text, NO_PASSAGE)) for question, answer in CASES]
    scores = evaluate_predictions(_published(tmp_path / "out", cases), [question for question, _ in CASES], ks=(1, 5))
    assert scores.overall.means == pytest.approx({"em": 2 / 4, "f1": (1 + 2 / 3 + 0 + 1) / 4})
    assert all(set(scores_of_type.means) == {"em", "f1"} for scores_of_type in scores.by_type.values())


@pytest.mark.parametrize("kind", ["overall", "count", "by_type", "match", "a/b", "[/b]", "中文", "..", "a\nb", "em"])
def test_any_string_is_a_question_type(tmp_path: Path, kind: str) -> None:
    cases = [(replace(CASES[0][0], type=kind), CASES[0][1]), (replace(CASES[2][0], type="other"), CASES[2][1])]
    scores = evaluate_predictions(_published(tmp_path / "out", cases), [question for question, _ in cases], ks=(1,))
    assert (scores.overall.means["em"], scores.overall.count) == (0.5, 2)
    assert (scores.by_type[kind].means["em"], scores.by_type[kind].count) == (1.0, 1)
    report = json.loads(json.dumps(scores.as_json()))
    assert (report["em"], report["count"], report["match"]) == (0.5, 2, "words")
    assert (set(report["by_type"]), report["by_type"][kind]["em"]) == ({kind, "other"}, 1.0)


def test_regular_expressions_are_matched_as_drqa_and_dpr_do_and_have_no_f1(tmp_path: Path) -> None:
    pattern = Question("r", "who?", (r"France|French\s?Republic",), "trec", (), answers_are="regex")
    cases = [
        CASES[0],
        (pattern, _answer("french republic of old", OSLO, LYON)),
        (replace(pattern, id="s"), _answer("in France", LYON)),
    ]
    scores = evaluate_predictions(_published(tmp_path / "out", cases), [question for question, _ in cases], ks=(1, 2))
    # DrQA's `match` asks for the beginning alone; DPR's `search` for any place.
    assert scores.by_type["trec"].means == {
        "em": 0.5,
        "answer_recall@1": 0.5,
        "answer_recall@2": 1.0,
        "recall@1": 0.5,
        "recall@2": 1.0,
    }
    assert scores.overall.means["em"] == pytest.approx(2 / 3)
    assert scores.overall.counts["f1"] == 1


@pytest.mark.parametrize(
    ("pattern", "fault"), [("(a|aa)+$", "takes too long to match"), ("(unclosed", "cannot be read")]
)
def test_a_hostile_regular_expression_is_an_error_that_names_question_and_pattern(
    monkeypatch: pytest.MonkeyPatch, pattern: str, fault: str
) -> None:
    monkeypatch.setattr("rag_core.evaluation.metrics.REGEX_SECONDS", 0.2)
    question = Question("q7", "?", (pattern,), answers_are="regex")
    with pytest.raises(InputError, match=f"'q7'.*{fault}.*{re.escape(repr(pattern))}"):
        answer_scores("a" * 200 + "b", question)
    with pytest.raises(InputError, match=f"'q7'.*{fault}"):
        retrieval_scores([Passage("1", "", "a" * 200 + "b")], question, (1,))


def test_predictions_of_other_questions_under_the_same_ids_are_refused(tmp_path: Path) -> None:
    """Questions without ids are numbered, so any two files have the same ids."""
    folder = _published(tmp_path / "out", CASES)
    others = [replace(CASES[0][0], question="capital of France?"), CASES[1][0]]
    with pytest.raises(InputError, match=r"1 of 2 questions \(first: id 'a' is 'country of Lyon\?' there"):
        evaluate_predictions(folder, others, ks=(1,))


def test_two_predictions_for_one_question_are_refused(tmp_path: Path) -> None:
    folder = _published(tmp_path / "out", [CASES[0], (CASES[0][0], _answer("Norway", OSLO))], cut=1)
    with pytest.raises(ArtifactError, match=r"two predictions for the question 'a'"):
        evaluate_predictions(folder, [CASES[0][0]], ks=(1,))


def test_answers_in_chinese_are_found_by_characters_and_a_hint_says_so(tmp_path: Path) -> None:
    passage = Passage("p", "", "東京タワーは、日本の首都にある。高さは３３３メートル。")
    question = Question("1", "日本の首都にあるのは?", ("東京タワー", "333メートル"), None)
    folder = _published(tmp_path / "out", [(question, _answer("東京", passage))], cut=1)
    words = evaluate_predictions(folder, [question], ks=(1,)).overall.means
    assert (words["em"], words["f1"], words["answer_recall@1"]) == (0, 0, 0)
    characters = evaluate_predictions(folder, [question], ks=(1,), match="characters")
    assert characters.match == "characters"
    assert characters.overall.means == pytest.approx(
        {"em": 0, "f1": 2 * 2 / (2 + 5), "answer_recall@1": 1, "recall@1": 1}
    )
    assert "1 of 1 questions" in spaceless_hint([question], "words")
    assert "'東京タワー'" in spaceless_hint([question], "words")
    assert spaceless_hint([question], "characters") == spaceless_hint([CASES[0][0]], "words") == ""


def test_a_question_without_prediction_is_named(tmp_path: Path) -> None:
    folder = _published(tmp_path / "out", CASES[:3])
    with pytest.raises(InputError, match=r"no prediction for 1 of 4 questions \(first: id 'd'\)"):
        evaluate_predictions(folder, [question for question, _ in CASES], ks=(1,))


def test_questions_without_any_answer_are_refused(tmp_path: Path) -> None:
    folder = _published(tmp_path / "out", CASES)
    with pytest.raises(InputError, match="None of the questions has an answer"):
        evaluate_predictions(folder, [Question("a", "country of Lyon?")], ks=(1,))


def test_gold_ids_count_before_answer_strings() -> None:
    question = Question("q", "?", ("Norway",), None, (CORK.id,))
    scores = retrieval_scores([OSLO, LYON, CORK], question, (1, 3))
    assert scores == {"recall@1": 0.0, "recall@3": 1.0, "answer_recall@1": 1.0, "answer_recall@3": 1.0}
    assert retrieval_scores([OSLO], Question("q", "?"), (1,)) == {}
    assert mean_scores([{"em": 1.0}, {"em": 0.0, "x": 3.0}, {}]) == {"em": 0.5, "x": 3.0}


def test_retrieval_scores_equal_a_count_over_brute_force_search(tmp_path: Path) -> None:
    folder = make_encoder(tmp_path / "encoder", seed=4)
    index, encoder = make_index(tmp_path / "index", folder), TextEncoder.from_pretrained(folder)
    questions = [
        Question(str(n), text, (answer,), kind, (gold,)) for n, (text, answer, gold, kind) in enumerate(QUESTIONS)
    ]
    scores = evaluate_retrieval(index, encoder, questions, ks=(1, 3, 9))
    documents_ND = encoder.encode([f"{title} {text}" for _, title, text in FACTS], precision="float32")
    ranks = []
    for text, _, gold, _ in QUESTIONS:
        query_D = encoder.encode([text], precision="float32")[0]
        order = np.argsort(-(documents_ND @ query_D)).tolist()
        ranks.append(order.index([fact[0] for fact in FACTS].index(gold)))
    for k in (1, 3, 9):
        assert scores.overall.means[f"recall@{k}"] == pytest.approx(np.mean([rank < k for rank in ranks]))
    rivers = [rank for rank, question in zip(ranks, QUESTIONS, strict=True) if question[3] == "river"]
    assert scores.by_type["river"].means["recall@3"] == pytest.approx(np.mean([rank < 3 for rank in rivers]))
    assert (scores.by_type["river"].count, scores.overall.count, scores.overall.means["recall@9"]) == (2, 8, 1)
    assert 0 < scores.overall.means["recall@3"] < 1
    unanswerable = Question("x", "who?", (), "river", (FACTS[0][0],), is_impossible=True)
    more = evaluate_retrieval(index, encoder, [unanswerable, *questions], ks=(1, 3, 9))
    assert (more.overall.means, more.overall.unanswerable) == (scores.overall.means, 1)
    with pytest.raises(InputError, match="None of the questions has an answer or a gold passage"):
        evaluate_retrieval(index, encoder, [unanswerable], ks=(1,))


def test_parts_are_joined_in_order_and_both_files_hold_the_same_rows(tmp_path: Path) -> None:
    for cut in (0, 1, 4):
        folder = _published(tmp_path / f"out-{cut}", CASES, cut)
        expected = [json.loads(json.dumps(prediction_row(question, answer))) for question, answer in CASES]
        assert [row["id"] for row in expected] == ["a", "b", "c", "d"]
        assert list(read_predictions(folder)) == expected
        assert pq.read_table(folder / PARQUET).to_pylist() == expected
        assert len((folder / JSONL).read_bytes().strip().split(b"\n")) == len(CASES)


def test_a_row_holds_answer_runners_up_and_passages_with_both_probabilities() -> None:
    row = prediction_row(*CASES[0])
    assert (row["id"], row["question"], row["answer"], row["log_prob"]) == ("a", "country of Lyon?", "france", -1.25)
    assert row["candidates"] == [{"answer": "france", "log_prob": -1.25}, {"answer": "other", "log_prob": -3.5}]
    first = {"id": LYON.id, "title": "Lyon", "text": LYON.text, "prior": 0.5, "posterior": 0.25}
    second = {"id": OSLO.id, "title": "Oslo", "text": OSLO.text, "prior": 0.25, "posterior": 0.0625}
    assert row["passages"] == [first, second]


def test_a_damaged_file_of_predictions_is_refused_by_name(tmp_path: Path) -> None:
    folder = _published(tmp_path / "out", CASES)
    damaged = bytearray((folder / JSONL).read_bytes())
    damaged[damaged.index(b"france")] ^= 1
    (folder / JSONL).write_bytes(damaged)
    with pytest.raises(ArtifactError, match=r"predictions\.jsonl"):
        list(read_predictions(folder))


def test_a_line_that_is_no_prediction_is_named(tmp_path: Path) -> None:
    with publish(tmp_path / "out", "predictions") as draft:
        good = json.dumps(prediction_row(*CASES[0]))
        (draft.folder / JSONL).write_text(good + '\n{"id": "b", "answer": "x"}\n')
    with pytest.raises(ArtifactError, match="line 2 is not a prediction"):
        list(read_predictions(tmp_path / "out"))
