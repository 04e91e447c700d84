"""Messages to the user while a stage runs: on the terminal and in the log of the Prefect flow run."""

from __future__ import annotations

from prefect.exceptions import MissingContextError
from prefect.logging import get_run_logger

from tasks.terminal import say

_shown: set[str] = set()


def tell(text: str) -> None:
    """Print one line on standard error, and in a flow also log it. For problems use `warn`."""
    say(text)
    try:
        get_run_logger().info("%s", text)
    except MissingContextError:
        return


def warn(text: str) -> None:
    """Print one paragraph on standard error, and in a flow also log it as a warning."""
    say(text, style="yellow")
    try:
        get_run_logger().warning("%s", text)
    except MissingContextError:
        return


def warn_once(text: str) -> None:
    """`warn`, but only once per process for the same text: several stages of a pipeline may notice the same thing."""
    if text not in _shown:
        _shown.add(text)
        warn(text)
