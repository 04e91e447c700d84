"""Suggestions for misspelt keys: which of a record's keys are close to a layout's keys."""

from __future__ import annotations

import difflib
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rag_core.corpus.formats.layouts import KNOWN_KEYS, LAYOUTS, Layout
from rag_core.corpus.formats.rows import excerpt

# `text` and `test` are not close enough (0.75), `contents` and `contnets` are (0.88).
MIN_SIMILARITY = 0.8


def normalised(key: str) -> str:
    """The key in lower case, letters and digits only."""
    return "".join(letter for letter in key[:100].casefold() if letter.isalnum())


def near_key(wanted: str, keys: Collection[str]) -> str | None:
    """The key closest to `wanted`, if it differs only by case, separators, or a letter or two; else None."""
    key_of = {normalised(key): key for key in keys}
    matches = difflib.get_close_matches(normalised(wanted), list(key_of), n=1, cutoff=MIN_SIMILARITY)
    swapped = next((key for key in key_of if sorted(key) == sorted(normalised(wanted))), None)  # txet
    return key_of[matches[0]] if matches else key_of.get(swapped or "")


def has_near_key(keys: Collection[str]) -> bool:
    """Whether any of the keys is a layout's key, or close to one."""
    return not KNOWN_KEYS.isdisjoint(keys) or any(near_key(known, keys) for known in KNOWN_KEYS)


def printable(key: str) -> str:
    """The key for a message: short, on one line, without broken characters."""
    return excerpt(" ".join(key[:200].split()))[:40]


@dataclass(frozen=True)
class NearestLayout:
    """The layout closest to a record, and sentences that say why the record does not fit it."""

    layout: Layout
    faults: tuple[str, ...]

    def __str__(self) -> str:
        return f"The nearest layout is {self.layout.name} ({self.layout.description}): {' '.join(self.faults)}"


def nearest_layout(fields: Mapping[str, Any], keys: Collection[str]) -> NearestLayout | None:
    """The layout closest to a record; None if no layout has anything in common with it.

    Args:
        fields: the fields that were read.
        keys: all keys of the record, also those that were not read.
    """
    best, best_score = None, 0.0
    for layout in LAYOUTS:
        needed = [names for names in (layout.id, (layout.text,), *((key,) for key in layout.also)) if names]
        comparisons = [_compared(layout, names, fields, keys) for names in needed]
        score = sum(part for part, _ in comparisons) / len(comparisons)
        if score > best_score:
            best, best_score = NearestLayout(layout, tuple(fault for _, fault in comparisons if fault)), score
    return best


def _compared(
    layout: Layout, names: Sequence[str], fields: Mapping[str, Any], keys: Collection[str]
) -> tuple[float, str]:
    """Compare a record with one needed key (`names`: its alternatives): a score from 0 to 1, and the fault in words."""
    if names == (layout.text,) and layout.text in fields and not layout.takes(fields[layout.text]):
        return (
            0,
            f"`{layout.text}` is {type(fields[layout.text]).__name__} here, which that layout does not allow.",
        )
    if any(name in keys for name in names):
        return 1, ""
    unknown = [key for key in keys if key not in KNOWN_KEYS]
    for name in names:
        if key := near_key(name, unknown):
            return 0.9, f"did you mean `{name}` for `{printable(key)}`?"
    return 0, f"`{names[0]}` is missing."
