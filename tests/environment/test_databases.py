"""MLflow's database: of another release or program, damaged, locked, half created; old runs in folders."""

from __future__ import annotations

import contextlib
import shutil
import sqlite3
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tasks.environment.mlflow_database import creation_lock
from tasks.environment.mlflow_store import check_store
from tests.support.environment_checks import check_tracking, message_of, of_release
from tests.support.servers.processes import environment_in

pytest_plugins = ["tests.support.environment_fixtures"]
pytestmark = pytest.mark.usefixtures("nothing_set")


def foreign(file: Path) -> None:
    file.unlink()
    with sqlite3.connect(file) as connection:
        connection.execute("CREATE TABLE customers (name TEXT)")


def as_folder(file: Path) -> None:
    file.unlink()
    file.mkdir()


KILLED_BEFORE = [
    "CREATE TABLE runs",
    "CREATE TABLE alembic_version",
    "INSERT INTO alembic_version",
    "DROP TABLE experiments",
    "ALTER TABLE _alembic_tmp_experiments RENAME",
    "CREATE TABLE model_versions",
    "INSERT INTO experiments",
]
# For each statement, a child process that creates a database and is gone when it would execute the statement.
KILLED = """
import os, sys
import sqlalchemy
from mlflow import MlflowClient
for number, statement in enumerate(sys.argv[1:]):
    def kill(connection, cursor, sql, *arguments):
        if " ".join(sql.replace('"', "").split()).startswith(statement):
            os._exit(9)
    if os.fork():
        assert os.waitstatus_to_exitcode(os.wait()[1]) == 9, statement
        continue
    sqlalchemy.event.listen(sqlalchemy.Engine, "before_cursor_execute", kill)
    MlflowClient(f"sqlite:///{number}.db").create_experiment("rag")
    os._exit(0)
"""


@pytest.fixture(scope="module")
def unfinished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with one database per statement in KILLED_BEFORE."""
    folder = tmp_path_factory.mktemp("unfinished")
    subprocess.run([sys.executable, "-c", KILLED, *KILLED_BEFORE], cwd=folder, env=environment_in(folder), check=True)
    return folder


@pytest.mark.parametrize("statement", KILLED_BEFORE)
def test_a_database_whose_creation_was_killed_is_created_again(
    statement: str, unfinished: Path, tmp_path: Path
) -> None:
    from mlflow import MlflowClient

    file = Path(shutil.copy(unfinished / f"{KILLED_BEFORE.index(statement)}.db", tmp_path / "mlflow.db"))
    uri, before = f"sqlite:///{file}", file.read_bytes()
    check_store(uri, "rag")
    assert file.read_bytes() == before, "the check changes nothing"
    with creation_lock(uri):
        assert MlflowClient(uri).create_experiment("rag")
    with creation_lock(uri):
        assert MlflowClient(uri).get_experiment_by_name("rag"), "a finished database is left alone"


FOREIGN = {
    "a table of MLflow's name": ["CREATE TABLE tags (name TEXT)", "INSERT INTO tags VALUES ('mine')"],
    "an empty table experiments": [
        "CREATE TABLE experiments (name TEXT)",
        "CREATE TABLE runs (name TEXT)",
        "INSERT INTO runs VALUES ('mine')",
    ],
    "migrations of its own": [
        "CREATE TABLE experiments (name TEXT)",
        "CREATE TABLE runs (name TEXT)",
        "CREATE TABLE samples (name TEXT)",
        "INSERT INTO samples VALUES ('mine')",
        "CREATE TABLE alembic_version (version_num TEXT)",
        "INSERT INTO alembic_version VALUES ('0123456789ab')",
    ],
    "no migrations": [
        "CREATE TABLE experiments (name TEXT)",
        "CREATE TABLE runs (name TEXT)",
        "CREATE TABLE samples (name TEXT)",
        "INSERT INTO samples VALUES ('mine')",
    ],
}


@pytest.mark.parametrize("case", FOREIGN)
def test_a_database_of_another_program_with_such_tables_loses_nothing(case: str, tmp_path: Path) -> None:
    file = tmp_path / "other.db"
    with contextlib.closing(sqlite3.connect(file)) as connection:
        for statement in FOREIGN[case]:
            connection.execute(statement)
        connection.commit()
    before = file.read_bytes()
    with creation_lock(f"sqlite:///{file}"):
        assert file.read_bytes() == before


def test_two_commands_started_in_a_new_folder_create_one_database(tmp_path: Path) -> None:
    program = "from tasks.tracking.runs import prepare_store; prepare_store()"
    environment = environment_in(tmp_path)
    commands = [
        subprocess.Popen(
            [sys.executable, "-c", program],
            cwd=tmp_path,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )
        for _ in range(2)
    ]
    for command in commands:
        output, _ = command.communicate(timeout=120)
        assert command.returncode == 0, output.decode()


DATABASES: dict[str, tuple[Callable[[Path], object], list[str]]] = {
    # The last migration of MLflow 2.0.
    "of an older release": (
        lambda file: of_release(file, "cc1f77228345"),
        ["older release", "mlflow db upgrade sqlite:"],
    ),
    "of a newer release": (lambda file: of_release(file, "0123456789ab"), ["newer release of MLflow than"]),
    "of another program": (foreign, ["another program"]),
    "no database": (lambda file: file.write_text("runs: none"), ["not a SQLite database"]),
    "cut off": (lambda file: file.write_bytes(file.read_bytes()[:9000]), ["damaged"]),
    "a folder": (as_folder, ["is a folder", "Name a file"]),
}


@pytest.mark.parametrize("case", DATABASES)
def test_a_database_that_this_mlflow_cannot_use_is_named_and_left_alone(
    case: str, database: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    change, words = DATABASES[case]
    file = Path(shutil.copy(database, tmp_path / "mlflow.db"))
    change(file)
    before = file.read_bytes() if file.is_file() else b""
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{file}")
    message_of(check_tracking, str(file), "MLFLOW_TRACKING_URI", *words)
    assert before == (file.read_bytes() if file.is_file() else b"")


def test_a_locked_database_is_named_and_a_good_one_passes(
    database: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr("tasks.environment.mlflow_database.LOCK_SECONDS", 0.2)
    file = shutil.copy(database, tmp_path / "mlflow.db")
    check_tracking()
    holder = sqlite3.connect(file)
    holder.execute("BEGIN IMMEDIATE")
    message_of(check_tracking, str(file), "locked by another program")
    holder.close()
    check_tracking()


def test_a_deleted_experiment_is_named_with_the_command_that_restores_it(
    database: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{database}")
    check_tracking()
    monkeypatch.setenv("MLFLOW_EXPERIMENT_NAME", "gone")
    message_of(check_tracking, "'gone'", "mlflow experiments restore --experiment-id 1", "MLFLOW_EXPERIMENT_NAME")


def test_old_runs_in_a_folder_are_named_with_the_command_that_migrates_them(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "mlruns" / "0").mkdir(parents=True)
    (tmp_path / "mlruns" / "0" / "meta.yaml").write_text("name: Default\n")
    message_of(check_tracking, f"{tmp_path}/mlruns holds MLflow runs", "migrate-filestore", "sqlite:///mlflow.db")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "sqlite:///mlflow.db")
    check_tracking()
