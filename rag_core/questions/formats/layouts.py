"""The layouts of question files: how to recognise each, and how to map its record to canonical keys.

A layout is a row of `LAYOUTS`; a record has the first layout that fits it. To add one, add a row and, if no
existing function suits, a function. Canonical keys are those that `rag_core.questions.questions` writes: `id`,
`question`, `answers`, `type`, `gold_passage_ids`, `ctxs`, `answers_are`, `is_impossible`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from rag_core.questions.formats.literals import parse_literal
from rag_core.questions.formats.natural_questions import from_hugging_face_nq, from_natural_questions
from rag_core.questions.formats.near_keys import FIELDS, intended_key
from rag_core.questions.formats.open_domain import (
    from_dpr_training,
    from_kilt,
    from_trivia_qa,
    from_trivia_qa_rows,
    from_web_questions,
)
from rag_core.questions.formats.reading import from_hotpot_qa, from_squad, from_squad_rows
from rag_core.questions.formats.records import Record

Canonical = dict[str, Any]
ANSWER_KEYS = ("answers", "answer", "golden_answers", "possible_answers")


@dataclass(frozen=True)
class Layout:
    """How a data set writes a question.

    A record of this layout has all keys in `needs`, not null, and passes `fits`. The function `canonical` reads
    the keys in `reads`. `names` maps canonical keys to the layout's own keys, for messages.
    """

    name: str
    needs: tuple[str, ...]
    canonical: Callable[[Record], Canonical]
    reads: frozenset[str]
    names: dict[str, str]
    fits: Callable[[dict[str, Any]], bool] = lambda value: True

    def is_of(self, value: dict[str, Any]) -> bool:
        """Whether a record has this layout."""
        return all(value.get(key) is not None for key in self.needs) and self.fits(value)


def _plain(record: Record) -> Canonical:
    """A record with canonical keys; `answer` and `_id` are accepted for `answers` and `id`."""
    get = record.get
    answers = get("answers") if get("answer") is None else get("answer")
    if isinstance(answers, str) and get("answers") is None:
        answers = [answers]
    return {
        "id": get("_id") if get("id") is None else get("id"),
        "question": get("question"),
        "answers": answers,
        **{
            key: get(key)
            for key in ("type", "gold_passage_ids", "ctxs", "answers_are", "is_impossible")
            if get(key) is not None
        },
    }


def _flash_rag(record: Record) -> Canonical:
    return _plain(record) | {"answers": record.get("golden_answers")}


def _with_gold(more: Callable[[Record], Canonical]) -> Callable[[Record], Canonical]:
    """Read canonical keys first, then let `more` override them; but keep gold passages that the record itself names."""

    def canonical(record: Record) -> Canonical:
        plain = _plain(record)
        gold = plain.get("gold_passage_ids")
        return plain | more(record) | ({} if gold is None else {"gold_passage_ids": gold})

    return canonical


def _pop_qa(record: Record) -> Canonical:
    """PopQA (Mallen et al. 2023): `possible_answers` is a list, or a list written as text."""
    answers = record.get("possible_answers")
    parsed = parse_literal(answers) if isinstance(answers, str) else answers
    return _plain(record) | {"answers": answers if parsed is None else parsed}


def _beir(record: Record) -> Canonical:
    return {"id": record.get("_id"), "question": record.get("text")}


def _has_answer_objects(value: dict[str, Any]) -> bool:
    """Whether the answers are SQuAD's: objects with `text` in a list, or an object of lists."""
    answers = value["answers"]
    first = answers[0] if isinstance(answers, list) and answers else answers
    return isinstance(first, dict) and "text" in first


def _is_query(value: dict[str, Any]) -> bool:
    """Whether a record is BEIR's query: a passage of its corpus has the same keys, but also a title."""
    return value.get("question") is None and value.get("title") in (None, "")


def _row(
    name: str,
    needs: str,
    canonical: Callable[[Record], Canonical],
    more: str = "",
    names: dict[str, str] | None = None,
    fits: Callable[[dict[str, Any]], bool] = lambda value: True,
) -> Layout:
    keys = tuple(needs.split())
    return Layout(name, keys, canonical, frozenset(keys) | frozenset(more.split()), names or {}, fits)


PLAIN_KEYS = "id _id question answers answer type gold_passage_ids ctxs answers_are is_impossible"
PLAIN = _row("plain", "", _plain, PLAIN_KEYS)
LAYOUTS: tuple[Layout, ...] = (
    _row("TriviaQA", "Question QuestionId", from_trivia_qa, "Answer",
         {"id": "QuestionId", "question": "Question", "answers": "Answer"}),
    _row("Natural Questions", "question_text", from_natural_questions,
         "example_id annotations document_text document_tokens", {"id": "example_id", "question": "question_text"}),
    _row("Natural Questions (Hugging Face)", "question annotations", from_hugging_face_nq, "id",
         fits=lambda value: isinstance(value["question"], dict)),
    _row("KILT", "input", from_kilt, "id output", {"question": "input", "answers": "output"},
         fits=lambda value: value.get("question") is None and isinstance(value.get("output"), list | None)),
    _row("WebQuestions", "utterance", from_web_questions, "targetValue",
         {"question": "utterance", "answers": "targetValue"}, fits=lambda value: value.get("question") is None),
    _row("BEIR", "_id text", _beir, "title", {"id": "_id", "question": "text"}, fits=_is_query),
    _row("TriviaQA (Hugging Face)", "question answer", _with_gold(from_trivia_qa_rows), PLAIN_KEYS + " question_id",
         {"answers": "answer"}, fits=lambda value: isinstance(value["answer"], dict)),
    _row("SQuAD (Hugging Face)", "question answers", _with_gold(from_squad_rows), PLAIN_KEYS + " context title",
         fits=_has_answer_objects),
    _row("DPR's training", "question positive_ctxs", _with_gold(from_dpr_training), PLAIN_KEYS),
    _row("HotpotQA", "question supporting_facts", _with_gold(from_hotpot_qa), PLAIN_KEYS,
         {"gold_passage_ids": "supporting_facts"}),
    _row("FlashRAG", "question golden_answers", _flash_rag, PLAIN_KEYS, {"answers": "golden_answers"}),
    _row("PopQA", "question possible_answers", _pop_qa, PLAIN_KEYS, {"answers": "possible_answers"}),
    PLAIN,
)  # fmt: skip
SQUAD = _row("SQuAD", "", from_squad, "id question answers is_impossible gold_passage_ids plausible_answers")
# Layouts set by the container. CSV without a header needs none here: its container uses canonical keys.
_BY_CONTAINER = {"SQuAD": SQUAD}
WANTED = frozenset(key for layout in LAYOUTS for key in layout.reads) | {"query-id", "corpus-id", "score"}


def layout_of(record: Record) -> Layout:
    """The layout of a record, which must be an object."""
    if record.layout in _BY_CONTAINER:
        return _BY_CONTAINER[record.layout]
    return next(layout for layout in LAYOUTS if layout.is_of(record.value))


def canonical(record: Record) -> tuple[Layout, Canonical]:
    """A record's layout, and its content under canonical keys, not yet checked.

    Raises:
        InputError: not an object; answers under two keys; a value that its layout does not allow; or a key that looks
            like a misspelling of a key that is missing.
    """
    if not isinstance(record.value, dict):
        raise record.error(f"a {type(record.value).__name__}", "an object with `question`")
    layout = layout_of(record)
    present = (
        [key for key in ANSWER_KEYS if record.get(key) is not None] if layout.reads >= set(ANSWER_KEYS[:2]) else []
    )
    if len(present) > 1:
        raise record.error(f"both `{present[0]}` and `{present[1]}`", "one of them")
    value = layout.canonical(record)
    _refuse_misspelt_keys(record, layout, value)
    return layout, value


def _refuse_misspelt_keys(record: Record, layout: Layout, value: Canonical) -> None:
    for key in record.value:
        if not isinstance(key, str) or key in layout.reads:
            continue
        likely = intended_key(key)
        if likely and value.get(FIELDS[likely]) in (None, []):
            raise record.error(
                f"`{key}` is not a key of a question; did you mean `{likely}`?", f"`{likely}`, or no such key"
            )
