"""Fixtures for the tests of `tasks/environment/`; a test module loads them with `pytest_plugins`."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.support.environment_checks import BY_THE_SERVER, WRONG


@pytest.fixture
def nothing_set(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Unset all variables that are checked, and work in an empty folder."""
    for name in {*WRONG, *BY_THE_SERVER, "AWS_ENDPOINT_URL_S3"}:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("PREFECT_HOME", str(tmp_path / "prefect"))
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "none"))
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "none"))
    monkeypatch.setenv("TMPDIR", "/tmp")
    monkeypatch.chdir(tmp_path)


@pytest.fixture(scope="module")
def database(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A database of the installed MLflow release, with a deleted experiment "gone"."""
    from mlflow import MlflowClient

    file = tmp_path_factory.mktemp("mlflow") / "mlflow.db"
    client = MlflowClient(f"sqlite:///{file}")
    client.delete_experiment(client.create_experiment("gone"))
    return file
