"""Options that commands of several modules share."""

from __future__ import annotations

from typing import Annotated

import typer

AnswersAreOption = Annotated[
    str | None,
    typer.Option(
        "--answers-are",
        help="text | regex: what answers are where the file does not say (CuratedTREC's are regular expressions).",
    ),
]
TrustRemoteCode = Annotated[
    bool,
    typer.Option(
        "--trust-remote-code",
        help="Run code that comes with the model: only for models you trust. It is not remembered.",
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
