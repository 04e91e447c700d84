"""When Prefect retries a stage: after a lost process or machine, never after bad input or a bug of ours.

Prefect runs the task again in the same flow run. A stage made of shards keeps its finished shards; a stage that has
published its artifact is skipped. Flows have no retries, because Prefect would also repeat a whole flow for a misspelt
path.
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
    """Whether the task failed because a worker, its machine or its objects were lost. Prefect calls this."""
    return is_crash(state.result(raise_on_failure=False))


def is_crash(error: object) -> bool:
    """Whether Ray lost something. A `RayTaskError` carries an exception of our own code; other Ray errors are losses.

    Ray Train's error counts if any worker's failure does.
    """
    if isinstance(error, TrainingFailedError):
        return any(is_crash(failure) for failure in getattr(error, "worker_failures", {}).values())
    return isinstance(error, RayError) and not isinstance(error, RayTaskError)


STAGE_RETRIES = Retries(retries=2, retry_delay_seconds=5, retry_condition_fn=after_a_crash)
