"""A record of a question file with its place, and checks of its values.

Every check raises InputError with place, key, what was found and what was expected. This module knows no data set.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from rag_core.corpus.formats.rows import excerpt, field_fault
from rag_core.errors import InputError


@dataclass(frozen=True, slots=True)
class Record:
    """A question as it was read, its place in the file, and the id it gets if it has none.

    `layout` is set if the container determines the layout, as SQuAD's nested JSON does.
    """

    place: str
    default_id: str
    value: Any
    layout: str | None = None

    def error(self, fault: str, expected: str) -> InputError:
        """An InputError about this record, with its place and an excerpt."""
        try:
            shown = self.value if isinstance(self.value, str) else json.dumps(self.value, ensure_ascii=False)
        except (TypeError, ValueError, RecursionError):  # a Python literal that JSON lacks, or very deep nesting
            shown = f"a {type(self.value).__name__}"
        shown = excerpt(shown)
        return InputError(f"{self.place}: {fault}; expected {expected}. Found {shown!r}. Correct or remove it.")

    def get(self, key: str) -> Any:
        """The value of a key; None if it is missing or null. The record must be an object."""
        return self.value.get(key)


def text(record: Record, name: str, value: object) -> str:
    """`value` as a string; raises unless it is not empty and can be stored."""
    fault = field_fault(name, value)
    if fault:
        raise record.error(fault, f"`{name}` to be a string that is not empty")
    return str(value)


def texts(record: Record, name: str, value: object) -> tuple[str, ...]:
    """`value` as a tuple of strings that are not empty; an empty tuple for None."""
    return tuple(text(record, name, item) for item in list_of(record, name, value, "strings"))


def list_of(record: Record, name: str, value: object, items: str) -> list[Any]:
    """`value` as a list, with unchecked items; empty for None. `items` names them in the error message."""
    if value is None:
        return []
    if not isinstance(value, list):
        raise record.error(f"`{name}` is {type(value).__name__}", f"`{name}` to be a list of {items}")
    return value


def objects(record: Record, name: str, value: object) -> list[dict[str, Any]]:
    """`value` as a list of objects; empty for None."""
    items = list_of(record, name, value, "objects")
    for item in items:
        if not isinstance(item, dict):
            raise record.error(f"`{name}` holds a {type(item).__name__}", f"`{name}` to be a list of objects")
    return items


def rows_of(record: Record, name: str, value: object) -> list[dict[str, Any]]:
    """`value` as a list of objects; it may also be an object of equally long lists, as in Hugging Face's data sets."""
    if not isinstance(value, dict):
        return objects(record, name, value)
    columns = {key: column for key, column in value.items() if isinstance(column, list)}
    lengths = {len(column) for column in columns.values()}
    if len(lengths) > 1:
        raise record.error(f"the lists in `{name}` are not equally long", "one item of each list for every row")
    return [dict(zip(columns, items, strict=True)) for items in zip(*columns.values(), strict=True)]


def distinct(items: Iterable[Any]) -> list[Any]:
    """The items in order, each string once. Items that are not strings are kept, so that a later check refuses them."""
    seen: set[str] = set()
    kept = []
    for item in items:
        if not isinstance(item, str):
            kept.append(item)
        elif item not in seen:
            seen.add(item)
            kept.append(item)
    return kept


def number(value: object) -> float:
    """`value` as a number, also if it is written as text; NaN for anything else."""
    try:
        return math.nan if isinstance(value, bool) or not isinstance(value, int | float | str) else float(value)
    except (ValueError, OverflowError):
        return math.nan
