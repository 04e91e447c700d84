"""Check that a question file has what a command needs, before the command starts hours of work.

Training needs a text answer for every question, evaluation any answer, retrieval an answer or a gold passage; inference
needs neither. An unanswerable question (`is_impossible`) passes every check: it is left out of scores and training.
"""

from __future__ import annotations

from collections.abc import Callable

from rag_core.corpus.formats.rows import excerpt
from rag_core.errors import InputError
from rag_core.evaluation.evaluation import has_text_answers
from rag_core.questions.formats.beir import QUERIES
from rag_core.questions.questions import Question, QuestionFile


def trainable(file: QuestionFile) -> list[Question]:
    """The questions to train on: all except the unanswerable ones.

    Raises:
        InputError: a question has no known answer or answers that are regular expressions, or no question is left.
    """
    _check_texts(file)
    answered = [question for question in file.questions if question.answers]
    if not answered:
        raise InputError(f"{file.path}: no question has an answer, so there is nothing to learn. Give another file.")
    return answered


def scorable(file: QuestionFile, first: int | None = None, *, as_texts: bool = False) -> list[Question]:
    """The questions to score: all except the unanswerable ones.

    Args:
        file: question file.
        first: return at most this many, from the beginning of the file. None: all.
        as_texts: require at least one question with a text answer, as a likelihood needs.

    Raises:
        InputError: a question has no known answer, or no question can be scored.
    """
    check_answers(file)
    answered = [question for question in file.questions if question.answers][:first]
    if not any(has_text_answers(question) or not as_texts for question in answered):
        lacking = "an answer that is a text" if answered else "an answer"
        raise InputError(
            f"{file.path}: none of the {len(file.questions)} questions has {lacking}, so nothing can be scored. "
            "Give another file."
        )
    return answered


def _check_texts(file: QuestionFile) -> None:
    """Raise InputError unless every answerable question has a text answer, whose likelihood can be computed."""
    check_answers(file, "trained on")
    for question, place in zip(file.questions, file.places, strict=True):
        if question.answers_are == "regex" and question.answers:
            raise InputError(
                f"{place}: the answers of question {question.id!r} are regular expressions. A model can neither learn "
                "to write them nor give them a likelihood; they serve only for evaluation. Give a file with answers as "
                "texts."
            )


def check_answers(file: QuestionFile, purpose: str = "evaluated") -> None:
    """Raise InputError if an answerable question has no answers. `purpose` ends the message's "cannot be …"."""
    _refuse_lacking(file, lambda question: bool(question.answers) or question.is_impossible, "answer", purpose)


def check_retrieval(file: QuestionFile) -> None:
    """Raise InputError if an answerable question has neither an answer nor a gold passage; recall needs one of them."""
    _refuse_lacking(
        file,
        lambda question: bool(question.answers or question.gold_passage_ids) or question.is_impossible,
        "answer and no gold passage",
        "judged by what is retrieved",
    )


def _refuse_lacking(file: QuestionFile, is_complete: Callable[[Question], bool], needed: str, purpose: str) -> None:
    lacking = [position for position, question in enumerate(file.questions) if not is_complete(question)]
    if not lacking:
        return
    first = lacking[0]
    some = len(lacking) < len(file.questions)
    remedies = ["Add `answers`"]
    if "gold" in needed:
        remedies.append("or `gold_passage_ids`")
    if some:
        remedies.append("mark the question as unanswerable (`is_impossible`: true), or leave it out")
    if file.layout == "BEIR" and "gold" in needed:
        remedies = [f"Name the split's judgements (qrels/test.tsv, beside {QUERIES[0]}) as the question file"]
    ignored = f" Keys that were not read: {excerpt(', '.join(file.ignored))}." if file.ignored else ""
    raise InputError(
        f"{file.places[first]}: question {file.questions[first].id!r} has no {needed}, so it cannot be {purpose} "
        f"({len(lacking)} of {len(file.questions)} questions have none).{ignored} {', '.join(remedies)}."
    )
