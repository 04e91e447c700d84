"""Turn token ids into text, also for tokenizers that lose a part of the spelling.

BERT's uncased tokenizers drop case and accents and put spaces around punctuation: "America/New_York" becomes
"america / new _ york". If the answer's tokens occur in a passage that was read, the answer takes the passage's own
spelling. Lossless tokenizers (BPE, SentencePiece) are simply decoded. So are slow ones (Marian's), as they report no
offsets.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

PROBE = "Zürich/New_York, 1,000 km"


class SurfaceReader:
    """Decodes an answer; for a lossy tokenizer, in the spelling of the first passage that contains its tokens."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        ids = tokenizer(PROBE, add_special_tokens=False)["input_ids"]
        self._lossless = tokenizer.decode(ids, skip_special_tokens=True).strip() == PROBE
        self._knows_places = tokenizer.is_fast

    def __call__(self, token_ids: Sequence[int], passage_texts: Sequence[str]) -> str:
        """Return the text of an answer.

        Args:
            token_ids: the answer's tokens, without special tokens.
            passage_texts: the passages that were read, most probable first.
        """
        token_ids = list(token_ids)
        if self._knows_places and not self._lossless and token_ids and passage_texts:
            encoded = self._tokenizer(list(passage_texts), add_special_tokens=False, return_offsets_mapping=True)
            for text, ids, offsets in zip(passage_texts, encoded["input_ids"], encoded["offset_mapping"], strict=True):
                start = _find(ids, token_ids)
                if start >= 0:
                    return text[offsets[start][0] : offsets[start + len(token_ids) - 1][1]]
        text = self._tokenizer.decode(token_ids, skip_special_tokens=True).strip()
        return text if self._lossless else _close_gaps(text)


def _find(haystack: Sequence[int], needle: Sequence[int]) -> int:
    """Index at which `needle` first occurs in `haystack`, or −1."""
    for start in range(len(haystack) - len(needle) + 1):
        if haystack[start] == needle[0] and list(haystack[start : start + len(needle)]) == list(needle):
            return start
    return -1


def _close_gaps(text: str) -> str:
    """Undo the spaces that WordPiece decoding leaves around joining punctuation and inside numbers."""
    text = re.sub(r"\s*([/_\-'’])\s*", r"\1", text)
    return re.sub(r"(?<=\d)\s*([.,])\s*(?=\d)", r"\1", text)
