"""Deliberate faults, and whether the tests notice: `python -m tests.mutants` (or `make mutants`).

Each mutant replaces one piece of source in a copy of the project, runs the tests named beside it and must see one fail.
`tests/project/test_mutants.py` checks in every test run that each piece of source is still there, once.
"""

from __future__ import annotations

from tests.mutants.reading_and_decoding import READING_AND_DECODING
from tests.mutants.training_and_artifacts import TRAINING_AND_ARTIFACTS

MUTANTS = READING_AND_DECODING + TRAINING_AND_ARTIFACTS
