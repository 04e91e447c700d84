"""Keys that were meant: of the keys that a record has, which are nearly those of a layout."""

from __future__ import annotations

import difflib
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rag_core.corpus.formats.layouts import KNOWN_KEYS, LAYOUTS, Layout
from rag_core.corpus.formats.rows import excerpt

# `text` and `test` are not near (0.75), `contents` and `contnets` are (0.88).
NEAR = 0.8


def plain(key: str) -> str:
    """A key without case and without the marks that join words."""
    return "".join(letter for letter in key[:100].casefold() if letter.isalnum())


def near_key(wanted: str, found: Collection[str]) -> str | None:
    """The one of the keys found that is nearly `wanted`: but for case, marks between words, or a letter or two."""
    key_of = {plain(key): key for key in found}
    close = difflib.get_close_matches(plain(wanted), list(key_of), n=1, cutoff=NEAR)
    swapped = next((key for key in key_of if sorted(key) == sorted(plain(wanted))), None)  # txet
    return key_of[close[0]] if close else key_of.get(swapped or "")


def has_near_key(keys: Collection[str]) -> bool:
    """Whether one of the keys is one that layouts have, or nearly one."""
    return not KNOWN_KEYS.isdisjoint(keys) or any(near_key(known, keys) for known in KNOWN_KEYS)


def shown(key: str) -> str:
    """A key as a message may show it: short, on one line, without broken characters."""
    return excerpt(" ".join(key[:200].split()))[:40]


@dataclass(frozen=True)
class Nearest:
    """The layout that comes nearest, and in words what a record lacks to be of it."""

    layout: Layout
    lacking: tuple[str, ...]

    def __str__(self) -> str:
        return f"Nearest is the layout {self.layout.name} ({self.layout.says}): {' '.join(self.lacking)}"


def nearest(fields: Mapping[str, Any], keys: Collection[str]) -> Nearest | None:
    """The layout that comes nearest to a record; None if none has anything in common with it.

    Args:
        fields: the record's fields, as far as they were read.
        keys: all names in it.
    """
    best, most = None, 0.0
    for layout in LAYOUTS:
        needed = [names for names in (layout.id, (layout.text,), *((key,) for key in layout.also)) if names]
        parts = [_compared(layout, names, fields, keys) for names in needed]
        score = sum(part[0] for part in parts) / len(parts)
        if score > most:
            best, most = Nearest(layout, tuple(part[1] for part in parts if part[1])), score
    return best


def _compared(
    layout: Layout, names: Sequence[str], fields: Mapping[str, Any], keys: Collection[str]
) -> tuple[float, str]:
    """How well a record has one of the keys that a layout needs, from 0 to 1, and what is wrong."""
    if names == (layout.text,) and layout.text in fields and not layout.takes(fields[layout.text]):
        return (
            0,
            f"`{layout.text}` is {type(fields[layout.text]).__name__} here, which is not what that layout has there.",
        )
    if any(name in keys for name in names):
        return 1, ""
    unknown = [key for key in keys if key not in KNOWN_KEYS]
    for name in names:
        if key := near_key(name, unknown):
            return 0.9, f"did you mean `{name}` for `{shown(key)}`?"
    return 0, f"`{names[0]}` is missing."
