"""SQuAD 1.1 and 2.0 JSON: every paragraph is a passage, its article's title the passage's title.

The file is loaded whole, up to `MAX_BYTES` (SQuAD's training set is 30 MB). The question reader also uses
`articles_of` and `numbered_paragraphs`, so gold passages and the corpus always have the same ids.

A passage's id is `TITLE#INDEX`. If the article has no title, or another article of the file has the same title,
the id also has the article's number N in the file, from 1: `article-N#INDEX` or `TITLE-N#INDEX`.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rag_core.corpus.formats.first_bytes import refuse_archives_and_utf16
from rag_core.corpus.formats.rows import Reject, Row, check_row
from rag_core.corpus.formats.sources import SourceFile
from rag_core.errors import InputError

MAX_BYTES = 2**30


@dataclass(frozen=True, slots=True)
class Article:
    """A SQuAD article: its title (may be empty), its name in passage ids, and its paragraphs, not yet checked."""

    title: str
    paragraphs: list[Any]
    name: str


@dataclass(frozen=True, slots=True)
class Paragraph:
    """A paragraph as parsed from JSON (`value`), with its article, its index in it (from 0), and its passage id."""

    article: Article
    index: int
    id: str
    value: Any


def paragraph_id(article_name: str, paragraph_index: int) -> str:
    """The passage id of a paragraph; `paragraph_index` counts from 0 within the article."""
    return f"{article_name}#{paragraph_index}"


def context_id(title: str | None, context: str) -> str:
    """The passage id of a row of Hugging Face's SQuAD: title and context hash, since rows have no paragraph numbers."""
    name = title if title and title.strip() else "passage"
    return f"{name}-{hashlib.sha256(context.encode('utf-8', 'surrogatepass')).hexdigest()[:12]}"


def numbered_paragraphs(articles: Sequence[Article]) -> Iterator[Paragraph]:
    """Every paragraph of a file with its passage id. Ids of passages and of gold passages all come from here."""
    for article in articles:
        for index, value in enumerate(article.paragraphs):
            yield Paragraph(article, index, paragraph_id(article.name, index), value)


def read(source: SourceFile) -> Iterator[Row | Reject]:
    """Rows and rejects of one SQuAD file. Rejects have no line; their `found` shows the paragraph.

    Raises:
        InputError: the file is not SQuAD JSON.
    """
    for paragraph in numbered_paragraphs(read_articles(source.path)):
        text = paragraph.value.get("context") if isinstance(paragraph.value, dict) else None
        found = f"{paragraph.id}: {paragraph.value!r}"
        yield check_row(source.path, None, paragraph.id, paragraph.article.title, text, found=found)


def read_articles(path: Path) -> list[Article]:
    """The articles of a SQuAD file.

    Raises:
        InputError: an archive, more than `MAX_BYTES`, not UTF-8, not JSON, or not SQuAD's layout.
    """
    refuse_archives_and_utf16(path)
    if path.stat().st_size > MAX_BYTES:
        raise InputError(
            f"{path} has {path.stat().st_size:,} bytes; SQuAD JSON is read whole, so at most {MAX_BYTES:,} were "
            "expected. Split it into several files, or write its passages as JSON Lines (id, title, text)."
        )
    try:
        content = json.loads(path.read_bytes().decode("utf-8-sig"))
    except (ValueError, RecursionError, OSError) as error:
        raise InputError(
            f"{path} is not JSON ({error}); SQuAD JSON was expected. Correct the file or the format."
        ) from error
    return articles_of(content, path)


def articles_of(content: object, path: Path) -> list[Article]:
    """The articles in the parsed JSON of `path`; raises as `read_articles` does."""
    data = content.get("data") if isinstance(content, dict) else None
    if not isinstance(data, list):
        found = f"an object with the keys {list(content)}" if isinstance(content, dict) else type(content).__name__
        raise InputError(
            f"{path} is not SQuAD JSON: an object whose `data` is a list of articles was expected, found {found}. "
            "Correct the file or the format."
        )
    entries = [_article(path, number, entry) for number, entry in enumerate(data, 1)]
    names = _names([title for title, _ in entries])
    return [Article(title, paragraphs, name) for (title, paragraphs), name in zip(entries, names, strict=True)]


def _names(titles: Sequence[str]) -> list[str]:
    """A unique name for each article: its title if no other article has the same one, else with its number added."""
    counts = Counter(titles)
    taken = {title for title, count in counts.items() if title and count == 1}
    names = []
    for number, title in enumerate(titles, 1):
        name = title
        if not title or counts[title] > 1:
            name = f"{title or 'article'}-{number}"
            while name in taken:  # another article has this name as its title
                name += f"-{number}"
            taken.add(name)
        names.append(name)
    return names


def _article(path: Path, number: int, entry: object) -> tuple[str, list[Any]]:
    """Title (may be empty) and paragraphs of one article."""
    if isinstance(entry, dict):
        title, paragraphs = entry.get("title"), entry.get("paragraphs")
        if isinstance(paragraphs, list) and (title is None or isinstance(title, str)):
            return (title if title and title.strip() else ""), paragraphs
    found = f"the keys {list(entry)}" if isinstance(entry, dict) else type(entry).__name__
    raise InputError(
        f"{path} article {number}: expected an object with a list `paragraphs` and usually a string `title`, found "
        f"{found}. Correct the file or the format."
    )
