"""How good answers and retrieval are: EM, F1 and recall@k, over all questions and by question type.

Recall is told in both senses: the gold passage's id is among the first k (where the question names one), and the
answer's string is contained in one of them (DPR's rule, arXiv 2004.04906). Scores are fractions between 0 and 1.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from rag_core.errors import ArtefactError, InputError
from rag_core.metrics import exact_match, f1, has_answer, recall_at_k
from rag_core.passages import Passage
from rag_core.predictions import read_predictions
from rag_core.questions import Question
from rag_core.retriever import Retriever
from rag_core.text_encoder import Precision, TextEncoder

Scores = dict[str, float]


def evaluate_predictions(predictions: Path, questions: Sequence[Question], ks: Sequence[int]) -> dict[str, Scores]:
    """Scores of a predictions artefact: {"overall": {...}, type: {...}, …}.

    Raises:
        InputError: a question has no prediction, or no question has an answer to compare with.
    """
    rows = {row["id"]: row for row in read_predictions(predictions)}
    missing = [question.id for question in questions if question.id not in rows]
    if missing:
        raise InputError(
            f"{predictions} has no prediction for {len(missing)} of {len(questions)} questions (first: id {missing[0]!r}). "
            "Evaluate with the question file that was answered."
        )
    if not any(question.answers for question in questions):
        raise InputError("None of the questions has an answer, so nothing can be compared. Add `answers` to the file.")
    scored = [
        (question.type, {**answer_scores(rows[question.id]["answer"], question), **_recall(rows, question, ks)})
        for question in questions
    ]
    return by_type(scored)


def evaluate_retrieval(
    index: Retriever,
    encoder: TextEncoder,
    questions: Sequence[Question],
    ks: Sequence[int],
    precision: Precision = "float32",
) -> dict[str, Scores]:
    """Recall@k of an index and a question encoder, without a generator: {"overall": {...}, type: {...}, …}."""
    vectors_BD = encoder.encode([question.question for question in questions], precision=precision)
    rows_BK = index.search(vectors_BD, max(ks)).rows_BK
    return by_type(
        [
            (question.type, retrieval_scores(passages_K, question, ks))
            for question, passages_K in zip(questions, index.passages_of(rows_BK), strict=True)
        ]
    )


def check_own_encoder(index: Retriever, encoder: TextEncoder) -> None:
    """Raise ArtefactError if `encoder`, which stands where the index's own one stood, is not that one any more."""
    found = encoder.fingerprint()
    if found != index.encoder_fingerprint:
        raise ArtefactError(
            f"{index.manifest.details['encoder']} is not the encoder that made the index {index.path} any more (fingerprint "
            f"{found[:12]}…, {index.encoder_fingerprint[:12]}… was expected), so its vectors do not fit. Put the former "
            "weights there, name a question encoder that fits (--encoder), or embed and index the corpus again."
        )


def answer_scores(prediction: str, question: Question) -> Scores:
    """EM and F1 of one answer, best over the gold answers; nothing for a question without any."""
    if not question.answers:
        return {}
    return {"em": exact_match(prediction, question.answers), "f1": f1(prediction, question.answers)}


def retrieval_scores(passages: Sequence[Passage], question: Question, ks: Sequence[int]) -> Scores:
    """Hits at each k: `recall@k` by gold id where the question names one, else by answer string; `answer_recall@k`."""
    scores: Scores = {}
    ks = [k for k in ks if k <= len(passages)]
    if question.answers:
        contained = [has_answer(passage.text, question.answers) for passage in passages[: max(ks, default=0)]]
        scores |= {f"answer_recall@{k}": hit for k, hit in recall_at_k([contained], ks).items()}
        scores |= {f"recall@{k}": scores[f"answer_recall@{k}"] for k in ks}
    if question.gold_passage_ids:
        gold = [passage.id in question.gold_passage_ids for passage in passages]
        scores |= {f"recall@{k}": hit for k, hit in recall_at_k([gold], ks).items()}
    return scores


def by_type(scored: Sequence[tuple[str | None, Mapping[str, float]]]) -> dict[str, Scores]:
    """Means over all questions ("overall") and over those of each type; `count` is the number of questions."""
    groups: dict[str, list[Mapping[str, float]]] = {"overall": [scores for _, scores in scored]}
    for name in sorted({kind for kind, _ in scored if kind}):
        groups[name] = [scores for kind, scores in scored if kind == name]
    return {name: mean_scores(group) | {"count": float(len(group))} for name, group in groups.items()}


def mean_scores(scored: Sequence[Mapping[str, float]]) -> Scores:
    """Mean of every score over the questions that have it."""
    names = dict.fromkeys(name for scores in scored for name in scores)
    return {name: float(np.mean([scores[name] for scores in scored if name in scores])) for name in names}


def _recall(rows: Mapping[str, dict[str, Any]], question: Question, ks: Sequence[int]) -> Scores:
    passages = [Passage(one["id"], one["title"], one["text"]) for one in rows[question.id]["passages"]]
    return retrieval_scores(passages, question, ks)
