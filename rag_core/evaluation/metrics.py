"""The field's measures of answers and of retrieval: exact match, F1, answer in passage, recall at k.

Pure functions of strings and booleans, for one question each (save `recall_at_k`); averaging over questions, and
what counts as the prediction, is the caller's business. The rule `words` follows the published scripts, quirks
included, because numbers are only comparable that way; it differs from them in one thing, which ASCII text does not
have: another way to write the same letter (NFC, NFD) or quote (’ and ') makes no difference. The rule `characters` is
for text whose script has no spaces between words. Regular expressions are matched as DrQA does.
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

# Seconds for one match of a regular expression. Honest ones take microseconds.
REGEX_SECONDS = 2.0

_ARTICLES = re.compile(r"\b(a|an|the)\b")
_NO_PUNCTUATION = str.maketrans("", "", string.punctuation)
_ANY_PUNCTUATION = regex.compile(rf"\p{{P}}|[{re.escape(string.punctuation)}]")
_DRQA_TOKEN = regex.compile(r"[\p{L}\p{N}\p{M}]+|[^\p{Z}\p{C}]")
# The typographic quotes that have an ASCII counterpart, and the apostrophe that Unicode files under letters.
_ASCII_QUOTES = str.maketrans("\u2018\u2019\u201a\u201b\u02bc\u201c\u201d\u201e\u201f", "'" * 5 + '"' * 4)
# Scripts that are written without spaces between words, and Hangul, whose words carry particles (KorQuAD, too, scores
# its characters). U+30FC lengthens a vowel of Japanese and belongs to no script.
_SPACELESS = r"\p{Han}\p{Hiragana}\p{Katakana}\u30fc\p{Hangul}\p{Thai}\p{Lao}\p{Khmer}\p{Myanmar}"
_SPACELESS_LETTER = regex.compile(f"[{_SPACELESS}]")
_CHARACTER_TOKEN = regex.compile(
    rf"(?V1)[{_SPACELESS}]\p{{M}}*|[[\p{{L}}\p{{N}}\p{{M}}]--[{_SPACELESS}]]+|[\p{{S}}--\p{{ASCII}}]"
)


def normalize_answer(text: str) -> str:
    """Lower case, without ASCII punctuation, English articles and surplus white space.

    Before that, letters are composed (NFC), and typographic quotes become ASCII's.

    Source: Rajpurkar et al. 2016, SQuAD, the official `evaluate-v1.1.py`, function of the same name.
    """
    text = unicodedata.normalize("NFC", text).translate(_ASCII_QUOTES)
    return " ".join(_ARTICLES.sub(" ", text.lower().translate(_NO_PUNCTUATION)).split())


def character_tokens(text: str) -> list[str]:
    """Letters of scripts without spaces one by one (with their marks), other words whole; no punctuation.

    Case and compatible forms (full-width, half-width: NFKC) make no difference.

    Source: the mixed segmentation of Chinese in MLQA (Lewis et al. 2020, `mlqa_evaluation_v1.py`), for more scripts.
    """
    return _CHARACTER_TOKEN.findall(unicodedata.normalize("NFKC", unicodedata.normalize("NFKC", text).casefold()))


def written_without_spaces(text: str) -> bool:
    """Whether the text has a letter of a script that the rule `characters` takes letter by letter."""
    return _SPACELESS_LETTER.search(text) is not None


def exact_match(prediction: str, answers: Sequence[str], match: Match = "words") -> float:
    """1.0 if the normalised prediction equals any normalised gold answer, else 0.0.

    A question without answers counts as unanswerable, whose one right prediction is the empty one. (`evaluation.py`
    leaves such questions out.)

    Source: SQuAD `evaluate-v1.1.py` (exact_match_score, metric_max_over_ground_truths); for no answers,
    `evaluate-v2.0.py`.
    """
    predicted = _answer_tokens(prediction, match)
    return float(any(predicted == _answer_tokens(answer, match) for answer in answers or ("",)))


def f1(prediction: str, answers: Sequence[str], match: Match = "words") -> float:
    """Best F1 over the gold answers between bags of normalised words (or characters), in 0.0 to 1.0.

    Where prediction or answer is empty after normalisation, F1 is 1.0 if both are, else 0.0; no answers, as in
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
    """Whether the tokens of any answer stand in the text in one row, regardless of case.

    `words`: Unicode is brought to NFD first, typographic quotes to ASCII's. `characters`: tokens are those of
    `character_tokens`. An answer without any token is found nowhere; DPR's loop would find it everywhere.

    Source: Karpukhin et al. 2020, DPR, `dpr/data/qa_validation.py` (has_answer, match type "string"), with the
    SimpleTokenizer of DrQA (Chen et al. 2017).
    """
    # Tokens hold no control characters, so line ends around each token make the search one of substrings.
    tokens = _joined_tokens(text, match)
    return any(len(wanted) > 1 and wanted in tokens for wanted in (_joined_tokens(answer, match) for answer in answers))


def _joined_tokens(text: str, match: Match) -> str:
    if match == "characters":
        tokens = character_tokens(text)
    else:
        tokens = _DRQA_TOKEN.findall(unicodedata.normalize("NFD", text.translate(_ASCII_QUOTES)))
    return "\n" + "".join(token.lower() + "\n" for token in tokens)


def regex_exact_match(prediction: str, patterns: Iterable[str]) -> float:
    """1.0 if any regular expression matches from the beginning of the prediction, else 0.0; its end is free.

    Raises:
        TimeoutError, regex.error: as `has_regex_answer`.

    Source: Chen et al. 2017, DrQA, `drqa/retriever/utils.py` and `scripts/pipeline/eval.py` (regex_match_score).
    """
    return float(any(_compiled(one).match(prediction, timeout=REGEX_SECONDS) for one in patterns))


def has_regex_answer(text: str, patterns: Iterable[str]) -> bool:
    """Whether any regular expression matches somewhere in the text; both are brought to NFD first.

    Raises:
        TimeoutError: a match takes longer than `REGEX_SECONDS`.
        regex.error: no regular expression.

    Source: DPR, `dpr/data/qa_validation.py` (has_answer, match type "regex").
    """
    text = unicodedata.normalize("NFD", text)
    found = (_compiled(unicodedata.normalize("NFD", one)).search(text, timeout=REGEX_SECONDS) for one in patterns)
    return any(match is not None for match in found)


@functools.lru_cache(maxsize=4096)
def _compiled(pattern: str) -> Any:
    with warnings.catch_warnings(action="ignore", category=FutureWarning):  # "[[" may get another meaning some day
        return regex.compile(pattern, FLAGS)


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
