"""Evaluate answers and retrieval: EM, F1 and recall@k, over all questions and by question type.

Recall is measured in two ways: the id of a gold passage is among the first k (if the question names one), or one of the
first k contains the answer's string (DPR's rule, arXiv 2004.04906). Scores are fractions between 0 and 1.

Not every question has every score, so each mean is over the questions that have it. A question is unanswerable if no
answer is right (SQuAD 2.0), or if it has neither answers nor gold passages. It has no scores, is left out of every
mean, and is counted as `unanswerable`. Answers that are regular expressions have no F1.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import regex

from rag_core.corpus.passages import NO_PASSAGE, Passage
from rag_core.embeddings.text_encoder import Precision, TextEncoder
from rag_core.errors import ArtifactError, InputError
from rag_core.evaluation.metrics import (
    Match,
    exact_match,
    f1,
    has_answer,
    has_regex_answer,
    recall_at_k,
    regex_exact_match,
    written_without_spaces,
)
from rag_core.evaluation.predictions import read_predictions
from rag_core.evaluation.scores import Evaluation, Scores, by_type, mean_scores
from rag_core.index.retriever import Retriever
from rag_core.questions.questions import Question

if TYPE_CHECKING:
    from rag_core.index.passage_index import PassageIndex

__all__ = [
    "Evaluation",
    "Scores",
    "answer_scores",
    "by_type",
    "check_own_encoder",
    "evaluate_predictions",
    "evaluate_retrieval",
    "gold_hint",
    "has_text_answers",
    "is_unanswerable",
    "mean_scores",
    "retrieval_scores",
    "spaceless_hint",
]


def evaluate_predictions(
    predictions: Path, questions: Sequence[Question], ks: Sequence[int], match: Match = "words"
) -> Evaluation:
    """Score a predictions artifact.

    Raises:
        InputError: a question has no prediction, the prediction under its id answers another question, or no question
            has an answer to compare with.
        ArtifactError: the predictions are damaged, or answer a question twice.
    """
    rows: dict[str, dict[str, Any]] = {}
    for row in read_predictions(predictions):
        if row["id"] in rows:
            raise ArtifactError(
                f"{predictions} has two predictions for the question {row['id']!r}, so neither can be scored. Run `rag "
                "infer` again."
            )
        rows[row["id"]] = row
    _check_same_questions(predictions, rows, questions)
    if not any(question.answers and not question.is_impossible for question in questions):
        raise InputError("None of the questions has an answer, so nothing can be compared. Add `answers` to the file.")
    scored = [(question.type, _scores_of(rows[question.id], question, ks, match)) for question in questions]
    return by_type(scored, match)


def evaluate_retrieval(
    index: Retriever,
    encoder: TextEncoder,
    questions: Sequence[Question],
    ks: Sequence[int],
    precision: Precision = "float32",
    match: Match = "words",
) -> Evaluation:
    """Measure recall@k of an index and a question encoder, without a generator.

    Raises:
        InputError: no question has an answer or a gold passage to compare with.
    """
    answerable = [question for question in questions if not is_unanswerable(question)]
    if not answerable:
        raise InputError(
            "None of the questions has an answer or a gold passage, so nothing can be compared. Add `answers` or "
            "`gold_passage_ids` to the file."
        )
    vectors_BD = encoder.encode([question.question for question in answerable], precision=precision)
    rows_BK = index.search(vectors_BD, max(ks)).rows_BK
    scored: list[tuple[str | None, Scores | None]] = [
        (question.type, retrieval_scores(passages_K, question, ks, match))
        for question, passages_K in zip(answerable, index.passages_of(rows_BK), strict=True)
    ]
    unanswerable = [(question.type, None) for question in questions if is_unanswerable(question)]
    return by_type([*scored, *unanswerable], match)


def check_own_encoder(index: Retriever, encoder: TextEncoder) -> None:
    """Raise ArtifactError if `encoder`, loaded from where the index says, is no longer the one that made the index."""
    fingerprint = encoder.fingerprint()
    if fingerprint != index.encoder_fingerprint:
        raise ArtifactError(
            f"{index.manifest.details['encoder']} is no longer the encoder that made the index {index.path} "
            f"(fingerprint {fingerprint[:12]}…, expected {index.encoder_fingerprint[:12]}…), so its vectors do not "
            "fit. Restore the former weights, name a question encoder that fits (--encoder), or embed and index the "
            "corpus again."
        )


def is_unanswerable(question: Question) -> bool:
    """Whether a question has no right answer (SQuAD 2.0), or has neither answers nor gold passages."""
    return question.is_impossible or not (question.answers or question.gold_passage_ids)


def has_text_answers(question: Question) -> bool:
    """Whether the question has answers as text, on which a generator can be trained and its likelihood measured."""
    return bool(question.answers) and not question.is_impossible and question.answers_are == "text"


def gold_hint(questions: Sequence[Question], index: PassageIndex) -> str:
    """A hint if gold passages are not in the index, so that nobody blames the encoder for their recall; else empty."""
    gold = {passage_id for question in questions for passage_id in question.gold_passage_ids}
    lacking = gold - index.ids_among(gold)
    if not lacking:
        return ""
    return (
        f"{len(lacking):,} of {len(gold):,} gold passages are not in the index (such as {min(lacking)!r}), so they "
        "count as not found. Was the index made from another corpus, or from a part of it?"
    )


def spaceless_hint(questions: Sequence[Question], match: Match) -> str:
    """A hint if the rule `words` compares answers in scripts without spaces between words; else empty."""
    spaceless = [
        question
        for question in questions
        if has_text_answers(question) and any(map(written_without_spaces, question.answers))
    ]
    if match != "words" or not spaceless:
        return ""
    example = next(answer for answer in spaceless[0].answers if written_without_spaces(answer))
    return (
        f"{len(spaceless)} of {len(questions)} questions have answers in a script without spaces between words "
        f"(question {spaceless[0].id!r}: {example[:40]!r}). The published rule takes such an answer for one long word. "
        "To compare characters, give --match characters (in a YAML file `match: characters`)."
    )


def answer_scores(prediction: str, question: Question, match: Match = "words") -> Scores:
    """EM and F1 of one answer, best over the gold answers. Regular expressions have EM only; no answers, no scores.

    Raises:
        InputError: a regular expression is invalid, or takes too long to match.
    """
    if question.is_impossible or not question.answers:
        return {}
    if question.answers_are == "regex":
        with _naming_the_pattern(question):
            return {"em": regex_exact_match(prediction, question.answers)}
    return {"em": exact_match(prediction, question.answers, match), "f1": f1(prediction, question.answers, match)}


def retrieval_scores(
    passages: Sequence[Passage], question: Question, ks: Sequence[int], match: Match = "words"
) -> Scores:
    """Hits at each k: `answer_recall@k` by answer string; `recall@k` by gold id if there is one, else by answer string.

    Raises:
        InputError: as in `answer_scores`.
    """
    scores: Scores = {}
    ks = [k for k in ks if k <= len(passages)]
    if question.is_impossible or not ks:
        return scores
    if question.answers:
        hits = recall_at_k([_contained(passages[: max(ks)], question, match)], ks)
        scores |= {f"recall@{k}": hits[k] for k in ks} | {f"answer_recall@{k}": hits[k] for k in ks}
    if question.gold_passage_ids:
        gold = [passage.id in question.gold_passage_ids for passage in passages]
        scores |= {f"recall@{k}": hit for k, hit in recall_at_k([gold], ks).items()}
    return scores


def _contained(passages: Sequence[Passage], question: Question, match: Match) -> list[bool]:
    if question.answers_are == "text":
        return [has_answer(passage.text, question.answers, match) for passage in passages]
    with _naming_the_pattern(question):
        return [has_regex_answer(passage.text, question.answers) for passage in passages]


@contextlib.contextmanager
def _naming_the_pattern(question: Question) -> Iterator[None]:
    try:
        yield
    except (TimeoutError, regex.error) as error:
        patterns = ", ".join(repr(pattern[:200]) for pattern in question.answers)
        fault = "takes too long to match" if isinstance(error, TimeoutError) else f"cannot be read ({error})"
        raise InputError(
            f"Question {question.id!r}: one of its answers {fault} as a regular expression: {patterns}. Simplify the "
            "expression, or set `answers_are: text` if the answers are plain text."
        ) from error


def _scores_of(row: Mapping[str, Any], question: Question, ks: Sequence[int], match: Match) -> Scores | None:
    if is_unanswerable(question):
        return None
    passages = [Passage(passage["id"], passage["title"], passage["text"]) for passage in row["passages"]]
    # NO_PASSAGE marks a closed-book answer, for which nothing was retrieved.
    read = [passage for passage in passages if passage != NO_PASSAGE]
    return {**answer_scores(row["answer"], question, match), **retrieval_scores(read, question, ks, match)}


def _check_same_questions(
    predictions: Path, rows: Mapping[str, Mapping[str, Any]], questions: Sequence[Question]
) -> None:
    missing = [question.id for question in questions if question.id not in rows]
    if missing:
        raise InputError(
            f"{predictions} has no prediction for {len(missing)} of {len(questions)} questions (first: id "
            f"{missing[0]!r}). Evaluate with the question file that was answered."
        )
    others = [question for question in questions if rows[question.id]["question"] != question.question]
    if others:
        raise InputError(
            f"{predictions} answers other questions under the ids of {len(others)} of {len(questions)} questions "
            f"(first: id {others[0].id!r} is {rows[others[0].id]['question'][:80]!r} there, and "
            f"{others[0].question[:80]!r} in the question file). Evaluate with the question file that was answered."
        )
