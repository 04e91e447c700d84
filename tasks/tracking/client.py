"""MLflow's client, with limits: how long a server may take to answer, and what counts as unreachable."""

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

# Seconds that a server may take to answer: a training step does not wait longer for its metrics than PROMPT_SECONDS,
# anything else no longer than PATIENT_SECONDS, or what the user has set as MLFLOW_HTTP_REQUEST_TIMEOUT.
PROMPT_SECONDS, PATIENT_SECONDS = 1, 10
# What is wrong with the caller or the moment, not with the entry.
NOT_THE_ENTRY = (401, 403, 408, 429)

_patience = threading.RLock()


@functools.lru_cache(maxsize=8)
def client_of(uri: str) -> MlflowClient:
    """One client for each address: a new one would read the store's settings again."""
    # The address that MLflow prints when a run ends has the password in it.
    MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT.set(True)
    return MlflowClient(uri)


@contextlib.contextmanager
def reaching(uri: str, seconds: int | None = None, retries: int = 0) -> Iterator[MlflowClient]:
    """A client whose calls end after about `seconds` (default: the patient ones), where MLflow's own try for minutes.

    Raises:
        UnreachableError: instead of whatever an unreachable, overloaded or denying server makes MLflow raise.
    """
    try:
        with contextlib.ExitStack() as settings:
            settings.enter_context(_patience)
            if seconds is None:
                seconds = int(os.environ.get(MLFLOW_HTTP_REQUEST_TIMEOUT.name) or PATIENT_SECONDS)
            settings.enter_context(_setting(MLFLOW_HTTP_REQUEST_TIMEOUT.name, seconds))
            settings.enter_context(_setting(MLFLOW_HTTP_REQUEST_MAX_RETRIES.name, retries))
            yield client_of(uri)
    except MlflowException as error:
        status = error.get_http_status_code()
        if 400 <= status < 500 and status not in NOT_THE_ENTRY:
            raise
        raise _unreachable(uri, error) from error
    except OSError as error:  # among them everything that `requests` raises
        raise _unreachable(uri, error) from error


@contextlib.contextmanager
def _setting(name: str, value: int) -> Iterator[None]:
    # MLflow reads them from the environment at each call. They are for our own calls only.
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
    """What the network said; MLflow and urllib3 wrap it in sentences that name the address, password included."""
    if found := re.search(r"\[Errno -?\d+\] [\w ]+", text):
        return found.group().rpartition("] ")[2].lower()
    if found := re.search(r"timed out|too many \d+ error responses|database is locked", text):
        return found.group()
    found = re.search(r"error code '?(\d{3}|[A-Z_]+)", text)
    return found.group() if found else "no connection"
