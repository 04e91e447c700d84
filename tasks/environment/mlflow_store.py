"""Check MLflow's tracking store before it is used: a server, a database, or a folder of an older release.

Without this check MLflow retries an unreachable database for an hour, migrates an older one without asking, and creates
its tables in another program's database.
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
from rag_core.network.server_probe import GRACE, SECONDS, describe_response, reason_of, within
from tasks.environment.mlflow_database import check_database_file, deleted_experiment
from tasks.environment.mlflow_internals import store_schemes

SERVERS, DATABASES = ("http", "https"), ("postgresql", "mysql", "mssql")
EXAMPLES = "http://127.0.0.1:5000 or sqlite:///mlflow.db"
EXPERIMENT_BY_NAME = "/api/2.0/mlflow/experiments/get-by-name"
INSTEAD = "or unset MLFLOW_TRACKING_URI: runs are then kept in mlflow.db in the current folder"
CREDENTIALS = ("MLFLOW_TRACKING_TOKEN", "MLFLOW_TRACKING_USERNAME", "MLFLOW_TRACKING_PASSWORD")


def check_store(uri: str, experiment: str) -> None:
    """Check that runs of the experiment can be written to the store. The check never changes the store.

    Args:
        uri: the tracking URI, as MLflow understands it.
        experiment: name of the experiment; it need not exist.

    Raises:
        ConfigError: no run can be written there.
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
    """Check that some server answers at MLFLOW_TRACKING_URI, whatever its answer.

    This runs before other services are started. It does not import MLflow, which would take seconds.

    Raises:
        ConfigError: no server answers.
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
        if not isinstance(getattr(error, "reason", error), ssl.SSLError):  # MLflow has own settings for certificates
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
        return http_request(get_default_host_creds(uri), EXPERIMENT_BY_NAME, "GET", params=names, **limits)

    try:
        response = within(SECONDS + GRACE, ask)
    except (MlflowException, OSError, ValueError) as error:
        raise _not_there(shown, error) from error
    _check_answer(response, shown, uri, experiment)


def _shown(uri: str) -> str:
    return f"MLflow's server at {without_credentials(uri)} (MLFLOW_TRACKING_URI)"


def _not_there(shown: str, error: Exception) -> ConfigError:
    return ConfigError(
        f"{shown} does not answer ({reason_of(error)}). No work was started. Start it, correct the address, {INSTEAD}."
    )


def _check_answer(response: Any, shown: str, uri: str, experiment: str) -> None:
    status, kind = response.status_code, response.headers.get("content-type", "")
    if status in (401, 403):
        variables = [name for name in CREDENTIALS if os.environ.get(name)]
        problem = f"rejects the value of {' and '.join(variables)}" if variables else "asks for credentials"
        raise ConfigError(
            f"{shown} {problem} (answer {status}). Set MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD, or "
            f"MLFLOW_TRACKING_TOKEN, to credentials that it accepts, {INSTEAD}."
        )
    if status >= 500 or status == 429:
        raise ConfigError(
            f"{shown} {describe_response(status, kind)}: the server, or a proxy in front of it, has a problem. No work "
            f"was started. Look at its log, {INSTEAD}."
        )
    try:
        content = response.json()
    except ValueError:
        content = None
    known = isinstance(content, dict) and ("experiment" in content or "error_code" in content)
    if not known or not (status == 200 or content["error_code"] == "RESOURCE_DOES_NOT_EXIST"):
        code = f" ({content['error_code']})" if known and "error_code" in content else ""
        raise ConfigError(
            f"{shown} {describe_response(status, kind)}{code}, so it is not an MLflow server that we can use. Correct "
            f"the address (copy it from a browser that shows MLflow's page, up to the #), {INSTEAD}."
        )
    if status == 200 and content["experiment"].get("lifecycle_stage") == "deleted":
        raise deleted_experiment(experiment, content["experiment"]["experiment_id"], uri)


def _check_folder(uri: str) -> None:
    from mlflow.environment_variables import MLFLOW_ALLOW_FILE_STORE

    if MLFLOW_ALLOW_FILE_STORE.get():
        return
    folder = without_credentials(uri).removeprefix("file://").removeprefix("file:")
    if os.environ.get("MLFLOW_TRACKING_URI"):
        problem = f"MLFLOW_TRACKING_URI is {without_credentials(uri)!r}, a folder"
    else:
        problem = f"{folder} holds MLflow runs of an older release"
    raise ConfigError(
        f"{problem}, and MLflow no longer keeps runs in folders. To take the runs along, first run: mlflow "
        f"migrate-filestore --source {folder} --target sqlite:///mlflow.db. In any case set "
        "MLFLOW_TRACKING_URI=sqlite:///mlflow.db, or MLFLOW_ALLOW_FILE_STORE=true to use the folder all the same."
    )


def _check_database_server(uri: str, kind: str) -> None:
    """Connect once. MLflow itself would retry for an hour."""
    import sqlalchemy

    shown = f"MLflow's database at {without_credentials(uri)} (MLFLOW_TRACKING_URI)"
    limit = {"mssql": "timeout"}.get(kind, "connect_timeout")
    try:
        url = sqlalchemy.make_url(uri)
        engine = sqlalchemy.create_engine(url, connect_args={limit: int(SECONDS)}, poolclass=sqlalchemy.NullPool)
        within(SECONDS + GRACE, lambda: engine.connect().close())
    except ImportError as error:
        raise ConfigError(
            f"{shown} needs the Python package {error.name or 'of its driver'}, which is not installed. Install it, "
            f"{INSTEAD}."
        ) from error
    except (sqlalchemy.exc.SQLAlchemyError, OSError, ValueError) as error:
        reason = "no such address" if isinstance(error, sqlalchemy.exc.ArgumentError) else type(error).__name__
        raise ConfigError(
            f"Connecting to {shown} failed ({reason}). No work was started. Start it, correct address, user and "
            f"password, {INSTEAD}."
        ) from error


def _check_other(uri: str, kind: str) -> None:
    """Check Databricks, or a store that an MLflow plugin provides."""
    from mlflow.exceptions import MlflowException
    from mlflow.tracking import MlflowClient

    known = sorted({*SERVERS, *DATABASES, "sqlite", *store_schemes()} - {"", "file"})
    shown = without_credentials(uri)
    if (kind or uri.partition(":")[0]) not in known:
        matches = difflib.get_close_matches(kind, known, 1)
        suggestion = f" (is {matches[0]}:// meant?)" if matches else ""
        raise ConfigError(
            f"MLFLOW_TRACKING_URI is {shown!r}: MLflow does not know {kind}://{suggestion}. Set it to the address of a "
            f"server (http://…) or of a database (sqlite:///mlflow.db), {INSTEAD}."
        )
    try:
        within(SECONDS + GRACE, lambda: MlflowClient(uri).search_experiments(max_results=1))
    except Exception as error:  # a plugin's own, or Databricks'
        reason = str(error).partition(". ")[0].strip() if isinstance(error, MlflowException) else reason_of(error)
        raise ConfigError(
            f"MLflow cannot use {shown} (MLFLOW_TRACKING_URI): {reason}. Set its credentials (for Databricks "
            f"DATABRICKS_HOST and DATABRICKS_TOKEN), {INSTEAD}."
        ) from error
