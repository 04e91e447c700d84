"""The list of deliberate faults fits the code of today; that tests catch them is seen by `make mutants`."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.mutants import MUTANTS
from tests.mutants.mutant import Mutant, mutated

PROJECT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.fault)
def test_a_fault_can_still_be_put_into_the_code_and_is_still_code(mutant: Mutant) -> None:
    source = mutated(mutant, (PROJECT / mutant.file).read_text(encoding="utf-8"))
    compile(source, mutant.file, "exec")
    assert all((PROJECT / test.partition("::")[0]).is_file() for test in mutant.tests.split())
