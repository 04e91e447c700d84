"""How good answers and retrieval are: EM, F1 and recall@k, over all questions and by question type.

Recall is told in both senses: the gold passage's id is among the first k (where the question names one), and the
answer's string is contained in one of them (DPR's rule, arXiv 2004.04906). Scores are fractions between 0 and 1.

A question has the scores that can be told of it, and every mean is over the questions that have the score. A question
that no answer is right for (SQuAD 2.0), or that has neither answers nor gold passages, has none: it is left out of
every mean and counted apart, as `unanswerable`. Answers that are regular expressions have no F1.
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
    """Scores of a predictions artifact.

    Raises:
        InputError: a question has no prediction, or that of another question; or no question has an answer to compare with.
        ArtifactError: the predictions are damaged, or answer one question twice.
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
    return by_type([(one.type, _scores_of(rows[one.id], one, ks, match)) for one in questions], match)


def evaluate_retrieval(
    index: Retriever,
    encoder: TextEncoder,
    questions: Sequence[Question],
    ks: Sequence[int],
    precision: Precision = "float32",
    match: Match = "words",
) -> Evaluation:
    """Recall@k of an index and a question encoder, without a generator.

    Raises:
        InputError: no question has an answer or a gold passage to compare with.
    """
    asked = [question for question in questions if not is_unanswerable(question)]
    if not asked:
        raise InputError(
            "None of the questions has an answer or a gold passage, so nothing can be compared. Add `answers` or "
            "`gold_passage_ids` to the file."
        )
    vectors_BD = encoder.encode([question.question for question in asked], precision=precision)
    rows_BK = index.search(vectors_BD, max(ks)).rows_BK
    scored: list[tuple[str | None, Scores | None]] = [
        (question.type, retrieval_scores(passages_K, question, ks, match))
        for question, passages_K in zip(asked, index.passages_of(rows_BK), strict=True)
    ]
    return by_type([*scored, *((one.type, None) for one in questions if is_unanswerable(one))], match)


def check_own_encoder(index: Retriever, encoder: TextEncoder) -> None:
    """Raise ArtifactError if `encoder`, which stands where the index's own one stood, is not that one any more."""
    found = encoder.fingerprint()
    if found != index.encoder_fingerprint:
        raise ArtifactError(
            f"{index.manifest.details['encoder']} is not the encoder that made the index {index.path} any more (fingerprint "
            f"{found[:12]}…, {index.encoder_fingerprint[:12]}… was expected), so its vectors do not fit. Put the former "
            "weights there, name a question encoder that fits (--encoder), or embed and index the corpus again."
        )


def is_unanswerable(question: Question) -> bool:
    """Whether nothing can be right for a question: no answer is (SQuAD 2.0), or none is known, nor a gold passage."""
    return question.is_impossible or not (question.answers or question.gold_passage_ids)


def has_text_answers(question: Question) -> bool:
    """Whether a generator can be taught the question's answers, and its likelihood of them be told."""
    return bool(question.answers) and not question.is_impossible and question.answers_are == "text"


def gold_hint(questions: Sequence[Question], index: PassageIndex) -> str:
    """One sentence where gold passages are not in the index, so that nobody takes their recall for the encoder's."""
    gold = {one for question in questions for one in question.gold_passage_ids}
    lacking = gold - index.ids_among(gold)
    if not lacking:
        return ""
    return (
        f"{len(lacking):,} of {len(gold):,} gold passages are not in the index (such as {min(lacking)!r}), and count as not "
        "found. Was it made from another corpus, or a part of one?"
    )


def spaceless_hint(questions: Sequence[Question], match: Match) -> str:
    """One sentence where the rule `words` compares answers in scripts that have no words; else empty."""
    found = [
        question
        for question in questions
        if has_text_answers(question) and any(map(written_without_spaces, question.answers))
    ]
    if match != "words" or not found:
        return ""
    example = next(answer for answer in found[0].answers if written_without_spaces(answer))
    return (
        f"{len(found)} of {len(questions)} questions have answers in a script without spaces between words (question "
        f"{found[0].id!r}: {example[:40]!r}), which the published rule takes for one long word. To compare characters, "
        "give --match characters (in a YAML file `match: characters`)."
    )


def answer_scores(prediction: str, question: Question, match: Match = "words") -> Scores:
    """EM and F1 of one answer, best over the gold answers; EM alone for regular expressions; nothing without answers.

    Raises:
        InputError: a regular expression that is none, or that takes too long.
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
    """Hits at each k: `recall@k` by gold id where the question names one, else by answer string; `answer_recall@k`.

    Raises:
        InputError: as `answer_scores`.
    """
    scores: Scores = {}
    ks = [k for k in ks if k <= len(passages)]
    if question.is_impossible or not ks:
        return scores
    if question.answers:
        found = recall_at_k([_contained(passages[: max(ks)], question, match)], ks)
        scores |= {f"recall@{k}": found[k] for k in ks} | {f"answer_recall@{k}": found[k] for k in ks}
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
        patterns = ", ".join(repr(one[:200]) for one in question.answers)
        fault = "takes too long to match" if isinstance(error, TimeoutError) else f"cannot be read ({error})"
        raise InputError(
            f"Question {question.id!r}: one of its answers {fault} as a regular expression: {patterns}. Write it more "
            "simply, or give `answers_are: text` if it is none."
        ) from error


def _scores_of(row: Mapping[str, Any], question: Question, ks: Sequence[int], match: Match) -> Scores | None:
    if is_unanswerable(question):
        return None
    passages = [Passage(one["id"], one["title"], one["text"]) for one in row["passages"]]
    # A closed-book answer was read from nothing, so nothing was retrieved.
    read = [passage for passage in passages if passage != NO_PASSAGE]
    return {**answer_scores(row["answer"], question, match), **retrieval_scores(read, question, ks, match)}


def _check_same_questions(
    predictions: Path, rows: Mapping[str, Mapping[str, Any]], questions: Sequence[Question]
) -> None:
    missing = [question.id for question in questions if question.id not in rows]
    if missing:
        raise InputError(
            f"{predictions} has no prediction for {len(missing)} of {len(questions)} questions (first: id {missing[0]!r}). "
            "Evaluate with the question file that was answered."
        )
    others = [question for question in questions if rows[question.id]["question"] != question.question]
    if others:
        raise InputError(
            f"{predictions} answers other questions under the ids of {len(others)} of {len(questions)} questions (first: "
            f"id {others[0].id!r} is {rows[others[0].id]['question'][:80]!r} there, and {others[0].question[:80]!r} in the "
            "file). Evaluate with the question file that was answered."
        )
