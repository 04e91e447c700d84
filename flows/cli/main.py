"""The command line `rag`, with a command for every stage. Commands import heavy modules only when they run.

A `RagError` is an error that the user can correct: it ends the command with one paragraph and exit code 2.
Ctrl-C ends it with exit code 130. Every other exception is a bug of ours and keeps its traceback.
"""

from __future__ import annotations

import io
import os
import sys
import warnings
from typing import Annotated, NoReturn, TextIO

import typer

from flows.cli.commands import artifacts as artifact_commands
from flows.cli.commands import exchange as exchange_commands
from flows.cli.commands import inspection as inspect_commands
from flows.cli.commands import runs as run_commands
from flows.cli.commands import stages as stage_commands
from flows.cli.commands import sync as sync_command
from rag_core.errors import ModelNotice, RagError
from tasks.terminal import Terminal, printable, say, styled

app = typer.Typer(
    name="rag",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    help="Train and run retrieval-augmented generation (RAG-Sequence, RAG-Token) on your own corpus.\n\n"
    "The stages in order: corpus, embed, index, (pretrain,) train, infer, evaluate. `rag pipeline` runs them all from "
    "one YAML file; `rag demo` runs them on a built-in example.",
)
stage_commands.add_to(app)
run_commands.add_to(app)
inspect_commands.add_to(app)
exchange_commands.add_to(app)
artifact_commands.add_to(app)
sync_command.add_to(app)


@app.callback()
def settings(
    context: typer.Context,
    wait: Annotated[
        float | None,
        typer.Option(
            metavar="SECONDS",
            help="How long to wait for another run that writes to the same place; 0 fails at once. Default: "
            "RAG_WAIT_SECONDS, else 0.",
        ),
    ] = None,
) -> None:
    """Apply the options of every command."""
    if wait is not None:
        os.environ["RAG_WAIT_SECONDS"] = str(wait)
    if context.invoked_subcommand != "doctor":  # doctor shows wrong variables itself
        from tasks.environment.variables import FOR_EVERY_COMMAND, check_variables

        check_variables(FOR_EVERY_COMMAND)


def run() -> NoReturn:
    """Entry point of the `rag` script."""
    _print_notices()
    # A character that the terminal cannot show must not fail a command whose work is done.
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    # The terminal shows progress bars and our messages; Prefect's log and tracebacks are on the flow run's page.
    os.environ.setdefault("PREFECT_LOGGING_HANDLERS_CONSOLE_LEVEL", "CRITICAL")
    os.environ.setdefault("MLFLOW_LOGGING_LEVEL", "WARNING")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    try:
        app(standalone_mode=True)
    except RagError as error:
        fail(str(error))
    except KeyboardInterrupt:
        Terminal(stderr=True).print("\nInterrupted. Finished stages are kept; run the same command to continue.")
        sys.exit(130)
    sys.exit(0)


def _print_notices() -> None:
    """Show a `ModelNotice` as one line, without Python's file and line; show other warnings as before."""
    show_as_before = warnings.showwarning

    def show(
        message: Warning | str,
        category: type[Warning],
        filename: str,
        lineno: int,
        file: TextIO | None = None,
        line: str | None = None,
    ) -> None:
        if issubclass(category, ModelNotice):
            say(f"Note: {message}")
        else:
            show_as_before(message, category, filename, lineno, file, line)

    warnings.showwarning = show


def fail(message: str) -> NoReturn:
    """Print the message on standard error and exit with code 2."""
    Terminal(stderr=True, soft_wrap=True).print(styled("Error:", "bold red"), printable(message))
    sys.exit(2)


if __name__ == "__main__":
    run()
