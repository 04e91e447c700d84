"""Consoles for the terminal, all made here. They print text exactly as it is.

Paths, question types, answers and error messages may contain `[/b]` or `:smile:`, which Rich would read as markup. A
`Terminal` never does, neither in lines nor in tables and titles; style is passed apart from the text (`styled`).
Control characters, which could move the cursor or reverse the line, appear as escapes.
"""

from __future__ import annotations

from typing import Any

from rich.console import Console
from rich.progress import TextColumn
from rich.text import Text

# C0 and C1 controls, and characters that change the direction of text. Tab and line feed get no escape.
_CONTROLS = [*range(0x20), *range(0x7F, 0xA0), 0x061C, 0x200E, 0x200F, *range(0x202A, 0x202F), *range(0x2066, 0x206A)]
_ESCAPES = {code: f"\\x{code:02x}" if code < 0x100 else f"\\u{code:04x}" for code in _CONTROLS if code not in (9, 10)}


class Terminal(Console):
    """A console on which no text is markup."""

    def __init__(self, *, stderr: bool = False, **options: Any) -> None:
        super().__init__(stderr=stderr, **{**options, "markup": False, "emoji": False, "highlight": False})

    def render_str(self, text: str, **options: Any) -> Text:
        """Rich calls this for every string that it prints, and for every cell and title of a table."""
        return super().render_str(printable(text), **{**options, "markup": False, "emoji": False, "highlight": False})


def printable(text: str) -> str:
    """The text with control characters as escapes such as \\x1b; tabs and line ends are kept."""
    return text.translate(_ESCAPES)


def one_line(text: str) -> str:
    """`printable`, with line ends and tabs as escapes too: for a table cell."""
    return printable(text).replace("\n", "\\n").replace("\t", "\\t")


def shortened(text: str, most: int = 60) -> str:
    """`one_line`, cut to `most` characters."""
    text = one_line(text)
    return text if len(text) <= most else f"{text[: most - 1]}…"


def styled(text: str, style: str) -> Text:
    """Text in a style such as "bold red"."""
    return Text(printable(text), style=style)


def text_column(template: str) -> TextColumn:
    """A progress bar's column, for example "{task.description}". The inserted text must hold no control characters."""
    return TextColumn(template, markup=False)


def say(text: str, style: str = "") -> None:
    """Print one paragraph on standard error, without wrapping it."""
    Terminal(stderr=True).print(text, style=style, soft_wrap=True)
