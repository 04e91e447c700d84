"""Escape text for the Markdown of Prefect's pages and of `summary.md`, so that it is never read as syntax."""

from __future__ import annotations

import re

from tasks.terminal import one_line, shortened

_SYNTAX = re.compile(r"([\\`*_\[\]<>|~&$])")
_BARE_PIPE = re.compile(r"(?<!\\)\|")


def text_cell(text: str) -> str:
    """Plain text for a table cell, cut after 200 characters."""
    return _SYNTAX.sub(r"\\\1", shortened(text, 200))


def code_cell(text: str) -> str:
    """The text as code for a table cell."""
    text = one_line(text).replace("|", r"\|")
    longest = max((len(backticks) for backticks in re.findall("`+", text)), default=0)
    fence, space = "`" * (longest + 1), " " if "`" in text or not text.strip() else ""
    return f"{fence}{space}{text}{space}{fence}"


def table(head: list[str], rows: list[list[str]]) -> str:
    """A table whose cells are Markdown. Pipes are escaped and line ends become spaces, so a cell stays whole."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(
        "| " + " | ".join(_BARE_PIPE.sub(r"\\|", " ".join(cell.split("\n"))) for cell in line) + " |" for line in lines
    )
