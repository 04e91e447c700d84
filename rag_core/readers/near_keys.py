"""Keys that were meant: of the keys that a record has, which are nearly those of a layout."""

from __future__ import annotations

import difflib
from collections.abc import Collection, Sequence
from dataclasses import dataclass

from rag_core.readers.layouts import KNOWN_KEYS, LAYOUTS, Layout

# `text` and `test` are not near (0.75), `contents` and `contnets` are (0.88).
NEAR = 0.8


def near_key(wanted: str, found: Collection[str]) -> str | None:
    """The one of the keys found that is nearly `wanted`: but for case, marks between words, or a letter or two."""
    plain = {_plain(key): key for key in found}
    close = difflib.get_close_matches(_plain(wanted), list(plain), n=1, cutoff=NEAR)
    return plain[close[0]] if close else None


def has_near_key(keys: Collection[str]) -> bool:
    """Whether one of the keys is one that layouts have, or nearly one."""
    return not KNOWN_KEYS.isdisjoint(keys) or any(near_key(known, keys) for known in KNOWN_KEYS)


@dataclass(frozen=True)
class Nearest:
    """The layout that comes nearest: the keys that it lacks, each with what was found that is nearly it, or None."""

    layout: Layout
    lacking: dict[str, str | None]

    def sentence(self) -> str:
        """What it lacks, in words."""
        parts = [
            f"did you mean `{wanted}` for `{found}`?" if found else f"`{wanted}` is missing."
            for wanted, found in self.lacking.items()
        ] or [f"`{self.layout.text}` is not of the sort that it has there."]
        return f"Nearest is the layout {self.layout.name} ({self.layout.says}): {' '.join(parts)}"


def nearest(keys: Sequence[str]) -> Nearest | None:
    """The layout that comes nearest to the keys; None if none has anything in common with them."""
    best, most = None, 0.0
    for layout in LAYOUTS:
        needed = [names for names in (layout.id, (layout.text,), *((key,) for key in layout.also)) if names]
        lacking: dict[str, str | None] = {}
        score = 0.0
        for names in needed:
            if any(name in keys for name in names):
                score += 1
                continue
            close = {name: key for name in names if (key := near_key(name, keys))}
            lacking |= dict([next(iter(close.items()))] if close else [(names[0], None)])
            score += 0.9 if close else 0
        score /= len(needed)
        if score > most:
            best, most = Nearest(layout, lacking), score
    return best


def _plain(key: str) -> str:
    return "".join(letter for letter in key[:100].casefold() if letter.isalnum())
