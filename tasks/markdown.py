"""Text in the Markdown of Prefect's pages and of `summary.md`: people's words are never its syntax."""

from __future__ import annotations

import re

from tasks.terminal import one_line, shortened

_SYNTAX = re.compile(r"([\\`*_\[\]<>|~&$])")
_BARE_PIPE = re.compile(r"(?<!\\)\|")


def text_cell(text: str) -> str:
    """Plain text for a table's cell."""
    return _SYNTAX.sub(r"\\\1", shortened(text, 200))


def code_cell(text: str) -> str:
    """The text as code for a table's cell."""
    text = one_line(text).replace("|", r"\|")
    longest = max((len(run) for run in re.findall("`+", text)), default=0)
    fence, space = "`" * (longest + 1), " " if "`" in text or not text.strip() else ""
    return f"{fence}{space}{text}{space}{fence}"


def table(head: list[str], rows: list[list[str]]) -> str:
    """A table of cells that are Markdown; a pipe or a line end in one does not end it."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(
        "| " + " | ".join(_BARE_PIPE.sub(r"\\|", " ".join(cell.split("\n"))) for cell in line) + " |" for line in lines
    )
