"""What the user has to know while a stage runs: on the terminal, and in the log of the Prefect flow run."""

from __future__ import annotations

from prefect.exceptions import MissingContextError
from prefect.logging import get_run_logger

from tasks.terminal import say

_told: set[str] = set()


def tell(text: str) -> None:
    """One line on standard error; in a flow also in its log. For what is as it should be."""
    say(text)
    try:
        get_run_logger().info("%s", text)
    except MissingContextError:
        return


def warn(text: str) -> None:
    """One paragraph on standard error; in a flow also a warning in its log."""
    say(text, style="yellow")
    try:
        get_run_logger().warning("%s", text)
    except MissingContextError:
        return


def warn_once(text: str) -> None:
    """The same, unless this process has said so already: in a pipeline several stages find the same."""
    if text not in _told:
        _told.add(text)
        warn(text)
