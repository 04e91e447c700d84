"""Layouts: under which keys a record holds a passage's id, title and text. A new layout is a row of `LAYOUTS`.

A layout says nothing about the file around the records (JSON Lines, JSON, Parquet, CSV: see `containers/`); any layout may
come in any of them. Which layout a file has is decided by its first records (`recognised`): the one that fits most of
them, and of those that fit equally many the one further up in `LAYOUTS`. So `text` is read where a record has both
`text` and `contents`, and `id` where it has both `id` and `_id`.
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
        name: what manifests and messages call it.
        says: whose layout it is, in words.
        text: the key of the text, or of what the text is made of.
        id: the keys that may name the record; the first one that it has is taken. Empty: the id is made of the content.
        title: the key of the title, if it has one of its own.
        also: keys that a record of this layout must have as well.
        holds: what the text's key holds:
            "text": a string.
            "quoted title and text": a string; its first line is the title if it is in quotes, else all of it is text.
            "sentences": a list of strings that are one text.
            "paragraphs": a list of strings (KILT's), each a passage.
            "titled sentences": HotpotQA's `context`: titles and lists of sentences, each pair a passage.
            "context": a string that comes again with every question about it.
    """

    name: str
    says: str
    text: str
    id: tuple[str, ...] = ()
    title: str | None = "title"
    also: tuple[str, ...] = ()
    holds: Holds = "text"

    def fits(self, record: Record) -> bool:
        """Whether a record has the keys, and what the text's key holds is of the right sort."""
        fields = record.fields
        if self.text not in fields or any(key not in fields for key in self.also):
            return False
        named = record.default_id is not None and self.id != (self.title,) and ID_KEYS.isdisjoint(fields)
        if self.id and not named and not any(key in fields for key in self.id):
            return False
        return self.takes(fields[self.text])

    def takes(self, value: Any) -> bool:
        """Whether a value is of the sort that the text's key holds."""
        return _is_of_sort(self.holds, value)

    def all_keys(self) -> tuple[str, ...]:
        """All keys that are read."""
        return (*self.id, *((self.title,) if self.title else ()), self.text, *self.also)


# Order decides where several fit. docs/formats.md has the same table.
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


def recognised(records: Iterable[Record]) -> Layout | None:
    """The layout that fits most of the records; None if none fits any."""
    records = list(records)
    times = [sum(layout.fits(record) for record in records) for layout in LAYOUTS]
    best = max(times)
    return LAYOUTS[times.index(best)] if best else None


def has_strings_for_a_layout(keys: Collection[str]) -> bool:
    """Whether columns of these names can be a layout in a file that knows nothing but strings."""
    return recognised([Record(None, dict.fromkeys(keys, ""), "", keys)]) is not None


def _is_of_sort(holds: Holds, value: Any) -> bool:
    if holds == "sentences":
        return isinstance(value, list)
    if holds == "paragraphs":  # Hugging Face's copy has {"paragraph": […]}
        return isinstance(value, list) or (isinstance(value, dict) and isinstance(value.get("paragraph"), list))
    if holds == "titled sentences":
        return isinstance(value, list) or (isinstance(value, dict) and {"title", "sentences"} <= set(value))
    return not isinstance(value, list | dict)
