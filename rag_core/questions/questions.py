"""Questions with their gold answers, gold passages, and contexts retrieved elsewhere.

Reads the layouts of many data sets (`rag_core.questions.formats`) and writes one canonical JSON Lines. Unlike the
corpus readers, this one is strict: any bad row raises InputError, because a question left out or misread would
silently change a result. Keys that no layout knows are ignored. Nothing is looked up in a corpus.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import uuid
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path
from typing import Any, Literal, get_args

from rag_core.corpus.formats.first_bytes import refuse_archives_and_utf16, refuse_other_files
from rag_core.corpus.formats.rows import id_as_text
from rag_core.corpus.passages import Passage
from rag_core.errors import ConfigError, InputError
from rag_core.questions.formats import beir
from rag_core.questions.formats.containers import FORMATS, read_records
from rag_core.questions.formats.layouts import WANTED, canonical
from rag_core.questions.formats.patterns import pattern_fault
from rag_core.questions.formats.records import Record, number, text, texts
from rag_core.storage.artifact import local_file

AnswersAre = Literal["text", "regex"]


@dataclass(frozen=True, slots=True)
class Question:
    """A question. `contexts` are passages that came with it, best first; `context_scores` are their scores, if known.

    `answers_are` says whether `answers` are texts, or regular expressions that an answer must match (CuratedTREC).
    `is_impossible`: unanswerable, and saying so is the right answer (SQuAD 2.0); `answers` is then empty.
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
class QuestionFile:
    """All questions of a file, the place of each ("FILE line 3"), and the recognised layout.

    `ignored` are keys of the file that its layout does not read, for messages about missing values.
    """

    path: Path
    layout: str
    questions: list[Question]
    places: list[str]
    ignored: tuple[str, ...] = ()


def read_questions(path: Path, answers_are: AnswersAre | None = None) -> list[Question]:
    """All questions of a file; arguments and errors as for `read_question_file`."""
    return read_question_file(path, answers_are).questions


def read_question_file(path: Path, answers_are: AnswersAre | None = None) -> QuestionFile:
    """Read all questions of a file; its format is recognised by content.

    A question without an id gets its line number (or row, or number in the list), from 1. If other questions of
    the file have answers, an empty list of answers means unanswerable (`is_impossible`), as in SQuAD 2.0's own
    script.

    Args:
        path: a file, here or in an object store; for BEIR's data sets, the judgements of a split.
        answers_are: the kind of answers in rows without a key `answers_are`; default: text.

    Raises:
        InputError: missing or empty file, an archive other than gzip, unknown format, a bad row, or a duplicate id.
    """
    place, path = path, _readable_file(path)
    records = _records(path, answers_are)
    first = next(records, None)
    if first is not None and beir.is_judgement(first):
        return _judged_questions(place, path, chain([first], records), answers_are)
    file = _question_file(path, chain([] if first is None else [first], records), answers_are)
    if not file.questions:
        raise InputError(f"{path} is empty or holds no question. Expected {FORMATS}. Give another file.")
    return file


def as_answers_are(value: str | None) -> AnswersAre | None:
    """Check the value of a setting `answers_are`; raise ConfigError if it is not a known kind."""
    if value is not None and value not in get_args(AnswersAre):
        raise ConfigError(f"answers_are is {value!r}; known are {' and '.join(get_args(AnswersAre))}. Correct it.")
    return value  # type: ignore[return-value]


def files_of_questions(path: Path) -> list[Path]:
    """The local files from which `path`'s questions are read: one, or two for BEIR. Their contents are its identity."""
    place, path = path, local_file(path)
    if not path.is_file():
        return [path]
    with contextlib.suppress(InputError):  # reading the questions raises this error again
        first = next(_records(path, None), None)
        if first is not None and beir.is_judgement(first):
            return [path, beir.queries_of(place)]
    return [path]


def write_questions(questions: Iterable[Question], path: Path) -> None:
    """Write questions as JSON Lines; `read_questions` returns equal ones. The file appears whole or not at all."""
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
    value: dict[str, Any] = {"id": question.id, "question": question.question}
    if question.answers or question.is_impossible:  # an empty list would say that no answer is right
        value["answers"] = list(question.answers)
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


def _readable_file(path: Path) -> Path:
    """`path` as a local file; InputError if it is missing, or cannot hold questions."""
    path = local_file(path)
    if not path.is_file():
        fault = "it is a folder" if path.is_dir() else "it does not exist"
        raise InputError(
            f"{path} cannot be read: {fault}. A file of questions was expected ({FORMATS}). Correct the path."
        )
    refuse_archives_and_utf16(path, gzip_too=False)
    refuse_other_files(path)
    return path


def _records(path: Path, answers_are: AnswersAre | None) -> Iterator[Record]:
    return read_records(path, WANTED, cells_are_answers=answers_are == "regex")


def _judged_questions(
    place: Path, path: Path, judgements: Iterator[Record], answers_are: AnswersAre | None
) -> QuestionFile:
    """The queries that BEIR's judgements mention, in the order of the queries file, with their gold passages."""
    gold = beir.gold_passages(judgements)
    queries_path = beir.queries_of(place)
    queries = _question_file(queries_path, _records(_readable_file(queries_path), answers_are), answers_are)
    missing = gold.keys() - {question.id for question in queries.questions}
    if missing:
        first = min(missing)
        raise InputError(
            f"{gold[first][1]}: the query {first!r} is not in {queries_path} ({len(missing)} of {len(gold)} are not). "
            "Put the queries of the same data set there."
        )
    judged = [
        (replace(question, gold_passage_ids=tuple(gold[question.id][0])), question_place)
        for question, question_place in zip(queries.questions, queries.places, strict=True)
        if question.id in gold
    ]
    if not judged:
        raise InputError(f"{path} names no relevant passage (no `score` above 0), so no question. Give another file.")
    questions, places = [question for question, _ in judged], [question_place for _, question_place in judged]
    return QuestionFile(path, beir.LAYOUT, questions, places, queries.ignored)


def _question_file(path: Path, records: Iterator[Record], answers_are: AnswersAre | None) -> QuestionFile:
    """Build the questions one record at a time: a record may be a thousand times as large as its question."""
    questions: list[Question] = []
    places: list[str] = []
    layouts: Counter[str] = Counter()
    place_of_id: dict[str, str] = {}
    without_id: list[tuple[int, str]] = []
    empty: list[int] = []
    ignored: dict[str, None] = {}
    for record in records:
        layout, value = canonical(record)
        if value.get("id") is None:
            id = ""
            without_id.append((len(questions), record.default_id))
        else:
            id = text(record, layout.names.get("id", "id"), id_as_text(value["id"]))
            if id in place_of_id:
                raise record.error(f"the id {id!r} was already used at {place_of_id[id]}", "every id once")
            place_of_id[id] = record.place
        if value.get("answers") == [] and value.get("is_impossible") is None:
            empty.append(len(questions))
        questions.append(_question(record, id, value, layout.names, answers_are))
        places.append(record.place)
        layouts[record.layout or layout.name] += 1
        if len(ignored) < 20:
            ignored |= dict.fromkeys(key for key in record.value if isinstance(key, str) and key not in layout.reads)
    for index, default_id in without_id:
        id = default_id
        while id in place_of_id:
            id = f"line-{id}"
        questions[index] = replace(questions[index], id=id)
    if any(question.answers for question in questions):  # else the file has no answers, so they are unknown
        for index in empty:
            questions[index] = replace(questions[index], is_impossible=True)
    layout_names = " and ".join(name for name, _ in layouts.most_common())
    return QuestionFile(path, layout_names, questions, places, tuple(ignored))


def _question(
    record: Record, id: str, value: dict[str, Any], names: dict[str, str], default: AnswersAre | None
) -> Question:
    """Build the question from canonical keys; `names` maps them to the layout's own keys, for messages."""
    if value.get("question") is None:
        raise record.error(
            f"missing question among the keys {', '.join(map(repr, list(record.value)[:20])) or '(none)'}",
            f"`{names.get('question', 'question')}`, or another layout of docs/formats.md",
        )
    contexts, scores = _contexts(record, value.get("ctxs"))
    answers_are = _answers_are(record, value, default)
    is_impossible = value.get("is_impossible") or False
    if not isinstance(is_impossible, bool):
        raise record.error(f"`is_impossible` is {is_impossible!r}", "true or false")
    answers = texts(record, names.get("answers", "answers"), value.get("answers"))
    if answers and is_impossible:
        raise record.error("`is_impossible` is true, but there are answers", "one of them")
    if answers_are == "regex":
        _check_patterns(record, answers)
    gold = value.get("gold_passage_ids")
    return Question(
        id=id,
        question=text(record, names.get("question", "question"), value["question"]),
        answers=answers,
        type=None if value.get("type") is None else text(record, "type", value["type"]),
        gold_passage_ids=texts(
            record,
            names.get("gold_passage_ids", "gold_passage_ids"),
            [id_as_text(passage_id) for passage_id in gold] if isinstance(gold, list) else gold,
        ),
        contexts=contexts,
        context_scores=scores,
        answers_are=answers_are,
        is_impossible=is_impossible,
    )


def _answers_are(record: Record, value: dict[str, Any], default: AnswersAre | None) -> AnswersAre:
    kind = value.get("answers_are") or default or "text"
    if kind not in get_args(AnswersAre):
        raise record.error(f"`answers_are` is {kind!r}", f"one of {', '.join(get_args(AnswersAre))}")
    return kind


def _check_patterns(record: Record, answers: tuple[str, ...]) -> None:
    for answer in answers:
        fault = pattern_fault(answer)
        if fault:
            raise record.error(
                f"the answer {answer[:80]!r} cannot be used as a regular expression: {fault}", "one that compiles"
            )


def _contexts(record: Record, ctxs: object) -> tuple[tuple[Passage, ...] | None, tuple[float, ...] | None]:
    if ctxs is None:
        return None, None
    if not isinstance(ctxs, list) or not ctxs or not all(isinstance(context, dict) for context in ctxs):
        raise record.error("`ctxs` is not a list of objects, or is empty", "[{id, title, text, score}, …]")
    passages = tuple(
        Passage(
            text(record, "ctxs id", id_as_text(context.get("id"))),
            "" if context.get("title") in (None, "") else text(record, "ctxs title", context["title"]),
            text(record, "ctxs text", context.get("text")),
        )
        for context in ctxs
    )
    scores = tuple(_score(record, context["score"]) for context in ctxs if context.get("score") is not None)
    if scores and len(scores) != len(passages):
        raise record.error(f"{len(scores)} of {len(passages)} ctxs have a score", "all of them or none")
    return passages, scores or None


def _score(record: Record, value: object) -> float:
    score = number(value)  # DPR writes its scores as strings
    if not math.isfinite(score):
        raise record.error(f"ctxs score {value!r}", "a finite number")
    return score
