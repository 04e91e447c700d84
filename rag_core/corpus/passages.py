"""The passage: the unit that is embedded, indexed, retrieved and shown to the generator.

The type has its own module so that code can handle passages without importing the readers. It knows nothing about
files, tokens or scores, and checks nothing: the readers check what they read.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Passage:
    """A piece of text with its title; `id` is unique within a corpus."""

    id: str
    title: str
    text: str


# The passage that stands in for retrieved ones in closed-book answering.
NO_PASSAGE = Passage(id="", title="", text="")
