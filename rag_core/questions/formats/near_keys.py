"""Keys that are almost one that is read: `golden_answer`, `Question`, `anwsers`.

Such a key is an error only where the question lacks what the right key would give; else it is somebody's own.
"""

from __future__ import annotations

import re
from difflib import SequenceMatcher
from functools import lru_cache

from rag_core.corpus.formats.near_keys import plain

# The keys that a slip may have been meant for, and the field of a question that each fills.
FIELDS = {
    "question": "question",
    "id": "id",
    "answers": "answers",
    "answer": "answers",
    "golden_answers": "answers",
    "possible_answers": "answers",
    "type": "type",
    "gold_passage_ids": "gold_passage_ids",
    "positive_ctxs": "gold_passage_ids",
    "supporting_facts": "gold_passage_ids",
    "ctxs": "ctxs",
    "answers_are": "answers_are",
    "is_impossible": "is_impossible",
}
# A question without an answer is often a slip, one without a type seldom: so the latter's key must be nearer.
_LIKENESS = {"question": 0.82, "answers": 0.82}
_STRICT = 0.9
# `answer_id`, `question_type`, `answered`: somebody's own. A tail of one letter (`answer_s`) is a slip.
_MORE = re.compile(rf"(?i)(?:{'|'.join(FIELDS)})_\w{{2,}}|answered")


@lru_cache(maxsize=4096)
def meant(key: str) -> str | None:
    """The key that `key` was probably meant to be; None if it is one itself, says more than one, or is like none."""
    if key in FIELDS or len(key) > 60 or _MORE.fullmatch(key):
        return None
    likeness = {known: SequenceMatcher(None, plain(key), plain(known)).ratio() for known in FIELDS}
    likely = [known for known, ratio in likeness.items() if ratio >= _LIKENESS.get(FIELDS[known], _STRICT)]
    return max(likely, key=lambda known: likeness[known], default=None)
