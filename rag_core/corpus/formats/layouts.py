"""Layouts: the keys under which a record holds a passage's id, title and text. A new layout is a row of `LAYOUTS`.

A layout does not depend on the container (JSON Lines, JSON, Parquet, CSV: see `containers/`): any layout may come
in any container. `recognised_layout` picks the layout that fits most of a file's first records; on a tie, the one
that comes first in `LAYOUTS`. So `text` is read if a record has both `text` and `contents`, and `id` if it has
both `id` and `_id`.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import dataclass
from typing import Any, Literal

from rag_core.corpus.formats.rows import Record

Holds = Literal["text", "quoted title and text", "sentences", "paragraphs", "titled sentences", "context"]


@dataclass(frozen=True, slots=True)
class Layout:
    """Where the parts of a passage are.

    Attributes:
        name: the name in manifests and messages.
        description: the data sets or tools that use it, for messages.
        text: the key of the text, or of the list that the text is made from.
        id: the keys that may hold the id; the first one present is used. Empty: the id is made from the content.
        title: the key of the title; None if the layout has no such key.
        also: further keys that a record of this layout must have.
        holds: the kind of value under the key `text`:
            "text": a string.
            "quoted title and text": a string. If its first line is in quotes, that is the title; the rest is text.
            "sentences": a list of strings that form one text.
            "paragraphs": a list of strings (KILT's); each is a passage.
            "titled sentences": HotpotQA's `context`: titles with lists of sentences; each pair is a passage.
            "context": a string that is repeated for every question about it.
    """

    name: str
    description: str
    text: str
    id: tuple[str, ...] = ()
    title: str | None = "title"
    also: tuple[str, ...] = ()
    holds: Holds = "text"

    def fits(self, record: Record) -> bool:
        """Whether a record has the required keys, and the right kind of value under the key `text`."""
        fields = record.fields
        if self.text not in fields or any(key not in fields for key in self.also):
            return False
        named = record.default_id is not None and self.id != (self.title,) and ID_KEYS.isdisjoint(fields)
        if self.id and not named and not any(key in fields for key in self.id):
            return False
        return self.takes(fields[self.text])

    def takes(self, value: Any) -> bool:
        """Whether the value has the kind (`holds`) that this layout expects under the key `text`."""
        return _is_of_kind(self.holds, value)

    def all_keys(self) -> tuple[str, ...]:
        """All keys that this layout reads."""
        return (*self.id, *((self.title,) if self.title else ()), self.text, *self.also)


# If several fit, the first one wins. docs/formats.md has the same table.
LAYOUTS = (
    Layout("id-text", "id, title and text", id=("id",), text="text"),
    Layout("beir", "BEIR", id=("_id",), text="text"),
    Layout("docid", "Tevatron, MS MARCO", id=("docid", "doc_id", "pid", "passage_id", "psg_id"), text="text"),
    Layout("contents", "pyserini, FlashRAG", id=("id",), title=None, text="contents", holds="quoted title and text"),
    Layout(
        "kilt", "KILT's knowledge source", id=("wikipedia_id", "_id"), title="wikipedia_title", text="text",
        also=("wikipedia_title",), holds="paragraphs",
    ),
    Layout("abstracts", "HotpotQA's abstracts", id=("title",), text="text", holds="sentences"),
    Layout("2wiki-abstracts", "2WikiMultihopQA's abstracts", id=("title",), text="sentences", holds="sentences"),
    Layout("id-sentences", "id and a list of sentences", id=("id", "_id"), text="text", holds="sentences"),
    Layout(
        "hotpotqa", "contexts of HotpotQA's and 2WikiMultihopQA's questions", title=None, text="context",
        also=("question",), holds="titled sentences",
    ),
    Layout("squad-rows", "Hugging Face's SQuAD rows", text="context", also=("question",), holds="context"),
)  # fmt: skip
ID_KEYS = frozenset(key for layout in LAYOUTS for key in layout.id) - {"title"}
KNOWN_KEYS = frozenset(key for layout in LAYOUTS for key in layout.all_keys())


def recognised_layout(records: Iterable[Record]) -> Layout | None:
    """The layout that fits most of the records; None if no layout fits any record."""
    records = list(records)
    matches = [sum(layout.fits(record) for record in records) for layout in LAYOUTS]
    best = max(matches)
    return LAYOUTS[matches.index(best)] if best else None


def columns_fit_a_layout(columns: Collection[str]) -> bool:
    """Whether a table with these columns, all of them strings, fits a layout."""
    return recognised_layout([Record(None, dict.fromkeys(columns, ""), "", columns)]) is not None


def _is_of_kind(holds: Holds, value: Any) -> bool:
    if holds == "sentences":
        return isinstance(value, list)
    if holds == "paragraphs":  # Hugging Face's copy has {"paragraph": […]}
        return isinstance(value, list) or (isinstance(value, dict) and isinstance(value.get("paragraph"), list))
    if holds == "titled sentences":
        return isinstance(value, list) or (isinstance(value, dict) and {"title", "sentences"} <= set(value))
    return not isinstance(value, list | dict)
