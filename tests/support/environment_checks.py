"""Shared by the tests of `tasks/environment/`: wrong values of every variable, and a check of error messages."""

from __future__ import annotations

import sqlite3
from collections.abc import Callable
from pathlib import Path

import pytest

from rag_core.errors import ConfigError
from rag_core.storage.store_settings import check_store_settings
from tasks.environment.prefect_api import check_prefect
from tasks.environment.ray_cluster import check_ray
from tasks.environment.variables import FOR_EVERY_COMMAND, FOR_STAGES, check_variables

SECRET = "canary-77b3"


def check_tracking() -> None:
    from tasks.tracking.runs import check_tracking

    check_tracking()


def check_all_variables() -> None:
    check_variables({**FOR_EVERY_COMMAND, **FOR_STAGES})


# For every variable in docs/configuration.md: the check that must refuse it, and five wrong values.
URLS = ("banana", "htp://127.0.0.1/x", "http://127.0.0.1:99999", f"http://u:{SECRET}/x@127.0.0.1", "http://a b/api")
SECONDS_WRONG = ("ten", "-1", "nan", "1,5", "1 s")
FOLDERS_WRONG = ("/proc/nothing", "/dev/null", "/dev/null/below", "/proc/self/mem", "/sys/nothing/below")
SECRETS_WRONG = ("a\nb", "ключ", "a\x01b", "“a”", "a\tb")
WRONG: dict[str, tuple[Callable[[], None], tuple[str, ...]]] = {
    "MLFLOW_TRACKING_URI": (check_tracking, ("mlruns", "file:///tmp/mlruns", "s3://bucket/x", *URLS[1:3])),
    "MLFLOW_EXPERIMENT_NAME": (check_all_variables, ("x" * 501, "a\tb", "a\nb", "\x1b[1m", "é" * 600)),
    "MLFLOW_HTTP_REQUEST_TIMEOUT": (check_all_variables, ("ten", "-1", "0", "1.5", "inf")),
    "RAG_MLFLOW_UNSENT": (check_all_variables, FOLDERS_WRONG),
    "PREFECT_API_URL": (check_prefect, URLS),
    "RAY_ADDRESS": (check_ray, ("banana", "127.0.0.1", "http://127.0.0.1:6379", "ray://h:10001", "127.0.0.1:99999")),
    "RAY_TMPDIR": (check_ray, ("/tmp/" + "long" * 12, "/tmp/" + "é" * 20, *FOLDERS_WRONG[:3])),
    "RAY_AUTH_TOKEN_PATH": (check_ray, ("/nothing", "/tmp", "/dev/null/x", "relative/nothing", "~/token")),
    "RAY_AUTH_TOKEN": (check_all_variables, SECRETS_WRONG),
    "MLFLOW_TRACKING_TOKEN": (check_all_variables, SECRETS_WRONG),
    "PREFECT_API_KEY": (check_all_variables, SECRETS_WRONG),
    "RAG_CLUSTER_WAIT_SECONDS": (check_all_variables, SECONDS_WRONG),
    "RAG_WAIT_SECONDS": (check_all_variables, SECONDS_WRONG),
    "RAG_CACHE": (check_all_variables, FOLDERS_WRONG),
    "AWS_ENDPOINT_URL": (check_store_settings, URLS),
    "AWS_PROFILE": (check_store_settings, ("nobody", "Default", "a b", "[x]", "profile nobody")),
    "HF_ENDPOINT": (check_all_variables, URLS),
    "HF_HOME": (check_all_variables, FOLDERS_WRONG),
    "HF_HUB_OFFLINE": (check_all_variables, ("maybe", "2", "-1", "offline", "ja")),
    "HF_HUB_ETAG_TIMEOUT": (check_all_variables, ("ten", "-1", "0", "1.5", "inf")),
    "HF_TOKEN": (check_all_variables, ("a\nb", "ключ", "“hf_x”", "hf_\x07", "hf_x\r\ny")),
}
# Variables that take any text: only the server can say whether it is right.
BY_THE_SERVER = {"MLFLOW_TRACKING_USERNAME", "MLFLOW_TRACKING_PASSWORD", "PREFECT_API_AUTH_STRING"}


def message_of(check: Callable[[], None], *words: str) -> str:
    """The message of the ConfigError that `check` raises: one paragraph with all `words` and no secret."""
    with pytest.raises(ConfigError) as raised:
        check()
    message = str(raised.value)
    assert "\n" not in message, message
    assert SECRET not in message, message
    for word in words:
        assert word in message, f"{word!r} is not in: {message}"
    return message


def quickly(monkeypatch: pytest.MonkeyPatch, *modules: str) -> None:
    """Give servers half a second to answer."""
    for module in modules:
        monkeypatch.setattr(f"{module}.SECONDS", 0.5)


def of_release(file: Path, revision: str) -> None:
    """Make the database claim to be of the MLflow release with that last migration."""
    with sqlite3.connect(file) as connection:
        connection.execute("UPDATE alembic_version SET version_num = ?", (revision,))
