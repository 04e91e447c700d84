"""Layouts of reading-comprehension data sets: SQuAD, HotpotQA and 2WikiMultihopQA."""

from __future__ import annotations

from typing import Any

from rag_core.corpus.formats.squad import context_id
from rag_core.questions.formats.records import Record, distinct, list_of, objects, rows_of


def from_squad(record: Record) -> dict[str, Any]:
    """An entry of `qas`: Rajpurkar et al. 2016 and 2018. The paragraph is its gold passage; `plausible_answers` are
    ignored.
    """
    answers = record.get("answers")
    if answers is not None and not isinstance(answers, list):
        raise record.error("not an object with a list `answers`", "SQuAD's layout")
    texts = [answer.get("text") if isinstance(answer, dict) else answer for answer in answers or []]
    return {
        "id": record.get("id"),
        "question": record.get("question"),
        "answers": None if answers is None else distinct(texts),  # several people answered each question
        "gold_passage_ids": record.get("gold_passage_ids"),
        "is_impossible": record.get("is_impossible"),
    }


def from_squad_rows(record: Record) -> dict[str, Any]:
    """A row of SQuAD in Hugging Face's form; its context is the gold passage."""
    answers = record.get("answers")
    if isinstance(answers, list):
        texts = [answer.get("text") for answer in objects(record, "answers", answers)]
    else:
        texts = list_of(record, "answers text", answers.get("text"), "strings")
    context, title = record.get("context"), record.get("title")
    gold = [context_id(title, context)] if isinstance(context, str) and isinstance(title, str | None) else None
    return {"answers": distinct(texts), "gold_passage_ids": gold}


def from_hotpot_qa(record: Record) -> dict[str, Any]:
    """HotpotQA (Yang et al. 2018), 2WikiMultihopQA (Ho et al. 2020). Gold passages: titles of the supporting facts."""
    facts = record.get("supporting_facts")
    if isinstance(facts, list) and all(isinstance(fact, list) and len(fact) == 2 for fact in facts):
        titles = [fact[0] for fact in facts]
    elif isinstance(facts, list | dict):
        titles = [row.get("title") for row in rows_of(record, "supporting_facts", facts)]
    else:
        raise record.error(
            f"`supporting_facts` is {type(facts).__name__}", "[[title, sentence], …] or {title: […], sent_id: […]}"
        )
    return {"gold_passage_ids": distinct(titles)}
