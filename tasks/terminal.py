"""The terminal: the one place where consoles are made. Whatever is printed appears as it is.

Paths, question types, answers and error texts are people's words, and Rich would read `[/b]` or `:smile:` in them as
markup. A `Terminal` never does, in lines, tables and titles; style is given apart from the text (`styled`). Control
characters, which could move the cursor or turn the line around, appear as escapes.
"""

from __future__ import annotations

from typing import Any

from rich.console import Console
from rich.progress import TextColumn
from rich.text import Text

# C0 and C1 controls but for tab and line feed, and what changes the direction of text.
_CONTROLS = [*range(0x20), *range(0x7F, 0xA0), 0x061C, 0x200E, 0x200F, *range(0x202A, 0x202F), *range(0x2066, 0x206A)]
_ESCAPES = {code: f"\\x{code:02x}" if code < 0x100 else f"\\u{code:04x}" for code in _CONTROLS if code not in (9, 10)}


class Terminal(Console):
    """A console on which no text is markup."""

    def __init__(self, *, stderr: bool = False, **options: Any) -> None:
        super().__init__(stderr=stderr, **{**options, "markup": False, "emoji": False, "highlight": False})

    def render_str(self, text: str, **options: Any) -> Text:
        """Every string that is printed, and every cell and title of a table, goes through here."""
        return super().render_str(printable(text), **{**options, "markup": False, "emoji": False, "highlight": False})


def printable(text: str) -> str:
    """The text with control characters as escapes such as \\x1b; tabs and line ends stay."""
    return text.translate(_ESCAPES)


def one_line(text: str) -> str:
    """The same with line ends and tabs as escapes, too: for a cell."""
    return printable(text).replace("\n", "\\n").replace("\t", "\\t")


def shortened(text: str, most: int = 60) -> str:
    """The same, of a long text the beginning."""
    text = one_line(text)
    return text if len(text) <= most else f"{text[: most - 1]}…"


def styled(text: str, style: str) -> Text:
    """Text in a style such as "bold red"."""
    return Text(printable(text), style=style)


def text_column(template: str) -> TextColumn:
    """A column of a progress bar, for example "{task.description}"; what is filled in must hold no control characters."""
    return TextColumn(template, markup=False)


def say(text: str, style: str = "") -> None:
    """One paragraph on standard error, in one line as long as it is."""
    Terminal(stderr=True).print(text, style=style, soft_wrap=True)
