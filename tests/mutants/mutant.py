"""A deliberate fault: one piece of source is replaced by another."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Mutant:
    """One fault: in `file`, `old` (which occurs there once) becomes `new`; `tests` are pytest arguments."""

    fault: str
    file: str
    old: str
    new: str
    tests: str


def mutated(mutant: Mutant, source: str) -> str:
    """The source with the fault in it. Raises ValueError unless `mutant.old` occurs exactly once."""
    if source.count(mutant.old) != 1:
        raise ValueError(f"{mutant.file} holds {mutant.old!r} {source.count(mutant.old)} times, not once")
    return source.replace(mutant.old, mutant.new)
