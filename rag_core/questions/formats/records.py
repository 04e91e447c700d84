"""A record of a question file with the place where it stood, and the checks of its values.

Every check raises InputError with place, key, what was found and what was expected. Nothing here knows a data set.
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
    """What should be a question, where it stood, and the id it gets if it names none.

    `layout` is set where the container tells the layout, as SQuAD's nested JSON does.
    """

    place: str
    default_id: str
    value: Any
    layout: str | None = None

    def error(self, fault: str, expected: str) -> InputError:
        """The error of this record."""
        try:
            found = self.value if isinstance(self.value, str) else json.dumps(self.value, ensure_ascii=False)
        except (TypeError, ValueError, RecursionError):  # of Python's literals, not of JSON; or nested very deeply
            found = f"a {type(self.value).__name__}"
        found = excerpt(found)
        return InputError(f"{self.place}: {fault}; expected {expected}. Found {found!r}. Correct or remove it.")

    def get(self, key: str) -> Any:
        """The value of a key; None where it is missing or null. The record must be an object."""
        return self.value.get(key)


def text(record: Record, name: str, value: object) -> str:
    """`value` as a string that is not empty and can be stored."""
    fault = field_fault(name, value)
    if fault:
        raise record.error(fault, f"`{name}` to be a string that is not empty")
    return str(value)


def texts(record: Record, name: str, value: object) -> tuple[str, ...]:
    """`value` as strings that are not empty; none for None."""
    return tuple(text(record, name, item) for item in list_of(record, name, value, "strings"))


def list_of(record: Record, name: str, value: object, items: str) -> list[Any]:
    """`value` as a list whose items are not yet checked; empty for None."""
    if value is None:
        return []
    if not isinstance(value, list):
        raise record.error(f"`{name}` is {type(value).__name__}", f"`{name}` to be a list of {items}")
    return value


def objects(record: Record, name: str, value: object) -> list[dict[str, Any]]:
    """`value` as a list of objects; empty for None."""
    found = list_of(record, name, value, "objects")
    for item in found:
        if not isinstance(item, dict):
            raise record.error(f"`{name}` holds a {type(item).__name__}", f"`{name}` to be a list of objects")
    return found


def rows_of(record: Record, name: str, value: object) -> list[dict[str, Any]]:
    """A list of objects, also where it is written as an object of equally long lists, as Hugging Face's data sets do."""
    if not isinstance(value, dict):
        return objects(record, name, value)
    columns = {key: column for key, column in value.items() if isinstance(column, list)}
    lengths = {len(column) for column in columns.values()}
    if len(lengths) > 1:
        raise record.error(f"the lists in `{name}` are not equally long", "one item of each list for every row")
    return [dict(zip(columns, items, strict=True)) for items in zip(*columns.values(), strict=True)]


def distinct(items: Iterable[Any]) -> list[Any]:
    """Items in their order, each string once; what is no string stays, for its check."""
    seen: set[str] = set()
    found = []
    for item in items:
        if not isinstance(item, str):
            found.append(item)
        elif item not in seen:
            seen.add(item)
            found.append(item)
    return found


def number(value: object) -> float:
    """A number, also where it is written as text; NaN for anything else."""
    try:
        return math.nan if isinstance(value, bool) or not isinstance(value, int | float | str) else float(value)
    except (ValueError, OverflowError):
        return math.nan
