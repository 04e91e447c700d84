"""Parses lists and objects written as text in a CSV cell, in JSON or Python syntax. No code is executed."""

from __future__ import annotations

import ast
import contextlib
import io
import json
import re
import tokenize
import warnings
from typing import Any

_NUMPY = re.compile(r"\barray\(\[|dtype=")


def parse_literal(text: str) -> Any:
    """The list or object that the text holds in JSON or Python syntax; None if it holds neither."""
    # JSON first: for text that is valid in both, only JSON joins surrogate pairs (such as \ud83d\ude00).
    for parse in (json.loads, ast.literal_eval):
        with (
            warnings.catch_warnings(action="ignore", category=SyntaxWarning),
            contextlib.suppress(ValueError, SyntaxError, TypeError, MemoryError, RecursionError),
        ):
            value = parse(text.strip())
            return value if isinstance(value, list | dict) else None
    return None


def numpy_fault(text: str) -> str | None:
    """The fault of a cell that holds a printed NumPy array, which Python would misread; None for other cells.

    `['Lyon' 'Paris']` is two strings in NumPy's print, but one string, `LyonParis`, in Python.
    """
    if _NUMPY.search(text) and parse_literal(text) is None:
        return "holds NumPy's print of an array"
    # Look for two strings with only white space between them; the cheap test first, as almost no cell has that.
    if not re.search(r"""['"]\s+[rbu]?['"]""", text) or isinstance(_json(text), list | dict):
        return None
    if parse_literal(text) is None:
        return None
    previous = None
    with contextlib.suppress(tokenize.TokenError, SyntaxError, IndentationError):
        for token in tokenize.generate_tokens(io.StringIO(text.strip()).readline):
            if token.type == tokenize.STRING and previous == tokenize.STRING:
                return "holds strings without a comma between them (NumPy prints arrays so)"
            if token.type not in (tokenize.NL, tokenize.NEWLINE, tokenize.COMMENT):
                previous = token.type
    return None


def _json(text: str) -> Any:
    with contextlib.suppress(ValueError, RecursionError):
        return json.loads(text)
    return None
