"""A SQLite file that MLflow is to keep runs in: whether it is one, of this release, and can be written."""

from __future__ import annotations

import contextlib
import hashlib
import os
import sqlite3
import tempfile
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import quote, unquote, urlsplit

from rag_core.errors import ConfigError
from rag_core.network.addresses import without_credentials
from tasks.environment.variables import writable_folder

HEADER = b"SQLite format 3\x00"
# Two runs write in turns; a lock that lasts longer is somebody's who stays.
LOCK_SECONDS = 8.0


def check_database_file(uri: str, experiment: str) -> None:
    """Whether runs of that experiment can be written to the file; one that is not there is made later.

    Raises:
        ConfigError: it is a folder, no database, another program's, of another release of MLflow, locked or not
            writable, or the experiment was deleted. The file has not been changed.
    """
    file = _file_of(uri)
    if file is None:  # in memory
        return
    if file.is_dir():
        raise _unusable(file, "is a folder", "Name a file in it, such as mlflow.db")
    if not os.path.lexists(file):
        writable_folder("MLFLOW_TRACKING_URI (or the current folder)", str(file.parent))
        return
    try:
        with file.open("rb") as content:
            header = content.read(len(HEADER))
    except OSError as error:
        raise _unusable(
            file, f"cannot be read ({(error.strerror or '').lower()})", "Correct its permissions"
        ) from error
    if header and header != HEADER:
        raise _unusable(file, "is no SQLite database", "Move it away")
    if not os.access(file, os.W_OK) or not os.access(file.parent, os.W_OK):
        raise _unusable(file, "or its folder is read-only", "Correct the permissions")
    try:
        _check_content(file, uri, experiment)
    except sqlite3.OperationalError as error:
        if "locked" in str(error) or "busy" in str(error):
            found, remedy = f"has been locked by another program for {LOCK_SECONDS:g} s", "End that program"
        else:
            found, remedy = f"cannot be used ({error})", "Correct its permissions, or move it away"
        raise _unusable(file, found, remedy) from error
    except sqlite3.DatabaseError as error:
        raise _unusable(file, f"is damaged ({error})", "Move it away, or take a copy back") from error


def deleted_experiment(experiment: str, number: str, uri: str) -> ConfigError:
    """Runs of an experiment that was deleted cannot be written."""
    shown = without_credentials(uri)
    return ConfigError(
        f"MLflow's experiment {experiment!r} at {shown} was deleted, so no run can be written to it. Restore it "
        f"(MLFLOW_TRACKING_URI={shown} mlflow experiments restore --experiment-id {number}), or set MLFLOW_EXPERIMENT_NAME "
        "to another name."
    )


@contextlib.contextmanager
def made_by_one(uri: str) -> Iterator[None]:
    """Around what makes the tables where they are missing: one process at a time, and one that was killed is gone on for.

    MLflow's client takes no lock, so two commands that are started in a new folder would both make them.

    Raises:
        ConfigError: what a killed process left cannot be gone on with.
    """
    from mlflow.utils.file_utils import ExclusiveFileLock

    file = _file_of(uri) if urlsplit(uri).scheme.lower().startswith("sqlite") else None
    if file is None:
        yield
        return
    name = hashlib.sha256(os.fsencode(file)).hexdigest()[:16]
    with ExclusiveFileLock(f"{tempfile.gettempdir()}/rag-mlflow-{os.getuid()}-{name}.lock"):
        if file.is_file() and _is_unfinished(file):
            _finish_making(file, uri)
        yield


def _is_unfinished(file: Path) -> bool:
    """Whether the process that made the database was killed: MLflow writes an experiment at the end."""
    with contextlib.closing(_connected(file)) as connection:
        tables = _tables(connection)
        return "experiments" in tables and _is_empty(connection)


def _connected(file: Path) -> sqlite3.Connection:
    return sqlite3.connect(f"file:{quote(str(file))}?mode=rw", uri=True, timeout=LOCK_SECONDS, isolation_level=None)


def _tables(connection: sqlite3.Connection) -> set[str]:
    names = {name for (name,) in connection.execute("SELECT name FROM sqlite_master WHERE type = 'table'")}
    return {name for name in names if not name.startswith("sqlite_")}


def _is_empty(connection: sqlite3.Connection) -> bool:
    return not connection.execute("SELECT EXISTS (SELECT 1 FROM experiments)").fetchone()[0]


def _check_content(file: Path, uri: str, experiment: str) -> None:
    connection = _connected(file)
    try:
        connection.execute("BEGIN IMMEDIATE")
        tables = _tables(connection)
        if tables - {"alembic_version"} and not {"experiments", "runs"} <= tables:
            raise _unusable(file, "is the database of another program", "Name another file")
        if "experiments" in tables:
            _check_release(connection, tables, file)
            _check_experiment(connection, experiment, uri)
    finally:
        connection.close()


def _finish_making(file: Path, uri: str) -> None:
    """Go on with MLflow's migrations where they stopped. No run can be in the database yet."""
    import sqlalchemy
    from alembic.util import CommandError
    from mlflow.store.db.utils import (
        _get_latest_schema_revision,
        _get_schema_version,
        _safe_initialize_tables,
        _upgrade_db,
    )

    engine = sqlalchemy.create_engine(uri, poolclass=sqlalchemy.NullPool)
    try:
        _safe_initialize_tables(engine)
        if _get_schema_version(engine) != _get_latest_schema_revision():
            _upgrade_db(engine)
    except (sqlalchemy.exc.SQLAlchemyError, CommandError) as error:
        raise _unusable(
            file,
            "is half made, and cannot be gone on with",
            "If no other command is at it, delete it: no run is in it yet",
        ) from error


def _check_release(connection: sqlite3.Connection, tables: set[str], file: Path) -> None:
    from alembic.script import ScriptDirectory
    from mlflow.store.db.utils import _get_alembic_config
    from mlflow.version import VERSION

    rows = connection.execute("SELECT version_num FROM alembic_version") if "alembic_version" in tables else ()
    found = {revision for (revision,) in rows}
    scripts = ScriptDirectory.from_config(_get_alembic_config(db_url=""))
    if found == set(scripts.get_heads()):
        return
    if found <= {script.revision for script in scripts.walk_revisions()}:
        if _is_empty(connection):  # its making goes on, or will be gone on with
            return
        raise _unusable(
            file,
            f"was written by an older release of MLflow than {VERSION}",
            f"Take a copy of it, then run: mlflow db upgrade sqlite:///{file}",
        )
    raise _unusable(
        file,
        f"was written by a newer release of MLflow than {VERSION}",
        "Use that release here too, or name another file",
    )


def _check_experiment(connection: sqlite3.Connection, experiment: str, uri: str) -> None:
    query = "SELECT experiment_id, lifecycle_stage FROM experiments WHERE name = ?"
    for number, stage in connection.execute(query, (experiment,)):
        if stage == "deleted":
            raise deleted_experiment(experiment, str(number), uri)


def _file_of(uri: str) -> Path | None:
    path = uri.partition("///")[2].partition("?")[0]
    return Path(unquote(path)).absolute() if path and path != ":memory:" else None


def _unusable(file: Path, found: str, remedy: str) -> ConfigError:
    return ConfigError(
        f"MLflow's database {file} {found}, so no run can be written to it. Nothing was begun. {remedy}, or set "
        "MLFLOW_TRACKING_URI to another store, such as sqlite:///runs.db."
    )
