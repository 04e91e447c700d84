"""The programs of docs/correctness.md run, and what they assert holds with the installed Transformers."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

PAGE = Path(__file__).resolve().parents[2] / "docs" / "correctness.md"
FIRST, *PROGRAMS = re.findall(r"^```python\n(.*?)^```", PAGE.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)


def test_the_page_holds_programs() -> None:
    assert len(PROGRAMS) >= 8


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("number", range(len(PROGRAMS)))
def test_every_program_of_the_page_holds(number: int) -> None:
    # Each stands on the first alone.
    names: dict[str, object] = {}
    for program in (FIRST, PROGRAMS[number]):
        exec(compile(program, str(PAGE), "exec"), names)
