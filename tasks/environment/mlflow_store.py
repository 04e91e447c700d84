"""The store of MLflow's runs before it is used: a server, a database file, or something that is no store any more.

MLflow itself tries a database that is not there for an hour, changes an older one without asking, and makes its tables in
the database of another program.
"""

from __future__ import annotations

import difflib
import http.client
import os
import ssl
import urllib.error
import urllib.request
from typing import Any
from urllib.parse import urlsplit

from rag_core.errors import ConfigError
from rag_core.network.addresses import check_address, without_credentials
from rag_core.network.server_probe import GRACE, SECONDS, reason_of, what_answers, within
from tasks.environment.mlflow_database import check_database_file, deleted_experiment

SERVERS, DATABASES = ("http", "https"), ("postgresql", "mysql", "mssql")
EXAMPLES = "http://127.0.0.1:5000 or sqlite:///mlflow.db"
NAME_QUESTION = "/api/2.0/mlflow/experiments/get-by-name"
INSTEAD = "or unset MLFLOW_TRACKING_URI: runs are then kept in mlflow.db in the current folder"
CREDENTIALS = ("MLFLOW_TRACKING_TOKEN", "MLFLOW_TRACKING_USERNAME", "MLFLOW_TRACKING_PASSWORD")


def check_store(uri: str, experiment: str) -> None:
    """Whether runs of that experiment can be written to the store.

    Args:
        uri: as MLflow understands it.
        experiment: name of the experiment; it need not exist.

    Raises:
        ConfigError: they cannot; nothing in the store has been changed.
    """
    scheme = urlsplit(uri).scheme.lower() if "://" in uri or uri.startswith("file:") else ""
    kind = scheme.partition("+")[0]
    if kind in SERVERS:
        _check_server(uri, experiment)
    elif kind == "sqlite":
        check_database_file(uri, experiment)
    elif kind in DATABASES:
        _check_database_server(uri, kind)
    elif kind in ("", "file") and not uri.startswith("databricks"):
        _check_folder(uri)
    else:
        _check_other(uri, kind)


def check_server_is_there() -> None:
    """Whether anybody answers at MLFLOW_TRACKING_URI, in whatever way. For before other services are started: it takes no
    import of MLflow, which takes seconds.

    Raises:
        ConfigError: nobody does.
    """
    uri = os.environ.get("MLFLOW_TRACKING_URI", "").strip()
    if urlsplit(uri).scheme.lower() not in SERVERS:
        return
    check_address("MLFLOW_TRACKING_URI", uri, SERVERS, EXAMPLES)
    health = f"{without_credentials(uri).rstrip('/')}/health"
    try:
        # The address is the user's own, and begins with http.
        within(SECONDS + GRACE, lambda: urllib.request.urlopen(health, timeout=SECONDS).close())  # noqa: S310  # nosec B310
    except urllib.error.HTTPError:
        return
    except (OSError, ValueError, http.client.HTTPException) as error:
        if not isinstance(getattr(error, "reason", error), ssl.SSLError):  # what is trusted, MLflow's own settings say
            raise _not_there(_shown(uri), error) from error


def _check_server(uri: str, experiment: str) -> None:
    check_address("MLFLOW_TRACKING_URI", uri, SERVERS, EXAMPLES)
    from mlflow.exceptions import MlflowException
    from mlflow.utils.credentials import get_default_host_creds
    from mlflow.utils.rest_utils import http_request

    shown = _shown(uri)

    def ask() -> Any:
        limits = {"max_retries": 0, "timeout": SECONDS, "raise_on_status": False}
        names = {"experiment_name": experiment}
        return http_request(get_default_host_creds(uri), NAME_QUESTION, "GET", params=names, **limits)

    try:
        response = within(SECONDS + GRACE, ask)
    except (MlflowException, OSError, ValueError) as error:
        raise _not_there(shown, error) from error
    _check_answer(response, shown, uri, experiment)


def _shown(uri: str) -> str:
    return f"MLflow's server at {without_credentials(uri)} (MLFLOW_TRACKING_URI)"


def _not_there(shown: str, error: Exception) -> ConfigError:
    return ConfigError(
        f"{shown} does not answer ({reason_of(error)}). Nothing was begun. Start it, correct the address, {INSTEAD}."
    )


def _check_answer(response: Any, shown: str, uri: str, experiment: str) -> None:
    status, kind = response.status_code, response.headers.get("content-type", "")
    if status in (401, 403):
        given = [name for name in CREDENTIALS if os.environ.get(name)]
        had = f"refuses what {' and '.join(given)} say" if given else "asks who we are"
        raise ConfigError(
            f"{shown} {had} (answer {status}). Set MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD, or "
            f"MLFLOW_TRACKING_TOKEN, to what it knows, {INSTEAD}."
        )
    if status >= 500 or status == 429:
        raise ConfigError(
            f"{shown} {what_answers(status, kind)}: it is not well, or something before it is. Nothing was begun. Look at its "
            f"log, {INSTEAD}."
        )
    try:
        content = response.json()
    except ValueError:
        content = None
    known = isinstance(content, dict) and ("experiment" in content or "error_code" in content)
    if not known or not (status == 200 or content["error_code"] == "RESOURCE_DOES_NOT_EXIST"):
        said = f" ({content['error_code']})" if known and "error_code" in content else ""
        raise ConfigError(
            f"{shown} {what_answers(status, kind)}{said}, so there is no MLflow of ours at that address. Correct it (the page "
            f"that a browser shows, without what follows #), {INSTEAD}."
        )
    if status == 200 and content["experiment"].get("lifecycle_stage") == "deleted":
        raise deleted_experiment(experiment, content["experiment"]["experiment_id"], uri)


def _check_folder(uri: str) -> None:
    from mlflow.environment_variables import MLFLOW_ALLOW_FILE_STORE

    if MLFLOW_ALLOW_FILE_STORE.get():
        return
    folder = without_credentials(uri).removeprefix("file://").removeprefix("file:")
    if os.environ.get("MLFLOW_TRACKING_URI"):
        found = f"MLFLOW_TRACKING_URI is {without_credentials(uri)!r}, a folder"
    else:
        found = f"{folder} holds MLflow runs of an older release"
    raise ConfigError(
        f"{found}, and MLflow keeps runs in folders no more. To take the runs along: mlflow migrate-filestore --source "
        f"{folder} --target sqlite:///mlflow.db; to leave them there, or after that: set "
        "MLFLOW_TRACKING_URI=sqlite:///mlflow.db (MLFLOW_ALLOW_FILE_STORE=true uses the folder all the same)."
    )


def _check_database_server(uri: str, kind: str) -> None:
    """One attempt, where MLflow's own go on for an hour."""
    import sqlalchemy

    shown = f"MLflow's database at {without_credentials(uri)} (MLFLOW_TRACKING_URI)"
    limit = {"mssql": "timeout"}.get(kind, "connect_timeout")
    try:
        url = sqlalchemy.make_url(uri)
        engine = sqlalchemy.create_engine(url, connect_args={limit: int(SECONDS)}, poolclass=sqlalchemy.NullPool)
        within(SECONDS + GRACE, lambda: engine.connect().close())
    except ImportError as error:
        raise ConfigError(
            f"{shown} needs the Python package {error.name or 'of its driver'}, which is not installed. Install it, {INSTEAD}."
        ) from error
    except (sqlalchemy.exc.SQLAlchemyError, OSError, ValueError) as error:
        reason = "no such address" if isinstance(error, sqlalchemy.exc.ArgumentError) else type(error).__name__
        raise ConfigError(
            f"{shown} does not let us in ({reason}). Nothing was begun. Start it, correct address, user and password, "
            f"{INSTEAD}."
        ) from error


def _check_other(uri: str, kind: str) -> None:
    """Databricks, and what plugins of MLflow's know."""
    from mlflow.exceptions import MlflowException
    from mlflow.tracking import MlflowClient
    from mlflow.tracking._tracking_service.utils import _tracking_store_registry

    known = sorted({*SERVERS, *DATABASES, "sqlite", *_tracking_store_registry._registry} - {"", "file"})
    shown = without_credentials(uri)
    if (kind or uri.partition(":")[0]) not in known:
        near = difflib.get_close_matches(kind, known, 1)
        meant = f" (is {near[0]}:// meant?)" if near else ""
        raise ConfigError(
            f"MLFLOW_TRACKING_URI is {shown!r}: MLflow does not know {kind}://{meant}. Give the address of a server "
            f"(http://…) or of a database (sqlite:///mlflow.db), {INSTEAD}."
        )
    try:
        within(SECONDS + GRACE, lambda: MlflowClient(uri).search_experiments(max_results=1))
    except Exception as error:  # a plugin's own, or Databricks'
        said = str(error).partition(". ")[0].strip() if isinstance(error, MlflowException) else reason_of(error)
        raise ConfigError(
            f"MLflow cannot use {shown} (MLFLOW_TRACKING_URI): {said}. Give it what it needs to log in (for "
            f"Databricks DATABRICKS_HOST and DATABRICKS_TOKEN), {INSTEAD}."
        ) from error
