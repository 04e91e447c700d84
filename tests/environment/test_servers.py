"""Prefect, MLflow and object stores that are missing, silent, ask for a password, or are another program."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from rag_core.errors import ConfigError
from rag_core.network.addresses import without_credentials
from rag_core.storage.store_settings import check_store_settings
from tasks.environment.mlflow_store import check_server_is_there, check_store
from tasks.environment.prefect_api import check_prefect
from tests.support.environment_checks import SECRET, check_tracking, message_of, quickly
from tests.support.servers.odd_servers import HTML, JSON, absent, answering, silent

pytest_plugins = ["tests.support.environment_fixtures"]
pytestmark = pytest.mark.usefixtures("nothing_set")

ROOT = Path(__file__).resolve().parents[2]


PREFECT_WRONG = {
    "asks for a password": (401, '{"detail":"Unauthorized"}', JSON, "/api", ["password", "PREFECT_API_AUTH_STRING"]),
    "refuses us": (403, "{}", JSON, "/api", ["403", "PREFECT_API_AUTH_STRING"]),
    "is no Prefect": (404, "{}", JSON, "/api", ["404", "not Prefect's API"]),
    "is unwell": (500, "oh", JSON, "/api", ["500", "its log"]),
    "a gateway's page": (502, "<html>", HTML, "/api", ["502", "HTML"]),
    "a page": (200, "<html>", HTML, "/api", ["not as Prefect does"]),
    "the address of the pages": (200, "<html>", HTML, "", ["ends in /api", "/api, or unset"]),
    "another thing's JSON": (200, '{"version": 1}', JSON, "/api", ["not as Prefect does"]),
    "an older Prefect": (200, '"2.20.4"', JSON, "/api", ["2.20.4", "major versions must be equal"]),
}


@pytest.mark.parametrize("case", PREFECT_WRONG)
def test_a_server_that_is_not_a_usable_prefect_is_named(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    status, body, kind, path, words = PREFECT_WRONG[case]
    with answering(status, body, kind) as address:
        monkeypatch.setenv("PREFECT_API_URL", address.replace("//", f"//u:{SECRET}@") + path)
        message_of(check_prefect, address, "unset PREFECT_API_URL", *words)


def test_a_wrong_password_for_prefect_is_distinguished_from_a_missing_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PREFECT_API_AUTH_STRING", f"me:{SECRET}")
    with answering(401, '{"detail":"Unauthorized"}') as address:
        monkeypatch.setenv("PREFECT_API_URL", f"{address}/api")
        message_of(check_prefect, "rejects the value of PREFECT_API_AUTH_STRING")


def test_a_prefect_that_does_not_answer_is_named_with_the_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    quickly(monkeypatch, "tasks.environment.prefect_api")
    with silent() as hole, answering(200, '"3.8.8"') as address:
        for url, reason in {
            f"http://{absent()}/api": "connection refused",
            f"http://{hole}/api": "no answer in time",
            "http://no-such-machine.invalid/api": "no machine of that name",
            f"https{address.removeprefix('http')}/api": "does not speak TLS",
        }.items():
            monkeypatch.setenv("PREFECT_API_URL", url)
            message_of(check_prefect, url, reason, "make prefect")


def test_a_setting_that_prefect_cannot_read_is_named() -> None:
    code = "from tasks.environment.prefect_api import check_prefect; check_prefect()"
    environment = os.environ | {"PREFECT_LOGGING_LEVEL": "LOUD", "PREFECT_API_REQUEST_TIMEOUT": "soon"}
    result = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=60)
    assert "ConfigError: Prefect cannot read its setting PREFECT_" in result.stderr, result.stderr


EXPERIMENT = {"experiment": {"experiment_id": "7", "name": "rag", "lifecycle_stage": "active"}}
DELETED = {"experiment": {"experiment_id": "7", "name": "rag", "lifecycle_stage": "deleted"}}
MLFLOW_WRONG = {
    "asks who we are": (401, "You are not authenticated", HTML, ["asks for credentials", "MLFLOW_TRACKING_USERNAME"]),
    "refuses us": (403, "{}", JSON, ["403", "MLFLOW_TRACKING_TOKEN"]),
    "is no MLflow": (404, "not found", HTML, ["404", "not an MLflow server that we can use"]),
    "is a Prefect": (404, '{"detail":"Not Found"}', JSON, ["404", "not an MLflow server that we can use"]),
    "is unwell": (500, "{}", JSON, ["500", "its log"]),
    "a gateway's page": (503, "<html>", HTML, ["503", "HTML"]),
    "too much asked": (429, "", JSON, ["429"]),
    "a page": (200, "<html>", HTML, ["HTML page", "not an MLflow server that we can use"]),
    "a deleted experiment": (200, json.dumps(DELETED), JSON, ["restore --experiment-id 7", "MLFLOW_EXPERIMENT_NAME"]),
}


@pytest.mark.parametrize("case", MLFLOW_WRONG)
def test_a_server_that_is_not_a_usable_mlflow_is_named(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    status, body, kind, words = MLFLOW_WRONG[case]
    with answering(status, body, kind) as address:
        monkeypatch.setenv("MLFLOW_TRACKING_URI", address.replace("//", f"//u:{SECRET}@"))
        message_of(check_tracking, address, *words)


def test_a_wrong_password_for_mlflow_is_distinguished_from_a_missing_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_USERNAME", "me")
    monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", SECRET)
    with answering(401) as address:
        monkeypatch.setenv("MLFLOW_TRACKING_URI", address)
        message_of(check_tracking, "rejects the value of MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD")


def test_an_mlflow_that_does_not_answer_is_named_with_the_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    quickly(monkeypatch, "tasks.environment.mlflow_store")
    unknown = json.dumps({"error_code": "RESOURCE_DOES_NOT_EXIST"})
    with silent() as hole, answering(404, unknown) as new, answering(200, json.dumps(EXPERIMENT)) as known:
        check_store(new, "rag")
        check_store(known, "rag")
        for uri, reason in {
            f"http://{absent()}": "connection refused",
            f"http://{hole}": "no answer in time",
            "http://no-such-machine.invalid": "no machine of that name",
            f"https{known.removeprefix('http')}": "does not speak TLS",
            f"mysql+nodriver://u:{SECRET}@{hole}/db": "",
        }.items():
            monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
            message_of(check_tracking, without_credentials(uri), reason, "unset MLFLOW_TRACKING_URI")


def test_an_mlflow_address_without_a_server_is_named_before_mlflow_is_imported(monkeypatch: pytest.MonkeyPatch) -> None:
    quickly(monkeypatch, "tasks.environment.mlflow_store")
    monkeypatch.setattr("urllib.request.getproxies", dict)
    check_server_is_there()
    with silent() as hole, answering(401) as asking, answering(404) as other:
        for uri in (asking, other, f"https{other.removeprefix('http')}", "sqlite:///mlflow.db"):
            monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
            check_server_is_there()
        for server, reason in {absent(): "connection refused", hole: "no answer in time"}.items():
            monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://u:{SECRET}@{server}")
            message_of(check_server_is_there, f"http://{server} (MLFLOW_TRACKING_URI)", reason)
    program = "import sys; from tasks.environment import mlflow_store; assert 'mlflow' not in sys.modules"
    subprocess.run([sys.executable, "-c", program], check=True, cwd=ROOT)


def test_an_object_store_that_does_not_answer_or_is_not_s3_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    quickly(monkeypatch, "rag_core.storage.store_settings")
    monkeypatch.setattr("urllib.request.getproxies", dict)
    with (
        silent() as hole,
        answering(200, "<html>", HTML) as console,
        answering(403, "<Error/>", "application/xml") as store,
    ):
        monkeypatch.setenv("AWS_ENDPOINT_URL", store)
        check_store_settings()
        for url, reason in {
            f"http://{absent()}": "connection refused",
            f"http://{hole}": "no answer in time",
            console: "is no S3 store",
        }.items():
            monkeypatch.setenv("AWS_ENDPOINT_URL", url)
            message_of(check_store_settings, url, reason, "AWS_ENDPOINT_URL")


def test_prefects_folder_is_made_with_its_parents_and_one_below_a_file_is_refused(tmp_path: Path) -> None:
    from prefect.settings import PREFECT_HOME, temporary_settings

    from flows.cli.prefect_server import _make_home

    with temporary_settings({PREFECT_HOME: tmp_path / "missing" / "prefect"}):
        _make_home()
    assert (tmp_path / "missing" / "prefect").is_dir()
    (tmp_path / "file").touch()
    with temporary_settings({PREFECT_HOME: tmp_path / "file" / "prefect"}), pytest.raises(ConfigError) as refused:
        _make_home()
    assert "PREFECT_HOME is" in str(refused.value)
    assert str(tmp_path / "file" / "prefect") in str(refused.value)
