"""`rag sync-mlflow`: sends the entries that runs kept while MLflow did not answer."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def add_to(app: typer.Typer) -> None:
    """Register the command."""
    app.command(name="sync-mlflow", rich_help_panel="Ask and inspect")(sync_mlflow)


def sync_mlflow(
    files: Annotated[
        list[Path] | None,
        typer.Argument(help="Files named by a run; default: all in the folder mlflow-unsent.", metavar="FILE…"),
    ] = None,
) -> None:
    """Send to MLflow the entries kept while it did not answer (every command also does this at its start)."""
    from rag_core.errors import ArtifactError, InputError
    from tasks.environment.variables import FOR_STAGES, check_variables
    from tasks.tracking.runs import send_unsent, unsent_files, unsent_folder

    check_variables(FOR_STAGES)
    for file in files or []:
        if not file.is_file():
            raise InputError(f"{file} does not exist; it may have been sent already. Give files of {unsent_folder()}.")
    waiting = [file.resolve() for file in files] if files else unsent_files()
    left = send_unsent(waiting, anywhere=True, seconds=float("inf"))
    if left:
        reasons = " ".join(f"{file}: {reason}" for file, reason in left.items())
        raise ArtifactError(
            f"{len(left)} of {len(waiting)} files were not sent. {reasons} They are kept: run `rag sync-mlflow` again "
            "when MLflow answers, or delete the lines that it refuses."
        )
    typer.echo(f"{len(waiting)} files sent." if waiting else f"There is nothing to send in {unsent_folder()}.")
