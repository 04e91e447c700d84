"""Options that commands of several modules share."""

from __future__ import annotations

from typing import Annotated

import typer

TrustRemoteCode = Annotated[
    bool,
    typer.Option(
        "--trust-remote-code",
        help="Run code that comes with the model: only for models you trust. It is not remembered.",
    ),
]
