"""Questions with what is known about them: gold answers, gold passages, contexts retrieved elsewhere.

Reads plain JSON Lines, NQ-open, DPR's .csv, SQuAD JSON and FiD/DPR records with `ctxs`; writes one canonical JSON
Lines. Unlike the corpus readers this one is strict: a question left out or misread would silently change a result,
so any bad row raises InputError. Keys it does not know are ignored. It does not look anything up in a corpus.
"""

from __future__ import annotations

import ast
import contextlib
import csv
import json
import math
import os
import uuid
import warnings
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

from rag_core.artefacts.artefact import local_file
from rag_core.errors import InputError
from rag_core.passages import Passage
from rag_core.readers.first_bytes import refuse_archives_and_utf16
from rag_core.readers.rows import MAX_LINE_BYTES, Reject, decode_line, excerpt, field_fault, id_as_text
from rag_core.readers.squad import articles_of, paragraph_id

_FORMATS = "JSON Lines with `question`, DPR's tab-separated .csv, SQuAD JSON, or a JSON list of records with `ctxs`"


AnswersAre = Literal["text", "regex"]


@dataclass(frozen=True, slots=True)
class Question:
    """A question. `contexts` are passages given with it, best first, `context_scores` their scores, if known.

    `answers_are` says whether `answers` are texts or regular expressions that an answer matches (CuratedTREC).
    `is_impossible`: its passage holds no answer, and to say so is the right answer (SQuAD 2.0); `answers` are empty then.
    """

    id: str
    question: str
    answers: tuple[str, ...] = ()
    type: str | None = None
    gold_passage_ids: tuple[str, ...] = ()
    contexts: tuple[Passage, ...] | None = None
    context_scores: tuple[float, ...] | None = None
    answers_are: AnswersAre = "text"
    is_impossible: bool = False


@dataclass(frozen=True, slots=True)
class _Record:
    """A JSON object that should be a question, where it stood, and the id it gets if it names none."""

    place: str
    default_id: str
    value: Any

    def error(self, fault: str, expected: str) -> InputError:
        try:
            found = self.value if isinstance(self.value, str) else json.dumps(self.value, ensure_ascii=False)
        except (TypeError, ValueError, RecursionError):  # of Python's literals, not of JSON; or nested very deeply
            found = f"a {type(self.value).__name__}"
        found = excerpt(found)
        return InputError(f"{self.place}: {fault}; expected {expected}. Found {found!r}. Correct or remove it.")


def read_questions(path: Path) -> list[Question]:
    """All questions of a file, whose format follows from its suffix and content.

    A question without an id gets its 1-based line (or place in the list) as one.

    Raises:
        InputError: missing or empty file, an archive, unknown format, a bad row, an id that occurs twice.
    """
    path = local_file(path)
    if not path.is_file():
        found = "it is a folder" if path.is_dir() else "it does not exist"
        raise InputError(
            f"{path} cannot be read: {found}. A file of questions was expected ({_FORMATS}). Correct the path."
        )
    refuse_archives_and_utf16(path)
    lines = _decoded_lines(path)
    records = list(_records(path, lines)) if any(line.strip() for line in lines) else []
    if not records:
        raise InputError(f"{path} is empty or holds no question. Expected {_FORMATS}. Give another file.")
    return _with_unique_ids(records)


def write_questions(questions: Iterable[Question], path: Path) -> None:
    """Write questions as JSON Lines that `read_questions` reads back equal; the file appears whole or not at all."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.parent / f".{path.name}.draft-{uuid.uuid4().hex[:8]}"
    try:
        with draft.open("w", encoding="utf-8", newline="\n") as file:
            for question in questions:
                file.write(json.dumps(_as_json(question), ensure_ascii=False) + "\n")
            file.flush()
            os.fsync(file.fileno())
        os.replace(draft, path)
    finally:
        with contextlib.suppress(FileNotFoundError):
            draft.unlink()


def _as_json(question: Question) -> dict[str, Any]:
    value: dict[str, Any] = {"id": question.id, "question": question.question, "answers": list(question.answers)}
    if question.type is not None:
        value["type"] = question.type
    if question.answers_are != "text":
        value["answers_are"] = question.answers_are
    if question.is_impossible:
        value["is_impossible"] = True
    if question.gold_passage_ids:
        value["gold_passage_ids"] = list(question.gold_passage_ids)
    if question.contexts is not None:
        value["ctxs"] = [{"id": p.id, "title": p.title, "text": p.text} for p in question.contexts]
        if question.context_scores is not None:
            for context, score in zip(value["ctxs"], question.context_scores, strict=True):
                context["score"] = score
    return value


def _decoded_lines(path: Path) -> list[str]:
    lines = []
    for number, raw in enumerate(path.read_bytes().split(b"\n"), 1):
        line = decode_line(path, number, raw)
        if isinstance(line, Reject):
            raise InputError(
                f"{path} line {number}: {line.reason}; found {line.found!r}, expected UTF-8. Convert the file to UTF-8."
            )
        lines.append(line)
    return lines


def _records(path: Path, lines: list[str]) -> Iterator[_Record]:
    suffix = path.suffix.lower()
    if suffix in (".csv", ".tsv"):
        return _dpr_csv(path, lines)
    start = next(line.lstrip()[0] for line in lines if line.strip())
    if suffix in (".jsonl", ".ndjson"):
        return _json_lines(path, lines)
    if start not in "[{":
        raise InputError(
            f"{path} is of no known format: it starts with {start!r}. Expected {_FORMATS}. Convert the file."
        )
    try:
        content = json.loads("\n".join(lines))
    except json.JSONDecodeError as error:
        if start == "{" and error.msg == "Extra data":
            return _json_lines(path, lines)
        raise InputError(f"{path} line {error.lineno}: broken JSON ({error.msg}). Correct the file.") from error
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path}: broken JSON ({error}). Correct the file.") from error
    if isinstance(content, list):
        return (_Record(f"{path} record {number}", str(number), value) for number, value in enumerate(content, 1))
    if "question" in content and "data" not in content:
        return iter([_Record(f"{path} record 1", "1", content)])
    return _squad(path, content)


def _json_lines(path: Path, lines: list[str]) -> Iterator[_Record]:
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            value = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise _Record(f"{path} line {number}", "", line).error(
                f"broken JSON ({error})", "one object a line"
            ) from error
        yield _Record(f"{path} line {number}", str(number), value)


def _dpr_csv(path: Path, lines: list[str]) -> Iterator[_Record]:
    csv.field_size_limit(max(csv.field_size_limit(), MAX_LINE_BYTES))
    expected = "question, tab, list of answers such as ['Paris', 'City of Paris']"
    # Strict: otherwise a stray quote would silently swallow the rows after it.
    rows = csv.reader((line + "\n" for line in lines), delimiter="\t", strict=True)
    while True:
        number = rows.line_num + 1
        place = f"{path} line {number}"
        try:
            row = next(rows)
        except StopIteration:
            return
        except csv.Error as error:
            raise _Record(place, "", lines[number - 1]).error(f"broken row ({error})", expected) from error
        if not row:
            continue
        if len(row) != 2:
            raise _Record(place, "", "\t".join(row)).error(f"{len(row)} tab-separated columns", expected)
        answers = _list_literal(row[1])
        if answers is None:
            raise _Record(place, "", row[1]).error("the second column is no list", expected)
        yield _Record(place, str(number), {"question": row[0], "answers": answers})


def _list_literal(text: str) -> list[Any] | None:
    """A list written in Python's or JSON's way; no code is run."""
    # JSON first: where text is both, only JSON joins its surrogate pairs (such as \ud83d\ude00).
    for parse in (json.loads, ast.literal_eval):
        with (
            warnings.catch_warnings(action="ignore", category=SyntaxWarning),
            contextlib.suppress(ValueError, SyntaxError, TypeError, MemoryError, RecursionError),
        ):
            value = parse(text.strip())
            return value if isinstance(value, list) else None
    return None


def _squad(path: Path, content: Any) -> Iterator[_Record]:
    count = 0
    for article in articles_of(content, path):
        for index, paragraph in enumerate(article.paragraphs):
            passage_id = paragraph_id(article.title, index)
            qas = paragraph.get("qas") if isinstance(paragraph, dict) else None
            if not isinstance(qas, list):
                raise _Record(f"{path} paragraph {passage_id!r}", "", paragraph).error(
                    "no list `qas`", "SQuAD's layout"
                )
            for number, qa in enumerate(qas, 1):
                count += 1
                place = f"{path} paragraph {passage_id!r} question {number}"
                if not isinstance(qa, dict) or not isinstance(qa.get("answers", []), list):
                    raise _Record(place, "", qa).error("no object with a list `answers`", "SQuAD's layout")
                texts = [answer.get("text") if isinstance(answer, dict) else answer for answer in qa.get("answers", [])]
                # Several people answered each question. Not a dict's keys: an item may be of any type before its check.
                texts = [text for at, text in enumerate(texts) if text not in texts[:at]]
                value = {"id": qa.get("id"), "question": qa.get("question"), "answers": texts}
                yield _Record(place, str(count), value | {"gold_passage_ids": [passage_id]})


def _with_unique_ids(records: Sequence[_Record]) -> list[Question]:
    places: dict[str, str] = {}
    for record in records:
        if not isinstance(record.value, dict):
            raise record.error(f"a {type(record.value).__name__}", "an object with `question`")
        if record.value.get("id") is None:
            continue
        id = _text(record, "id", id_as_text(record.value["id"]))
        if id in places:
            raise record.error(f"the id {id!r} was already used at {places[id]}", "every id once")
        places[id] = record.place
    questions = []
    for record in records:
        given = record.value.get("id")
        id = record.default_id if given is None else str(given)
        while given is None and id in places:
            id = f"line-{id}"
        questions.append(_question(record, id))
    return questions


def _question(record: _Record, id: str) -> Question:
    value = record.value
    if value.get("answers") is not None and value.get("answer") is not None:
        raise record.error("both `answers` and `answer`", "one of them")
    answers = value.get("answers") if value.get("answer") is None else value["answer"]
    answers = [answers] if isinstance(answers, str) and value.get("answers") is None else answers
    gold = value.get("gold_passage_ids")
    contexts, scores = _contexts(record, value.get("ctxs"))
    return Question(
        id=id,
        question=_text(record, "question", value.get("question")),
        answers=_texts(record, "answers", answers),
        type=None if value.get("type") is None else _text(record, "type", value["type"]),
        gold_passage_ids=_texts(
            record, "gold_passage_ids", [id_as_text(g) for g in gold] if isinstance(gold, list) else gold
        ),
        contexts=contexts,
        context_scores=scores,
        answers_are=_answers_are(record),
        is_impossible=_is_impossible(record),
    )


def _answers_are(record: _Record) -> AnswersAre:
    kind = record.value.get("answers_are", "text")
    if kind not in get_args(AnswersAre):
        raise record.error(f"`answers_are` is {kind!r}", f"one of {', '.join(get_args(AnswersAre))}")
    return kind  # type: ignore[no-any-return]


def _is_impossible(record: _Record) -> bool:
    value = record.value.get("is_impossible", False)
    if not isinstance(value, bool):
        raise record.error(f"`is_impossible` is {value!r}", "true or false")
    return value


def _text(record: _Record, name: str, value: object) -> str:
    fault = field_fault(name, value)
    if fault:
        raise record.error(fault, f"`{name}` to be a string that is not empty")
    return str(value)


def _texts(record: _Record, name: str, value: object) -> tuple[str, ...]:
    if value is None:
        return ()
    if not isinstance(value, list):
        raise record.error(f"`{name}` is {type(value).__name__}", f"`{name}` to be a list of strings")
    return tuple(_text(record, name, item) for item in value)


def _contexts(record: _Record, ctxs: object) -> tuple[tuple[Passage, ...] | None, tuple[float, ...] | None]:
    if ctxs is None:
        return None, None
    if not isinstance(ctxs, list) or not ctxs or not all(isinstance(context, dict) for context in ctxs):
        raise record.error("`ctxs` is no list of objects, or empty", "[{id, title, text, score}, …]")
    passages = tuple(
        Passage(
            _text(record, "ctxs id", id_as_text(context.get("id"))),
            "" if context.get("title") in (None, "") else _text(record, "ctxs title", context["title"]),
            _text(record, "ctxs text", context.get("text")),
        )
        for context in ctxs
    )
    scores = tuple(_score(record, context["score"]) for context in ctxs if context.get("score") is not None)
    if scores and len(scores) != len(passages):
        raise record.error(f"{len(scores)} of {len(passages)} ctxs have a score", "all of them or none")
    return passages, scores or None


def _score(record: _Record, value: object) -> float:
    # DPR writes its scores as strings.
    try:
        score = math.nan if isinstance(value, bool) or not isinstance(value, int | float | str) else float(value)
    except (ValueError, OverflowError):
        score = math.nan
    if not math.isfinite(score):
        raise record.error(f"ctxs score {value!r}", "a finite number")
    return score
