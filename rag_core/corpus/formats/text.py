"""Plain text and Markdown, cut into passages of at most `words_per_passage` words.

The text is cut between paragraphs if that leaves passages at least half full, else between sentences, and inside
a sentence only if it is longer than a whole passage. A passage is a verbatim slice of the text. Only white space
at the cuts is dropped, so no word is ever lost. Words are separated by white space, so text in a script without
spaces (Chinese, Thai) yields passages of many sentences; cut such text beforehand.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator

from rag_core.corpus.formats.rows import Reject, Row, check_row, excerpt, numbered_lines
from rag_core.corpus.formats.sources import SourceFile

_WORD = re.compile(r"\S+")
_BREAK = re.compile(r"\n[^\S\n]*\n")
_SENTENCE_END = re.compile(r"[.!?…][\"'”’»)\]*_]*$")
_HEADING = re.compile(r" {0,3}#{1,6}[ \t]+(.+?)(?:[ \t]+#+)?[ \t]*$")
_FENCE = re.compile(r" {0,3}(```|~~~)")

Unit = tuple[int, int, int]
"""A part of the text that is not cut: start, end, and number of words."""


def read(source: SourceFile, words_per_passage: int) -> Iterator[Row | Reject]:
    """Rows and rejects of one text file; an undecodable line is rejected, the text around it is kept."""
    lines: list[str] = []
    for number, line in numbered_lines(source.path):
        if isinstance(line, str) and "\0" in line:
            line = Reject(str(source.path), number, "NUL character: in text", excerpt(line))
        if isinstance(line, Reject):
            yield line
        else:
            lines.append(line)
    title = (_first_heading(lines) if source.path.suffix.lower() == ".md" else None) or source.path.stem
    passages = split_text("\n".join(lines), words_per_passage)
    if not passages:
        yield Reject(str(source.path), None, "empty text", "")
    for index, text in enumerate(passages):
        yield check_row(source.path, None, f"{source.name}#{index}", title, text, found=text)


def split_text(text: str, words_per_passage: int) -> list[str]:
    """Cut `text` into slices of 1 to `words_per_passage` words, which together hold every word in order."""
    slices: list[str] = []
    start, end, words = 0, 0, 0
    for units in _paragraphs(text, words_per_passage):
        total = sum(unit[2] for unit in units)
        # A paragraph that does not fit starts a new passage, unless the old one would be less than half full.
        if words + total > words_per_passage and 2 * words >= words_per_passage:
            slices.append(text[start:end])
            words = 0
        for unit_start, unit_end, unit_words in units:
            if words and words + unit_words > words_per_passage:
                slices.append(text[start:end])
                words = 0
            start = unit_start if words == 0 else start
            end, words = unit_end, words + unit_words
    return [*slices, text[start:end]] if words else slices


def _paragraphs(text: str, limit: int) -> Iterator[list[Unit]]:
    """The sentences of each paragraph; a sentence of more than `limit` words comes in pieces."""
    edges = [0, *(match.end() for match in _BREAK.finditer(text)), len(text)]
    for start, end in itertools.pairwise(edges):
        units: list[Unit] = []
        sentence: list[re.Match[str]] = []
        for word in _WORD.finditer(text, start, end):
            sentence.append(word)
            if len(sentence) == limit or _SENTENCE_END.search(word.group()):
                units.append((sentence[0].start(), sentence[-1].end(), len(sentence)))
                sentence = []
        if sentence:
            units.append((sentence[0].start(), sentence[-1].end(), len(sentence)))
        if units:
            yield units


def _first_heading(lines: list[str]) -> str | None:
    """The first ATX heading outside a fenced code block, where `#` starts a comment."""
    fence = None
    for line in lines:
        mark = _FENCE.match(line)
        if mark and fence in (None, mark.group(1)):
            fence = None if fence else mark.group(1)
        elif fence is None and (heading := _HEADING.match(line)):
            return heading.group(1)
    return None
