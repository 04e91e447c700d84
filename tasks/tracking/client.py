"""MLflow's client with time limits, and one error for all ways in which a server can be unreachable."""

from __future__ import annotations

import contextlib
import functools
import os
import re
import threading
from collections.abc import Iterator

from mlflow import MlflowClient
from mlflow.environment_variables import (
    MLFLOW_HTTP_REQUEST_MAX_RETRIES,
    MLFLOW_HTTP_REQUEST_TIMEOUT,
    MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT,
)
from mlflow.exceptions import MlflowException

from rag_core.network.addresses import without_credentials
from tasks.tracking.journal import UnreachableError

# Seconds that a server may take to answer. A training step waits at most PROMPT_SECONDS for its metrics; everything
# else waits at most PATIENT_SECONDS, or as long as the user's MLFLOW_HTTP_REQUEST_TIMEOUT.
PROMPT_SECONDS, PATIENT_SECONDS = 1, 10
# HTTP statuses caused by credentials or load: keep the entry and retry.
RETRYABLE_STATUSES = (401, 403, 408, 429)

# Held while the environment has our time limits: MLflow reads them there, and all threads share it.
_limits_lock = threading.RLock()


@functools.lru_cache(maxsize=8)
def client_of(uri: str) -> MlflowClient:
    """The client for an address, cached: a new client would read the store's settings again."""
    # MLflow prints the address when a run ends, password included.
    MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT.set(True)
    return MlflowClient(uri)


@contextlib.contextmanager
def reaching(uri: str, seconds: int | None = None, retries: int = 0) -> Iterator[MlflowClient]:
    """A client whose calls end after about `seconds` (default: PATIENT_SECONDS); MLflow's own calls retry for minutes.

    Raises:
        UnreachableError: the server is unreachable, overloaded or denies access, whatever MLflow itself raises then.
    """
    try:
        with contextlib.ExitStack() as settings:
            settings.enter_context(_limits_lock)
            if seconds is None:
                seconds = int(os.environ.get(MLFLOW_HTTP_REQUEST_TIMEOUT.name) or PATIENT_SECONDS)
            settings.enter_context(_setting(MLFLOW_HTTP_REQUEST_TIMEOUT.name, seconds))
            settings.enter_context(_setting(MLFLOW_HTTP_REQUEST_MAX_RETRIES.name, retries))
            yield client_of(uri)
    except MlflowException as error:
        status = error.get_http_status_code()
        if 400 <= status < 500 and status not in RETRYABLE_STATUSES:
            raise
        raise _unreachable(uri, error) from error
    except OSError as error:  # includes everything that `requests` raises
        raise _unreachable(uri, error) from error


@contextlib.contextmanager
def _setting(name: str, value: int) -> Iterator[None]:
    # MLflow reads its settings from the environment at each call. Ours must apply to our own calls only.
    before = os.environ.get(name)
    os.environ[name] = str(value)
    try:
        yield
    finally:
        if before is None:
            os.environ.pop(name, None)
        else:
            os.environ[name] = before


def _unreachable(uri: str, error: Exception) -> UnreachableError:
    return UnreachableError(f"MLflow at {without_credentials(uri)} does not answer ({_short(str(error))}).")


def _short(text: str) -> str:
    """The network error inside a message: MLflow and urllib3 wrap it in text with the address and the password."""
    if match := re.search(r"\[Errno -?\d+\] [\w ]+", text):
        return match.group().rpartition("] ")[2].lower()
    if match := re.search(r"timed out|too many \d+ error responses|database is locked", text):
        return match.group()
    match = re.search(r"error code '?(\d{3}|[A-Z_]+)", text)
    return match.group() if match else "no connection"
