"""A wrong value of a variable ends in one paragraph that names the variable; no message shows a secret."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from rag_core.network.addresses import without_credentials
from rag_core.network.usage_reports import OFF
from rag_core.storage.store_settings import check_store_settings
from tasks.environment.prefect_api import check_prefect
from tasks.environment.ray_cluster import check_ray
from tests.support.environment_checks import (
    BY_THE_SERVER,
    SECRET,
    WRONG,
    check_all_variables,
    check_tracking,
    message_of,
)

pytest_plugins = ["tests.support.environment_fixtures"]
pytestmark = pytest.mark.usefixtures("nothing_set")

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize(("name", "value"), [(name, value) for name, (_, values) in WRONG.items() for value in values])
def test_a_wrong_value_of_a_variable_is_named(name: str, value: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(name, value)
    message_of(WRONG[name][0], name)


def test_five_wrong_values_of_every_documented_variable_are_tried() -> None:
    page = (ROOT / "docs" / "configuration.md").read_text().partition("## Environment variables")[2]
    rows = [line.split("|")[1] for line in page.splitlines() if line.startswith("| `")]
    documented = {name for row in rows for name in re.findall(r"`([A-Z][A-Z_]+)`", row)} - BY_THE_SERVER - set(OFF)
    assert documented == set(WRONG)
    assert {name: len(set(values)) for name, (_, values) in WRONG.items() if len(set(values)) != 5} == {}


def test_an_empty_variable_counts_as_unset(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from tasks.on_ray.runtime import cluster_wait
    from tasks.tracking.runs import experiment_name, tracking_uri, unsent_folder

    for name in WRONG:
        for empty in ("", "  "):
            if name != "MLFLOW_EXPERIMENT_NAME" or not empty:
                monkeypatch.setenv(name, empty)
                for check in (check_all_variables, check_prefect, check_ray, check_tracking, check_store_settings):
                    check()
    for name in WRONG:
        monkeypatch.setenv(name, "")
    assert (experiment_name(), cluster_wait(), unsent_folder()) == ("rag", 300, tmp_path / "mlflow-unsent")
    assert tracking_uri() == f"sqlite:///{tmp_path}/mlflow.db"


def test_right_values_pass_and_checking_leaves_nothing_behind(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "token").write_text("0" * 64)
    (tmp_path / "aws").write_text("[profile somebody]\nregion = eu-north-1\n")
    before = sorted(tmp_path.iterdir())
    right = {
        "RAG_WAIT_SECONDS": "inf",
        "RAG_CLUSTER_WAIT_SECONDS": "0.5",
        "RAG_CACHE": "new/cache",
        "RAG_MLFLOW_UNSENT": str(tmp_path / "new"),
        "MLFLOW_EXPERIMENT_NAME": "ответы/of mine [1]",
        "MLFLOW_HTTP_REQUEST_TIMEOUT": "30",
        "MLFLOW_TRACKING_URI": "sqlite:///new/mlflow.db",
        "HF_TOKEN": "hf_abc\n",
        "MLFLOW_TRACKING_USERNAME": "jörg",
        "MLFLOW_TRACKING_PASSWORD": "пароль",
        "HF_ENDPOINT": "http://127.0.0.1:8080",
        "HF_HOME": "new/hub",
        "HF_HUB_OFFLINE": "yes",
        "HF_HUB_ETAG_TIMEOUT": "3",
        "RAY_AUTH_TOKEN_PATH": str(tmp_path / "token"),
        "RAY_ADDRESS": "local",
        "AWS_CONFIG_FILE": str(tmp_path / "aws"),
        "AWS_PROFILE": "somebody",
    }
    for name, value in right.items():
        monkeypatch.setenv(name, value)
    for check in (check_all_variables, check_prefect, check_ray, check_tracking, check_store_settings):
        check()
    assert sorted(tmp_path.iterdir()) == before


def test_an_address_is_shown_without_any_secret() -> None:
    for address in (
        f"http://u:{SECRET}@host:5000/x",
        f"http://u:a/{SECRET}@host/x",
        f"http://u:a#{SECRET}@host",
        f"http://u:a?{SECRET}@[::1",
        f"postgresql://host/db?user=u&password={SECRET}&sslmode=require",
        f"https://host/api?access_token={SECRET}",
    ):
        shown = without_credentials(address)
        assert SECRET not in shown
        assert "host" in shown or "::1" in shown
    assert without_credentials("postgresql://h/d?sslmode=require") == "postgresql://h/d?sslmode=require"
