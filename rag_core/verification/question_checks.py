"""Whether a question file has what a command needs, before hours of work or a table without scores.

Training needs an answer text of every question, evaluation an answer, retrieval an answer or a gold passage; inference
needs none. A question that no answer is right for (`is_impossible`) lacks nothing: it is left out of scores and of training.
"""

from __future__ import annotations

from collections.abc import Callable

from rag_core.corpus.formats.rows import excerpt
from rag_core.errors import InputError
from rag_core.evaluation.evaluation import has_text_answers
from rag_core.questions.formats.beir import QUERIES
from rag_core.questions.questions import Question, QuestionFile


def trainable(file: QuestionFile) -> list[Question]:
    """The questions that can be learnt: all but those that no answer is right for.

    Raises:
        InputError: a question without a known answer, answers that are regular expressions, or nothing is left.
    """
    _check_texts(file)
    learnt = [question for question in file.questions if question.answers]
    if not learnt:
        raise InputError(f"{file.path}: no question has an answer, so there is nothing to learn. Give another file.")
    return learnt


def scorable(file: QuestionFile, first: int | None = None, *, as_texts: bool = False) -> list[Question]:
    """The questions whose answers can be compared with: all but those that no answer is right for.

    Args:
        file: question file.
        first: at most so many of them, from the beginning of the file. None: all.
        as_texts: whether one of them at least must have an answer that is a text, as a likelihood needs.

    Raises:
        InputError: a question without a known answer, or none that can be scored.
    """
    check_answers(file)
    found = [question for question in file.questions if question.answers][:first]
    if not any(has_text_answers(question) or not as_texts for question in found):
        lacking = "an answer that is a text" if found else "an answer"
        raise InputError(
            f"{file.path}: none of the {len(file.questions)} questions has {lacking}, so nothing can be scored. Give another "
            "file."
        )
    return found


def _check_texts(file: QuestionFile) -> None:
    """Raise InputError unless the likelihood of every question's answer can be told: the first answer is a text."""
    check_answers(file, "trained on")
    for question, place in zip(file.questions, file.places, strict=True):
        if question.answers_are == "regex" and question.answers:
            raise InputError(
                f"{place}: the answers of question {question.id!r} are regular expressions, which a model cannot learn to "
                "write or be told the likelihood of; they can only be evaluated. Give a file with answers as texts."
            )


def check_answers(file: QuestionFile, purpose: str = "evaluated") -> None:
    """Raise InputError if there is a question whose answers are not known. `purpose` ends "cannot be …"."""
    _refuse_lacking(file, lambda question: bool(question.answers) or question.is_impossible, "answer", purpose)


def check_retrieval(file: QuestionFile) -> None:
    """Raise InputError if there is a question with neither an answer nor a gold passage, which recall is told by."""
    _refuse_lacking(
        file,
        lambda question: bool(question.answers or question.gold_passage_ids) or question.is_impossible,
        "answer and no gold passage",
        "judged by what is retrieved",
    )


def _refuse_lacking(file: QuestionFile, has: Callable[[Question], bool], what: str, purpose: str) -> None:
    lacking = [at for at, question in enumerate(file.questions) if not has(question)]
    if not lacking:
        return
    first = lacking[0]
    some = len(lacking) < len(file.questions)
    remedies = ["Add `answers`"]
    if "gold" in what:
        remedies.append("or `gold_passage_ids`")
    if some:
        remedies.append("mark the question as unanswerable (`is_impossible`: true), or leave it out")
    if file.layout == "BEIR" and "gold" in what:
        remedies = [f"Name the split's judgements (qrels/test.tsv, beside {QUERIES[0]}) as the question file"]
    ignored = f" Keys that were not read: {excerpt(', '.join(file.ignored))}." if file.ignored else ""
    raise InputError(
        f"{file.places[first]}: question {file.questions[first].id!r} has no {what}, so it cannot be {purpose} "
        f"({len(lacking)} of {len(file.questions)} questions have none).{ignored} {', '.join(remedies)}."
    )
