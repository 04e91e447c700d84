"""Faults in prompts: special tokens inside fields, chats, and the answers that continue a context."""

from __future__ import annotations

from tests.mutants.mutant import Mutant

CONTEXTS = "rag_core/reading/contexts.py"
RENDERING = "rag_core/reading/rendering.py"
SPECIAL = "rag_core/reading/special_tokens.py"
CHATS = "tests/reading/test_rendering.py"
HOSTILE = "tests/reading/test_special_tokens.py"

PROMPTS = (
    Mutant(
        "special tokens inside passages stay special",
        CONTEXTS,
        "if self._special.count(ids[row]) > self._own:",
        "if self._special.count(ids[row]) < self._own:",
        HOSTILE,
    ),
    Mutant(
        "special tokens inside answers stay special",
        CONTEXTS,
        "if special.count(rows[row]) > special.count(before_ids):",
        "if special.count(rows[row]) < special.count(before_ids):",
        HOSTILE,
    ),
    Mutant(
        "special tokens of the template broken, too",
        SPECIAL,
        "return [place for place in places if filled.in_fields(*place)]",
        "return places",
        HOSTILE,
    ),
    Mutant(
        "special tokens recognised in one round only", SPECIAL, "if not places:", "if not places or attempt:", HOSTILE
    ),
    Mutant(
        "a chat starts twice",
        RENDERING,
        "special_tokens=False, answer_prefix",
        "special_tokens=True, answer_prefix",
        CHATS,
    ),
    Mutant("thinking left on", RENDERING, "**NO_THINKING,", "", CHATS),
    Mutant("an open <think> left in the context", RENDERING, "endswith(OPEN_THINKING)", "endswith('<never>')", CHATS),
    Mutant("the clock's date in a chat", RENDERING, "template = _FIXED_DATE + template", "pass", CHATS),
    Mutant(
        "a system text that is left out is not noticed",
        RENDERING,
        "return _SYSTEM in self._render",
        "return '' in self._render",
        CHATS,
    ),
    Mutant("a changed user's turn is not noticed", RENDERING, "!= Filled.of(context, _SAMPLE).text", "is None", CHATS),
    Mutant(
        "the end of a chat's turn does not end decoding",
        RENDERING,
        "if token not in known:",
        "if token in known:",
        CHATS,
    ),
    Mutant("no space between text and answer", RENDERING, 'spaces = " "', 'spaces = ""', CHATS),
    Mutant(
        "answers tokenised without their context",
        CONTEXTS,
        'before = "" if rendered is None else after_last_field(rendered.context) or ":"',
        'before = ""',
        CHATS,
    ),
    Mutant(
        "an end token before a decoder-only model's answer",
        CONTEXTS,
        "return row[: len(row) - self._left_out]",
        "return row",
        CHATS,
    ),
)
