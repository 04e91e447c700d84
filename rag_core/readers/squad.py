"""SQuAD 1.1 and 2.0 JSON: every paragraph is a passage, its article's title the passage's title.

The file is loaded whole (SQuAD's training set is 30 MB). The questions in it are read elsewhere, through
`read_articles` and `paragraph_id`, so that a question's gold passage and the corpus can never disagree on an id.
Titles must be unique within a file for that reason.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rag_core.errors import InputError
from rag_core.readers.first_bytes import refuse_archives_and_utf16
from rag_core.readers.rows import Reject, Row, check_row
from rag_core.readers.sources import SourceFile


@dataclass(frozen=True, slots=True)
class Article:
    """A SQuAD article: its title and its paragraphs as the JSON gives them, not yet checked."""

    title: str
    paragraphs: list[Any]


def paragraph_id(article_title: str, paragraph_index: int) -> str:
    """The passage id of a paragraph; `paragraph_index` counts from 0 within the article."""
    return f"{article_title}#{paragraph_index}"


def read(source: SourceFile) -> Iterator[Row | Reject]:
    """Rows and rejects of one SQuAD file; rejects have no line, their `found` shows the paragraph.

    Raises:
        InputError: the file is not SQuAD JSON.
    """
    for article in read_articles(source.path):
        for index, paragraph in enumerate(article.paragraphs):
            text = paragraph.get("context") if isinstance(paragraph, dict) else None
            id = paragraph_id(article.title, index)
            yield check_row(source.path, None, id, article.title, text, found=f"{id}: {paragraph!r}")


def read_articles(path: Path) -> list[Article]:
    """The articles of a SQuAD file.

    Raises:
        InputError: an archive, not UTF-8, not JSON, not laid out as SQuAD, or two articles share a title.
    """
    refuse_archives_and_utf16(path)
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
    articles: dict[str, Article] = {}
    for number, entry in enumerate(data, 1):
        article = _article(path, number, entry)
        if article.title in articles:
            raise InputError(
                f"{path} has two articles titled {article.title!r} (the second is article {number}), so their "
                "paragraphs would share ids. Make the titles unique."
            )
        articles[article.title] = article
    return list(articles.values())


def _article(path: Path, number: int, entry: object) -> Article:
    if isinstance(entry, dict):
        title, paragraphs = entry.get("title"), entry.get("paragraphs")
        if isinstance(title, str) and title.strip() and isinstance(paragraphs, list):
            return Article(title, paragraphs)
    found = f"the keys {list(entry)}" if isinstance(entry, dict) else type(entry).__name__
    raise InputError(
        f"{path} article {number}: expected an object with a string `title` and a list `paragraphs`, found {found}. "
        "Correct the file or the format."
    )
