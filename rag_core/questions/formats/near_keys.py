"""Recognises misspelt keys: `golden_answer`, `Question`, `anwsers`.

Such a key is an error only if the question lacks the value that the right key would hold; else it is the user's
own key.
"""

from __future__ import annotations

import re
from difflib import SequenceMatcher
from functools import lru_cache

from rag_core.corpus.formats.near_keys import normalised

# The keys that may be misspelt, and the field of a question that each fills.
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
# A question or answer is seldom missing on purpose; other fields often are, so keys like theirs must be closer.
_MIN_SIMILARITY = {"question": 0.82, "answers": 0.82}
_DEFAULT_MIN_SIMILARITY = 0.9
# The user's own keys: `answer_id`, `question_type`, `answered`. A tail of one letter (`answer_s`) is a misspelling.
_OWN_KEY = re.compile(rf"(?i)(?:{'|'.join(FIELDS)})_\w{{2,}}|answered")


@lru_cache(maxsize=4096)
def intended_key(key: str) -> str | None:
    """The known key that `key` probably misspells; None if `key` is known itself, or like no known key."""
    if key in FIELDS or len(key) > 60 or _OWN_KEY.fullmatch(key):
        return None
    similarity = {known: SequenceMatcher(None, normalised(key), normalised(known)).ratio() for known in FIELDS}
    likely = [
        known
        for known, ratio in similarity.items()
        if ratio >= _MIN_SIMILARITY.get(FIELDS[known], _DEFAULT_MIN_SIMILARITY)
    ]
    return max(likely, key=lambda known: similarity[known], default=None)
