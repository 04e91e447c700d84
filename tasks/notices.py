"""What the user has to know while a stage runs: on the terminal, and in the log of the Prefect flow run."""

from __future__ import annotations

from prefect.exceptions import MissingContextError
from prefect.logging import get_run_logger
from rich.console import Console


def tell(text: str) -> None:
    """One line on standard error; in a flow also in its log. For what is as it should be."""
    Console(stderr=True).print(text, highlight=False, soft_wrap=True, markup=False)
    try:
        get_run_logger().info("%s", text)
    except MissingContextError:
        return


def warn(text: str) -> None:
    """One paragraph on standard error; in a flow also a warning in its log."""
    Console(stderr=True).print(text, style="yellow", highlight=False, soft_wrap=True, markup=False)
    try:
        get_run_logger().warning(text)
    except MissingContextError:
        return
