"""The field's measures of answers and of retrieval: exact match, F1, answer in passage, recall at k.

Pure functions of strings and booleans, for one question each (save `recall_at_k`); averaging over questions, and
what counts as the prediction, is the caller's business. They follow the published scripts to the letter, quirks
included, because numbers are only comparable that way.
"""

from __future__ import annotations

import re
import string
import unicodedata
from collections import Counter
from collections.abc import Iterable, Sequence

import regex

_ARTICLES = re.compile(r"\b(a|an|the)\b")
_NO_PUNCTUATION = str.maketrans("", "", string.punctuation)
_DRQA_TOKEN = regex.compile(r"[\p{L}\p{N}\p{M}]+|[^\p{Z}\p{C}]")


def normalize_answer(text: str) -> str:
    """Lower case, without ASCII punctuation, English articles and surplus white space.

    Source: Rajpurkar et al. 2016, SQuAD, the official `evaluate-v1.1.py`, function of the same name.
    """
    return " ".join(_ARTICLES.sub(" ", text.lower().translate(_NO_PUNCTUATION)).split())


def exact_match(prediction: str, answers: Sequence[str]) -> float:
    """1.0 if the normalised prediction equals any normalised gold answer, else 0.0.

    A question without answers counts as unanswerable, whose one right prediction is the empty one.

    Source: SQuAD `evaluate-v1.1.py` (exact_match_score, metric_max_over_ground_truths); for no answers,
    `evaluate-v2.0.py`.
    """
    normalised = normalize_answer(prediction)
    return float(any(normalised == normalize_answer(answer) for answer in answers or ("",)))


def f1(prediction: str, answers: Sequence[str]) -> float:
    """Best F1 over the gold answers between bags of normalised words, in 0.0 to 1.0.

    Where prediction or answer is empty after normalisation, F1 is 1.0 if both are, else 0.0; no answers, as in
    `exact_match`.

    Source: SQuAD `evaluate-v1.1.py` (f1_score); the empty case as in `evaluate-v2.0.py` (compute_f1).
    """
    predicted = normalize_answer(prediction).split()
    return max(_f1_of_words(predicted, normalize_answer(answer).split()) for answer in answers or ("",))


def _f1_of_words(predicted: list[str], gold: list[str]) -> float:
    if not predicted or not gold:
        return float(predicted == gold)
    same = (Counter(predicted) & Counter(gold)).total()
    if not same:
        return 0.0
    precision, recall = same / len(predicted), same / len(gold)
    return 2 * precision * recall / (precision + recall)


def has_answer(text: str, answers: Iterable[str]) -> bool:
    """Whether the tokens of any answer stand in the text in one row, regardless of case.

    Unicode is brought to NFD first. An answer without any token is found nowhere; DPR's loop would find it
    everywhere.

    Source: Karpukhin et al. 2020, DPR, `dpr/data/qa_validation.py` (has_answer, match type "string"), with the
    SimpleTokenizer of DrQA (Chen et al. 2017).
    """
    # Tokens hold no control characters, so line ends around each token make the search one of substrings.
    tokens = _joined_tokens(text)
    return any(len(wanted) > 1 and wanted in tokens for wanted in map(_joined_tokens, answers))


def _joined_tokens(text: str) -> str:
    tokens = _DRQA_TOKEN.findall(unicodedata.normalize("NFD", text))
    return "\n" + "".join(token.lower() + "\n" for token in tokens)


def recall_at_k(ranked_hits: Sequence[Sequence[bool]], ks: Iterable[int]) -> dict[int, float]:
    """Share of questions with a hit among their first k passages, for each k.

    Args:
        ranked_hits: for each question, best passage first, whether the passage is a hit.
        ks: the cut-offs, each at least 1; a question with fewer passages than k is judged by those it has.

    Returns:
        {k: share}, in 0.0 to 1.0.

    Raises:
        ValueError: no questions, or a k below 1.

    Source: top-k retrieval accuracy, Karpukhin et al. 2020, section 5.1.
    """
    ks = tuple(ks)
    if not ranked_hits or any(k < 1 for k in ks):
        raise ValueError(f"recall_at_k needs questions and k of at least 1; got {len(ranked_hits)} questions, k {ks}")
    return {k: sum(any(hits[:k]) for hits in ranked_hits) / len(ranked_hits) for k in ks}
