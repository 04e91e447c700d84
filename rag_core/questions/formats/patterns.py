"""Checks that an answer can be used as a regular expression: it compiles, quickly and in little memory.

The package `regex` expands repeats when it compiles: `((a{1000}){1000}){1000}` takes gigabytes. So the length of the
expanded pattern is estimated first.
"""

from __future__ import annotations

import re

import regex

# The flags of DrQA: Chen et al. 2017, `drqa/reader/utils.py`, `regex_match_score`.
FLAGS = regex.IGNORECASE | regex.UNICODE | regex.MULTILINE
MAX_CHARS = 10_000
MAX_WRITTEN_OUT = 100_000
_TOKEN = re.compile(r"\\.|\{(\d+)(?:,(\d*))?\}|.", re.DOTALL)
_COMMENT = re.compile(r"\(\?#[^)]*\)")


def pattern_fault(pattern: str) -> str | None:
    """Why `pattern` cannot be used; None if it can."""
    if len(pattern) > MAX_CHARS:
        return f"it has {len(pattern)} characters, more than {MAX_CHARS}"
    if _written_out(pattern) > MAX_WRITTEN_OUT:
        return f"with its repeats written out it has more than {MAX_WRITTEN_OUT} characters"
    try:
        regex.compile(pattern, FLAGS)
    except (regex.error, RecursionError, OverflowError, MemoryError, ValueError, IndexError, KeyError) as error:
        return str(error) or type(error).__name__
    return None


def _written_out(pattern: str) -> int:
    """Estimate the number of characters of the pattern with every {n} written out."""
    sums, last, in_class = [0], 0, False
    for token in _TOKEN.finditer(_COMMENT.sub("", pattern)):
        mark = token.group()
        if in_class or mark == "[":
            in_class, last = mark != "]", 1
        elif mark == "(":
            sums.append(0)
            continue
        elif mark == ")" and len(sums) > 1:
            last = sums.pop() + 1
        elif token.group(1) is not None:
            times = int((token.group(2) or token.group(1))[:9])
            sums[-1] += last * max(times - 1, 0)
            last *= max(times, 1)
            continue
        else:
            last = 1
        sums[-1] += last
    return sum(sums)
