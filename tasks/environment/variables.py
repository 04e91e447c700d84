"""Variables that hold a number, a folder, a name or a secret. An empty one counts as one that is not set."""

from __future__ import annotations

import math
import os
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path

from rag_core.errors import ConfigError
from rag_core.network.addresses import check_address
from rag_core.storage.writer_lock import wait_setting

# As MLflow has it.
LONGEST_EXPERIMENT_NAME = 500
_TRUTHS = {"1", "ON", "YES", "TRUE", "0", "OFF", "NO", "FALSE"}

Check = Callable[[str, str], None]


def seconds(name: str, text: str) -> None:
    """A number of seconds from 0 to inf."""
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    if not number >= 0:
        raise ConfigError(f"{name} is {text!r}; a number of seconds was expected, such as 300. Correct or unset it.")


def whole_seconds(name: str, text: str) -> None:
    """A whole number of seconds, 1 or more."""
    if not (text.isascii() and text.isdigit() and int(text) > 0):
        raise ConfigError(
            f"{name} is {text!r}; a whole number of seconds from 1 was expected, such as 10. Correct or unset it."
        )


def writable_folder(name: str, text: str) -> None:
    """A folder that may be written, or made: nothing is left there by looking."""
    there = Path(text).expanduser().absolute()
    while not os.path.lexists(there):
        there = there.parent
    problem = ""
    if not there.is_dir():
        problem = f"{there} is no folder"
    else:
        try:
            with tempfile.TemporaryFile(dir=there):
                pass
        except OSError as error:
            problem = f"nothing can be written in {there} ({(error.strerror or str(error)).lower()})"
    if problem:
        raise ConfigError(f"{name} is {text!r}, but {problem}. Set it to a folder that you may write in, or unset it.")


def folder(name: str, text: str) -> None:
    """A folder that is there, or can be made."""
    if not Path(text).expanduser().is_dir():
        writable_folder(name, text)


def truth(name: str, text: str) -> None:
    """Yes or no, in one of the words that the hub's library takes for yes, or their opposites."""
    if text.strip().upper() not in _TRUTHS:
        raise ConfigError(f"{name} is {text!r}; 1 or 0 was expected. Correct or unset it.")


def http_address(name: str, text: str) -> None:
    """The address of a server that speaks HTTP."""
    check_address(name, text, ("http", "https"), "https://huggingface.co")


def experiment_name(name: str, text: str) -> None:
    """A name that MLflow takes."""
    problem = f"{len(text)} characters, MLflow takes {LONGEST_EXPERIMENT_NAME}" * (len(text) > LONGEST_EXPERIMENT_NAME)
    problem = problem or "control characters in it" * (not text.isprintable())
    if problem:
        raise ConfigError(f"{name} is {text[:60]!r}, a name with {problem}. Choose another name, or unset it.")


def secret(name: str, text: str) -> None:
    """What can travel in a header of HTTP. The value is not shown."""
    if not (text.strip("\r\n").isprintable() and text.isascii()):
        raise ConfigError(
            f"{name} holds a line break or a character that is not ASCII, which no such secret does. Copy it again, or "
            "unset it."
        )


def waiting(name: str, text: str) -> None:
    """The setting of the writer lock, which has words of its own."""
    wait_setting()


# The hub's library reads its own when it is imported; a number of seconds that is none would be a traceback there.
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
# Others that are read by the tools themselves, some of which take an empty one for a value.
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
    """Look at those that are set.

    Raises:
        ConfigError: a value is wrong; the message names the variable.
    """
    forget_empty_ones()
    for name, check in checks.items():
        if text := os.environ.get(name):
            check(name, text)


def forget_empty_ones() -> None:
    """Unset what is set to nothing: MLflow and boto would take it for a value."""
    for name in (*FOR_EVERY_COMMAND, *FOR_STAGES, *OTHERS):
        if name in os.environ and not os.environ[name].strip():
            del os.environ[name]
