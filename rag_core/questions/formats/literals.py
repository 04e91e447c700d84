"""Lists and objects that are written as text, in a cell of CSV: in JSON's way or in Python's. No code is run."""

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
    """A list or an object written in Python's or JSON's way; None if it is neither."""
    # JSON first: where text is both, only JSON joins its surrogate pairs (such as \ud83d\ude00).
    for parse in (json.loads, ast.literal_eval):
        with (
            warnings.catch_warnings(action="ignore", category=SyntaxWarning),
            contextlib.suppress(ValueError, SyntaxError, TypeError, MemoryError, RecursionError),
        ):
            value = parse(text.strip())
            return value if isinstance(value, list | dict) else None
    return None


def numpy_fault(text: str) -> str | None:
    """What is wrong with a cell that holds NumPy's print of an array, which Python reads as something else; else None.

    `['Lyon' 'Paris']` is two strings for NumPy, and one, `LyonParis`, for Python.
    """
    if _NUMPY.search(text) and parse_literal(text) is None:
        return "holds NumPy's print of an array"
    # Two strings with white space between them; the cheap look first, as almost no cell has that.
    if not re.search(r"""['"]\s+[rbu]?['"]""", text) or isinstance(_json(text), list | dict):
        return None
    if parse_literal(text) is None:
        return None
    before = None
    with contextlib.suppress(tokenize.TokenError, SyntaxError, IndentationError):
        for token in tokenize.generate_tokens(io.StringIO(text.strip()).readline):
            if token.type == tokenize.STRING and before == tokenize.STRING:
                return "holds strings without a comma between them (NumPy prints arrays so)"
            if token.type not in (tokenize.NL, tokenize.NEWLINE, tokenize.COMMENT):
                before = token.type
    return None


def _json(text: str) -> Any:
    with contextlib.suppress(ValueError, RecursionError):
        return json.loads(text)
    return None
