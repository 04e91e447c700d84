"""Turns records into passages: one function for each kind of text (`Holds`) that a layout can have.

A record yields passages, rejects, and `Skipped` for parts that are neither passages nor faults. This module reads
no files.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from rag_core.corpus.formats.ids import kilt_passage_id
from rag_core.corpus.formats.layouts import Holds, Layout
from rag_core.corpus.formats.rows import Record, Reject, Row, Skipped, check_row, excerpt, field_fault, id_as_text
from rag_core.corpus.formats.squad import context_id

Outcome = Row | Reject | Skipped
_QUOTED_TITLE = re.compile(r'"([^\n]*)"[^\S\n]*\n(.*)', re.DOTALL)
_HEADING, _BULLET = "Section::::", "BULLET::::"


def passages_of(layout: Layout, file: Path, record: Record) -> Sequence[Outcome]:
    """The passages, rejects and skipped parts of one record."""
    return _READERS[layout.holds](layout, file, record)


def _text(layout: Layout, file: Path, record: Record) -> Sequence[Outcome]:
    name, id = _id(layout, record)
    title = record.fields.get(layout.title) if layout.title else None
    names = (name, layout.title or "title", layout.text)
    return (check_row(file, record.line, id, title, record.fields.get(layout.text), record.found, names),)


def _quoted_title_and_text(layout: Layout, file: Path, record: Record) -> Sequence[Outcome]:
    name, id = _id(layout, record)
    title, text = None, record.fields.get(layout.text)
    if isinstance(text, str) and (parts := _QUOTED_TITLE.fullmatch(text)):
        title, text = parts.groups()
    return (check_row(file, record.line, id, title, text, record.found, (name, "title", layout.text)),)


def _sentences(layout: Layout, file: Path, record: Record) -> Sequence[Outcome]:
    name, id = _id(layout, record)
    title, value = record.fields.get(layout.title or ""), record.fields.get(layout.text)
    return (_joined(file, record, (name, id), title, layout.text, value),)


def _paragraphs(layout: Layout, file: Path, record: Record) -> Sequence[Outcome]:
    """KILT's pages: skip the page's title and headings; remove the bullet mark before list items."""
    name, id = _id(layout, record)
    page, title = id_as_text(id), record.fields.get(layout.title or "")
    paragraphs: Any = record.fields.get(layout.text)
    if isinstance(paragraphs, dict):
        paragraphs = paragraphs.get("paragraph")
    fault = field_fault(name, page) or field_fault(layout.title or "", title, required=False)
    if not fault and not isinstance(paragraphs, list):
        kind = type(paragraphs).__name__
        fault = (
            f"missing {layout.text}" if paragraphs is None else f"wrong type: {layout.text} is {kind}, expected a list"
        )
    if fault:
        return (Reject(str(file), record.line, fault, excerpt(record.found)),)
    outcomes: list[Outcome] = []
    for index, paragraph in enumerate(paragraphs or ()):
        text = paragraph.strip() if isinstance(paragraph, str) else paragraph
        if text == "":
            outcomes.append(Skipped("empty paragraph"))
        elif isinstance(text, str) and (text.startswith(_HEADING) or (index == 0 and text == str(title or "").strip())):
            outcomes.append(Skipped("heading"))
        else:
            text = text.removeprefix(_BULLET) if isinstance(text, str) else text
            passage_id = kilt_passage_id(str(page), index)
            names = (name, layout.title or "", f"{layout.text} item {index}")
            outcomes.append(
                check_row(file, record.line, passage_id, title, text, f"{passage_id}: {paragraph!r}", names)
            )
    return outcomes


def _titled_sentences(layout: Layout, file: Path, record: Record) -> Sequence[Outcome]:
    context = record.fields.get(layout.text)
    pairs: list[Any]
    if isinstance(context, dict):
        titles, lists = context.get("title"), context.get("sentences")
        paired = isinstance(titles, list) and isinstance(lists, list) and len(titles) == len(lists)
        pairs = list(zip(titles, lists, strict=True)) if paired else [context]  # type: ignore[arg-type]
    else:
        pairs = context if isinstance(context, list) else [context]
    return [_titled(layout, file, record, pair) for pair in pairs]


def _titled(layout: Layout, file: Path, record: Record, pair: Any) -> Outcome:
    if isinstance(pair, dict):
        pair = (pair.get("title"), pair.get("sentences", pair.get("content")))
    if not isinstance(pair, list | tuple) or len(pair) != 2:
        reason = f"wrong type: an item of {layout.text} is not a pair of a title and its sentences"
        return Reject(str(file), record.line, reason, excerpt(pair))
    title, sentences = pair
    return _joined(file, record, ("title", title), title, layout.text, sentences)


def _context(layout: Layout, file: Path, record: Record) -> Sequence[Outcome]:
    title, context = record.fields.get(layout.title or ""), record.fields.get(layout.text)
    id = "passage"  # a placeholder: check_row rejects a context or title that is not a string
    if isinstance(context, str) and isinstance(title, str | None):
        id = context_id(title, context)
    names = ("id", layout.title or "", layout.text)
    return (check_row(file, record.line, id, title, context, record.found, names),)


def _joined(
    file: Path, record: Record, id_field: tuple[str, object], title: object, name: str, sentences: object
) -> Row | Reject:
    """One passage from a list of sentences. `id_field` is the id's key and value, `name` the key of the sentences."""
    id_name, id = id_field
    names = (id_name, "title", name)
    if not isinstance(sentences, list):
        if isinstance(sentences, str) or sentences is None:
            return check_row(file, record.line, id, title, sentences, record.found, names)
        reason = f"wrong type: {name} is {type(sentences).__name__}, expected a list of strings"
        return Reject(str(file), record.line, reason, excerpt(record.found))
    for number, sentence in enumerate(sentences, 1):
        if not isinstance(sentence, str):
            reason = f"wrong type: {name} item {number} is {type(sentence).__name__}, expected a string"
            return Reject(str(file), record.line, reason, excerpt(record.found))
    return check_row(file, record.line, id, title, "".join(_spaced(sentences)), record.found, names)


def _spaced(sentences: Sequence[str]) -> Iterator[str]:
    """The sentences, with a space between two that have none. HotpotQA's sentences start with their own space."""
    previous = ""
    for sentence in filter(None, sentences):
        if previous and not previous[-1].isspace() and not sentence[0].isspace():
            yield " "
        yield sentence
        previous = sentence


def _id(layout: Layout, record: Record) -> tuple[str, object]:
    """The key that holds the record's id, and its value; `default_id` if the record has none of the keys."""
    for key in layout.id:
        if record.fields.get(key) is not None:
            return key, record.fields[key]
    return layout.id[0], record.default_id


_READERS: dict[Holds, Callable[[Layout, Path, Record], Sequence[Outcome]]] = {
    "text": _text,
    "quoted title and text": _quoted_title_and_text,
    "sentences": _sentences,
    "paragraphs": _paragraphs,
    "titled sentences": _titled_sentences,
    "context": _context,
}
