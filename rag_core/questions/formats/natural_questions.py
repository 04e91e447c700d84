"""Natural Questions in Google's full and simplified files, and in Hugging Face's rows: Kwiatkowski et al. 2019.

An answer is a span of the document's tokens, joined by spaces, without markup; or yes, or no. If no annotator gave
any answer, the question is unanswerable (`is_impossible`).
"""

from __future__ import annotations

import re
from typing import Any

from rag_core.questions.formats.records import Record, distinct, list_of, objects, rows_of

_MARKUP = re.compile(r"</?[A-Za-z][^<>]*>")
_HUGGING_FACE_YES_NO = {0: "no", 1: "yes"}


def from_natural_questions(record: Record) -> dict[str, Any]:
    """A line of the simplified file (`document_text`), or of the full one (`document_tokens`)."""
    annotations = objects(record, "annotations", record.get("annotations"))
    answers: list[Any] = []
    tokens: list[str] | None = None
    for annotation in annotations:
        for span in objects(record, "short_answers", annotation.get("short_answers")):
            tokens = _tokens(record) if tokens is None else tokens
            answers.append(_span(record, tokens, span))
        yes_no = annotation.get("yes_no_answer")
        if isinstance(yes_no, str) and yes_no.upper() in ("YES", "NO"):
            answers.append(yes_no.lower())
    return {
        "id": record.get("example_id"),
        "question": record.get("question_text"),
        "answers": distinct(answers),
        "is_impossible": bool(annotations) and not answers,
    }


def _tokens(record: Record) -> list[str]:
    text = record.get("document_text")
    if isinstance(text, str):
        return text.split(" ")
    tokens = objects(record, "document_tokens", record.get("document_tokens"))
    if not tokens:
        raise record.error("short answers, but no document", "`document_text` or `document_tokens`")
    # Keep markup as tokens, because spans count it; `_span` drops it.
    return ["<P>" if token.get("html_token") is True else str(token.get("token")) for token in tokens]


def _span(record: Record, tokens: list[str], span: dict[str, Any]) -> str:
    start, end = span.get("start_token"), span.get("end_token")
    numbers = isinstance(start, int) and isinstance(end, int) and not {type(start), type(end)} & {bool}
    if not numbers or not 0 <= start < end <= len(tokens):  # type: ignore[operator]
        raise record.error(
            f"a short answer from token {start!r} to {end!r}", f"a span within the document's {len(tokens)} tokens"
        )
    return " ".join(token for token in tokens[start:end] if not _MARKUP.fullmatch(token))


def from_hugging_face_nq(record: Record) -> dict[str, Any]:
    """A row of Hugging Face's `natural_questions`, which holds the short answers as text."""
    answers: list[Any] = []
    annotations = rows_of(record, "annotations", record.get("annotations"))
    for annotation in annotations:
        short = annotation.get("short_answers")
        for span in [short] if isinstance(short, dict) else objects(record, "short_answers", short):
            texts = span.get("text")
            answers += [texts] if isinstance(texts, str) else list_of(record, "short_answers text", texts, "strings")
        yes_no = annotation.get("yes_no_answer")
        if isinstance(yes_no, int) and not isinstance(yes_no, bool) and yes_no in _HUGGING_FACE_YES_NO:
            answers.append(_HUGGING_FACE_YES_NO[yes_no])
    question = record.get("question")
    return {
        "id": record.get("id"),
        "question": question.get("text"),
        "answers": distinct(answers),
        "is_impossible": bool(annotations) and not answers,
    }
