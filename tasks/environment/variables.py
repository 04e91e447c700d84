"""Check environment variables that hold a number, a folder, a name or a secret. An empty one counts as unset."""

from __future__ import annotations

import math
import os
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path

from rag_core.errors import ConfigError
from rag_core.network.addresses import check_address
from rag_core.storage.writer_lock import wait_setting

# MLflow's own limit, in characters.
LONGEST_EXPERIMENT_NAME = 500
_TRUTHS = {"1", "ON", "YES", "TRUE", "0", "OFF", "NO", "FALSE"}

Check = Callable[[str, str], None]


def seconds(name: str, text: str) -> None:
    """Check for a number of seconds, 0 to inf."""
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    if not number >= 0:
        raise ConfigError(f"{name} is {text!r}; a number of seconds was expected, such as 300. Correct or unset it.")


def whole_seconds(name: str, text: str) -> None:
    """Check for a whole number of seconds, 1 or more."""
    if not (text.isascii() and text.isdigit() and int(text) > 0):
        raise ConfigError(
            f"{name} is {text!r}; a whole number of seconds from 1 was expected, such as 10. Correct or unset it."
        )


def writable_folder(name: str, text: str) -> None:
    """Check for a folder that can be written to, or created. The check leaves nothing behind."""
    existing = Path(text).expanduser().absolute()
    while not os.path.lexists(existing):
        existing = existing.parent
    problem = ""
    if not existing.is_dir():
        problem = f"{existing} is not a folder"
    else:
        try:
            with tempfile.TemporaryFile(dir=existing):
                pass
        except OSError as error:
            problem = f"nothing can be written in {existing} ({(error.strerror or str(error)).lower()})"
    if problem:
        raise ConfigError(f"{name} is {text!r}, but {problem}. Set it to a folder that you may write to, or unset it.")


def folder(name: str, text: str) -> None:
    """Check for a folder that exists or can be created."""
    if not Path(text).expanduser().is_dir():
        writable_folder(name, text)


def truth(name: str, text: str) -> None:
    """Check for yes or no: the hub's library's words for yes, or their opposites."""
    if text.strip().upper() not in _TRUTHS:
        raise ConfigError(f"{name} is {text!r}; 1 or 0 was expected. Correct or unset it.")


def http_address(name: str, text: str) -> None:
    """Check for the address of an HTTP server."""
    check_address(name, text, ("http", "https"), "https://huggingface.co")


def experiment_name(name: str, text: str) -> None:
    """Check for an experiment name that MLflow accepts."""
    problem = f"{len(text)} characters, MLflow allows {LONGEST_EXPERIMENT_NAME}" * (len(text) > LONGEST_EXPERIMENT_NAME)
    problem = problem or "control characters in it" * (not text.isprintable())
    if problem:
        raise ConfigError(f"{name} is {text[:60]!r}, a name with {problem}. Choose another name, or unset it.")


def secret(name: str, text: str) -> None:
    """Check for text that fits into an HTTP header. Messages never show the value."""
    if not (text.strip("\r\n").isprintable() and text.isascii()):
        raise ConfigError(
            f"{name} holds a line break, a control character or a non-ASCII character, which no such secret does. "
            "Copy it again, or unset it."
        )


def waiting(name: str, text: str) -> None:
    """Check RAG_WAIT_SECONDS with the writer lock's own check and message."""
    wait_setting()


# The hub's library reads its variables when it is imported; there a wrong number of seconds would end in a traceback.
FOR_EVERY_COMMAND: dict[str, Check] = {
    "RAG_WAIT_SECONDS": waiting,
    "RAG_CACHE": writable_folder,
    "HF_TOKEN": secret,
    "HF_ENDPOINT": http_address,
    "HF_HOME": folder,
    "HF_HUB_OFFLINE": truth,
    "HF_HUB_ETAG_TIMEOUT": whole_seconds,
}
FOR_STAGES: dict[str, Check] = {
    "RAG_CLUSTER_WAIT_SECONDS": seconds,
    "RAG_MLFLOW_UNSENT": writable_folder,
    "MLFLOW_HTTP_REQUEST_TIMEOUT": whole_seconds,
    "MLFLOW_EXPERIMENT_NAME": experiment_name,
    "MLFLOW_TRACKING_TOKEN": secret,
    "PREFECT_API_KEY": secret,
    "RAY_AUTH_TOKEN": secret,
}
# Variables that only the tools read. Some tools take an empty one for a value.
OTHERS = (
    "AWS_ENDPOINT_URL",
    "AWS_PROFILE",
    "MLFLOW_TRACKING_URI",
    "MLFLOW_TRACKING_USERNAME",
    "MLFLOW_TRACKING_PASSWORD",
    "PREFECT_API_AUTH_STRING",
    "PREFECT_API_URL",
    "RAY_ADDRESS",
    "RAY_AUTH_TOKEN_PATH",
    "RAY_TMPDIR",
)


def check_variables(checks: Mapping[str, Check]) -> None:
    """Check the variables that are set.

    Raises:
        ConfigError: a value is wrong; the message names the variable.
    """
    forget_empty_ones()
    for name, check in checks.items():
        if text := os.environ.get(name):
            check(name, text)


def forget_empty_ones() -> None:
    """Unset empty variables: MLflow and boto would take them for values."""
    for name in (*FOR_EVERY_COMMAND, *FOR_STAGES, *OTHERS):
        if name in os.environ and not os.environ[name].strip():
            del os.environ[name]
