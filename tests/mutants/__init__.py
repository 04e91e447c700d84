"""Deliberate faults, to check that the tests notice them: `python -m tests.mutants` (or `make mutants`).

For each mutant the runner replaces one piece of source in a copy of the project and runs the mutant's tests; one of
them must fail. `tests/project/test_mutants.py` checks in every test run that each piece still occurs exactly once.
"""

from __future__ import annotations

from tests.mutants.decoder_only import DECODER_ONLY
from tests.mutants.model_sources import MODEL_SOURCES
from tests.mutants.prompts import PROMPTS
from tests.mutants.reading_and_decoding import READING_AND_DECODING
from tests.mutants.training_and_artifacts import TRAINING_AND_ARTIFACTS

MUTANTS = READING_AND_DECODING + DECODER_ONLY + PROMPTS + MODEL_SOURCES + TRAINING_AND_ARTIFACTS
