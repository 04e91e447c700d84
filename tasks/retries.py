"""Which failures a stage is run again for: a lost process or machine, never bad input or a fault of ours.

Prefect runs the task again in the same flow run. A stage that is made of shards goes on with those it has; one that has
published its artifact is skipped. Flows have no such setting, because Prefect would run a whole flow again for a
misspelt path, too.
"""

from __future__ import annotations

from typing import Any, TypedDict

from ray.exceptions import RayError, RayTaskError
from ray.train import TrainingFailedError


class Retries(TypedDict):
    """Arguments of Prefect's `task`."""

    retries: int
    retry_delay_seconds: float
    retry_condition_fn: Any


def after_a_crash(task: object, run: object, state: Any) -> bool:
    """Whether the failed task's error is the loss of a worker, its machine, or what it held."""
    return is_crash(state.result(raise_on_failure=False))


def is_crash(error: object) -> bool:
    """A `RayTaskError` is an exception that our own code raised in a worker; every other one of Ray's is a loss."""
    if isinstance(error, TrainingFailedError):
        return any(is_crash(failure) for failure in getattr(error, "worker_failures", {}).values())
    return isinstance(error, RayError) and not isinstance(error, RayTaskError)


STAGE_RETRIES = Retries(retries=2, retry_delay_seconds=5, retry_condition_fn=after_a_crash)
