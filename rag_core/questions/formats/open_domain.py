"""Layouts of open-domain data sets: KILT, DPR's training files, TriviaQA, WebQuestions.

Each function takes a record and returns its content under canonical keys; `rag_core.questions.questions` checks
the strings.
"""

from __future__ import annotations

import re
from typing import Any, TypeGuard

from rag_core.corpus.formats.ids import kilt_passage_id
from rag_core.corpus.formats.rows import id_as_text
from rag_core.questions.formats.records import Record, distinct, list_of, objects, texts

# A provenance of more paragraphs is taken for damage: KILT's have one or two, and a page has a few hundred.
MAX_PARAGRAPHS = 1000
_DESCRIPTION = re.compile(r'\(description (?:"((?:[^"\\]|\\.)*+)"|([^()"]++))\)')
# What TriviaQA's test set has in place of an answer.
_HIDDEN = "<unk>"


def from_kilt(record: Record) -> dict[str, Any]:
    """KILT: Petroni et al. 2021, arXiv 2009.02252. Gold passages are all paragraphs of all provenances."""
    answers: list[Any] = []
    gold: list[Any] = []
    if not record.get("output"):  # a test set
        return {"id": record.get("id"), "question": record.get("input")}
    for output in objects(record, "output", record.get("output")):
        if output.get("answer") not in (None, ""):  # Hugging Face's copy has "" for a missing answer
            answers.append(output["answer"])
        for provenance in objects(record, "provenance", output.get("provenance")):
            gold += _paragraphs(record, provenance)
    return {
        "id": record.get("id"),
        "question": record.get("input"),
        "answers": distinct(answers) or None,
        "gold_passage_ids": distinct(gold),
    }


def _paragraphs(record: Record, provenance: dict[str, Any]) -> list[str]:
    """The passage ids of a provenance; none if it names only the page."""
    page, first = id_as_text(provenance.get("wikipedia_id")), provenance.get("start_paragraph_id")
    last = first if provenance.get("end_paragraph_id") is None else provenance["end_paragraph_id"]
    if page is None or first is None:
        return []
    if not (
        isinstance(page, str) and _is_integer(first) and _is_integer(last) and first <= last < first + MAX_PARAGRAPHS
    ):
        raise record.error(
            f"a provenance of page {page!r} from paragraph {first!r} to {last!r}",
            f"`wikipedia_id`, and integers `start_paragraph_id` to `end_paragraph_id`, at most {MAX_PARAGRAPHS} apart",
        )
    return [kilt_passage_id(page, paragraph) for paragraph in range(first, last + 1) if paragraph >= 0]


def _is_integer(value: object) -> TypeGuard[int]:
    return isinstance(value, int) and not isinstance(value, bool)


def from_dpr_training(record: Record) -> dict[str, Any]:
    """DPR's training files: Karpukhin et al. 2020, arXiv 2004.04906. Gold passages: positive contexts with an id."""
    contexts = objects(record, "positive_ctxs", record.get("positive_ctxs"))
    ids = (
        next((context[key] for key in ("passage_id", "psg_id", "id") if context.get(key) is not None), None)
        for context in contexts
    )
    return {"gold_passage_ids": distinct(id_as_text(id) for id in ids if id is not None)}


def from_trivia_qa(record: Record) -> dict[str, Any]:
    """TriviaQA's own files: Joshi et al. 2017, arXiv 1705.03551."""
    answers = _trivia_qa_answers(record, "Answer", ("Value", "Aliases", "HumanAnswers"))
    return {"id": record.get("QuestionId"), "question": record.get("Question"), "answers": answers}


def from_trivia_qa_rows(record: Record) -> dict[str, Any]:
    """TriviaQA in Hugging Face's form."""
    answers = _trivia_qa_answers(record, "answer", ("value", "aliases", "human_answers"))
    return {"id": record.get("question_id") if record.get("id") is None else record.get("id"), "answers": answers}


def _trivia_qa_answers(record: Record, name: str, keys: tuple[str, ...]) -> list[Any] | None:
    """The value, then all aliases that are not blank. Normalised aliases differ only in spelling and are not read."""
    answer = record.get(name)
    if answer is None:
        return None
    if not isinstance(answer, dict):
        raise record.error(f"`{name}` is {type(answer).__name__}", f"an object with `{keys[0]}` and `{keys[1]}`")
    value = answer.get(keys[0])
    aliases = [alias for key in keys[1:] for alias in list_of(record, f"{name} {key}", answer.get(key), "strings")]
    aliases = [alias for alias in aliases if not isinstance(alias, str) or alias.strip()]
    answers = distinct(([] if value is None else [value]) + aliases)
    return [answer for answer in answers if answer != _HIDDEN] or None


def from_web_questions(record: Record) -> dict[str, Any]:
    """WebQuestions' own file: Berant et al. 2013. `targetValue` is a list of Freebase descriptions."""
    target = record.get("targetValue")
    if target is None:
        return {"question": record.get("utterance")}
    matches = _DESCRIPTION.findall(target) if isinstance(target, str) else []
    if not matches:
        raise record.error("`targetValue` without a description", '(list (description "Lyon") …)')
    answers = [re.sub(r"\\(.)", r"\1", quoted) if quoted else bare.strip() for quoted, bare in matches]
    return {"question": record.get("utterance"), "answers": list(texts(record, "targetValue", distinct(answers)))}
