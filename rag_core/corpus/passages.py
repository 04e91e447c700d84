"""The passage: the unit that is embedded, indexed, retrieved and shown to the generator.

It stands alone so that everything that handles passages can name the type without knowing where they come from.
It knows nothing about files, tokens or scores, and checks nothing: the readers check what they read.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Passage:
    """A piece of text with its title; `id` is unique within a corpus."""

    id: str
    title: str
    text: str


# What a closed-book answer reads.
NO_PASSAGE = Passage(id="", title="", text="")
