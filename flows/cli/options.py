"""Options that commands of several modules share."""

from __future__ import annotations

from typing import Annotated

import typer

AnswersAreOption = Annotated[
    str | None,
    typer.Option(
        "--answers-are",
        help="text | regex: kind of the answers, if the file does not state it (CuratedTREC has regular expressions).",
    ),
]
TrustRemoteCode = Annotated[
    bool,
    typer.Option(
        "--trust-remote-code",
        help="Run code that comes with the model; only for models you trust. Not stored: give it each time.",
    ),
]

Match = Annotated[
    str,
    typer.Option(
        "--match",
        help="How answers are compared. words: the published rule. characters: for Chinese, Japanese, Korean, Thai and "
        "other text without spaces.",
    ),
]
