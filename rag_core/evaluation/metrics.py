"""Metrics of answers and retrieval: exact match, F1, answer in passage, recall at k.

These are pure functions of strings and booleans, for one question each (except `recall_at_k`). The caller chooses the
prediction and averages over questions.

The rule `words` follows the published scripts, quirks included, because only then are numbers comparable. It differs
from them for non-ASCII text only: different ways to write the same letter (NFC, NFD) or quote (’ and ') compare equal.
The rule `characters` is for scripts without spaces between words. Regular expressions are matched as in DrQA.
"""

from __future__ import annotations

import functools
import re
import string
import unicodedata
import warnings
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any, Literal

import regex

from rag_core.questions.formats.patterns import FLAGS

Match = Literal["words", "characters"]

# Time limit of one match of a regular expression, in seconds. Reasonable ones take microseconds.
REGEX_SECONDS = 2.0

_ARTICLES = re.compile(r"\b(a|an|the)\b")
_NO_PUNCTUATION = str.maketrans("", "", string.punctuation)
_ANY_PUNCTUATION = regex.compile(rf"\p{{P}}|[{re.escape(string.punctuation)}]")
_DRQA_TOKEN = regex.compile(r"[\p{L}\p{N}\p{M}]+|[^\p{Z}\p{C}]")
# Typographic quotes with an ASCII counterpart, and the apostrophe that Unicode classifies as a letter.
_ASCII_QUOTES = str.maketrans("\u2018\u2019\u201a\u201b\u02bc\u201c\u201d\u201e\u201f", "'" * 5 + '"' * 4)
# Scripts without spaces between words, and Hangul, whose words carry particles (KorQuAD also scores its characters).
# U+30FC lengthens a Japanese vowel and belongs to no script.
_SPACELESS = r"\p{Han}\p{Hiragana}\p{Katakana}\u30fc\p{Hangul}\p{Thai}\p{Lao}\p{Khmer}\p{Myanmar}"
_SPACELESS_LETTER = regex.compile(f"[{_SPACELESS}]")
_CHARACTER_TOKEN = regex.compile(
    rf"(?V1)[{_SPACELESS}]\p{{M}}*|[[\p{{L}}\p{{N}}\p{{M}}]--[{_SPACELESS}]]+|[\p{{S}}--\p{{ASCII}}]"
)


def normalize_answer(text: str) -> str:
    """Lower-case the text; remove ASCII punctuation, English articles and surplus white space.

    Before that, letters are composed (NFC), and typographic quotes become ASCII quotes.

    Source: Rajpurkar et al. 2016, SQuAD, the official `evaluate-v1.1.py`, function of the same name.
    """
    text = unicodedata.normalize("NFC", text).translate(_ASCII_QUOTES)
    return " ".join(_ARTICLES.sub(" ", text.lower().translate(_NO_PUNCTUATION)).split())


def character_tokens(text: str) -> list[str]:
    """Split text: letters of scripts without spaces one by one (with their marks), other words whole; no punctuation.

    Case and compatibility forms (full-width, half-width: NFKC) make no difference.

    Source: the mixed segmentation of Chinese in MLQA (Lewis et al. 2020, `mlqa_evaluation_v1.py`), for more scripts.
    """
    return _CHARACTER_TOKEN.findall(unicodedata.normalize("NFKC", unicodedata.normalize("NFKC", text).casefold()))


def written_without_spaces(text: str) -> bool:
    """Whether the text has a letter of a script that the rule `characters` splits into letters."""
    return _SPACELESS_LETTER.search(text) is not None


def exact_match(prediction: str, answers: Sequence[str], match: Match = "words") -> float:
    """1.0 if the normalised prediction equals any normalised gold answer, else 0.0.

    Without answers the question counts as unanswerable, and only the empty prediction is right. (`evaluation.py` leaves
    such questions out.)

    Source: SQuAD `evaluate-v1.1.py` (exact_match_score, metric_max_over_ground_truths); for no answers,
    `evaluate-v2.0.py`.
    """
    predicted = _answer_tokens(prediction, match)
    return float(any(predicted == _answer_tokens(answer, match) for answer in answers or ("",)))


def f1(prediction: str, answers: Sequence[str], match: Match = "words") -> float:
    """Best F1 over the gold answers between bags of normalised words (or characters), in 0.0 to 1.0.

    If prediction or answer is empty after normalisation, F1 is 1.0 if both are, else 0.0. Without answers: as in
    `exact_match`.

    Source: SQuAD `evaluate-v1.1.py` (f1_score); the empty case as in `evaluate-v2.0.py` (compute_f1).
    """
    predicted = _answer_tokens(prediction, match)
    return max(_f1_of_tokens(predicted, _answer_tokens(answer, match)) for answer in answers or ("",))


def _answer_tokens(text: str, match: Match) -> list[str]:
    if match == "words":
        return normalize_answer(text).split()
    text = _ANY_PUNCTUATION.sub("", unicodedata.normalize("NFKC", text))
    return [token for token in character_tokens(text) if token not in ("a", "an", "the")]


def _f1_of_tokens(predicted: list[str], gold: list[str]) -> float:
    if not predicted or not gold:
        return float(predicted == gold)
    same = (Counter(predicted) & Counter(gold)).total()
    if not same:
        return 0.0
    precision, recall = same / len(predicted), same / len(gold)
    return 2 * precision * recall / (precision + recall)


def has_answer(text: str, answers: Iterable[str], match: Match = "words") -> bool:
    """Whether the text contains all tokens of any answer in sequence, regardless of case.

    `words`: text is normalised to NFD first, and typographic quotes become ASCII quotes. `characters`: tokens are those
    of `character_tokens`. An answer without tokens is found nowhere; DPR's loop would find it everywhere.

    Source: Karpukhin et al. 2020, DPR, `dpr/data/qa_validation.py` (has_answer, match type "string"), with the
    SimpleTokenizer of DrQA (Chen et al. 2017).
    """
    # Tokens contain no line ends, so with a line end around each token the search is a substring search.
    tokens = _joined_tokens(text, match)
    return any(len(wanted) > 1 and wanted in tokens for wanted in (_joined_tokens(answer, match) for answer in answers))


def _joined_tokens(text: str, match: Match) -> str:
    if match == "characters":
        tokens = character_tokens(text)
    else:
        tokens = _DRQA_TOKEN.findall(unicodedata.normalize("NFD", text.translate(_ASCII_QUOTES)))
    return "\n" + "".join(token.lower() + "\n" for token in tokens)


def regex_exact_match(prediction: str, patterns: Iterable[str]) -> float:
    """1.0 if any regular expression matches at the beginning of the prediction, else 0.0; the match may end anywhere.

    Raises:
        TimeoutError, regex.error: as in `has_regex_answer`.

    Source: Chen et al. 2017, DrQA, `drqa/retriever/utils.py` and `scripts/pipeline/eval.py` (regex_match_score).
    """
    return float(any(_compiled(pattern).match(prediction, timeout=REGEX_SECONDS) for pattern in patterns))


def has_regex_answer(text: str, patterns: Iterable[str]) -> bool:
    """Whether any regular expression matches somewhere in the text; both are normalised to NFD first.

    Raises:
        TimeoutError: a match takes longer than `REGEX_SECONDS`.
        regex.error: a pattern is not a regular expression.

    Source: DPR, `dpr/data/qa_validation.py` (has_answer, match type "regex").
    """
    text = unicodedata.normalize("NFD", text)
    compiled = (_compiled(unicodedata.normalize("NFD", pattern)) for pattern in patterns)
    return any(pattern.search(text, timeout=REGEX_SECONDS) is not None for pattern in compiled)


@functools.lru_cache(maxsize=4096)
def _compiled(pattern: str) -> Any:
    with warnings.catch_warnings(action="ignore", category=FutureWarning):  # "[[" may change its meaning
        return regex.compile(pattern, FLAGS)


def recall_at_k(ranked_hits: Sequence[Sequence[bool]], ks: Iterable[int]) -> dict[int, float]:
    """Share of questions with a hit among their first k passages, for each k.

    Args:
        ranked_hits: for each question, whether each passage is a hit, best passage first.
        ks: the cut-offs, each at least 1; a question with fewer than k passages is judged by those it has.

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
