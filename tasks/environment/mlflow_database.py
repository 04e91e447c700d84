"""Check the SQLite file in which MLflow keeps runs: is it MLflow's, of this release, and writable?"""

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
from tasks.environment.mlflow_internals import migrations
from tasks.environment.variables import writable_folder

HEADER = b"SQLite format 3\x00"
# Runs lock the file only for the moment of a write; a longer lock is held by another program.
LOCK_SECONDS = 8.0
# The tables that MLflow creates first; a migration keeps a table under a temporary name while it copies it.
FIRST_TABLES = {"experiments", "runs", "tags", "metrics", "params"}
TEMPORARY = "_alembic_tmp_"


def check_database_file(uri: str, experiment: str) -> None:
    """Check that runs of the experiment can be written to the file. A missing file passes, because it is made later.

    The check never changes the file.

    Raises:
        ConfigError: the file is a folder, not a SQLite database, damaged, locked or not writable; it belongs to another
            program or another release of MLflow; or the experiment was deleted.
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
        raise _unusable(file, "is not a SQLite database", "Move it away")
    if not os.access(file, os.W_OK) or not os.access(file.parent, os.W_OK):
        raise _unusable(file, "or its folder is read-only", "Correct the permissions")
    try:
        _check_content(file, uri, experiment)
    except sqlite3.OperationalError as error:
        if "locked" in str(error) or "busy" in str(error):
            problem, remedy = f"has been locked by another program for {LOCK_SECONDS:g} s", "End that program"
        else:
            problem, remedy = f"cannot be used ({error})", "Correct its permissions, or move it away"
        raise _unusable(file, problem, remedy) from error
    except sqlite3.DatabaseError as error:
        raise _unusable(file, f"is damaged ({error})", "Move it away, or restore a backup") from error


def deleted_experiment(experiment: str, experiment_id: str, uri: str) -> ConfigError:
    """The error for an experiment that was deleted: MLflow refuses new runs in it."""
    shown = without_credentials(uri)
    return ConfigError(
        f"MLflow's experiment {experiment!r} at {shown} was deleted, so no run can be written to it. Restore it "
        f"(MLFLOW_TRACKING_URI={shown} mlflow experiments restore --experiment-id {experiment_id}), or set "
        "MLFLOW_EXPERIMENT_NAME to another name."
    )


@contextlib.contextmanager
def creation_lock(uri: str) -> Iterator[None]:
    """Hold a lock while MLflow creates a SQLite store's tables, and first delete those that a killed process left unfinished.

    MLflow's client takes no lock, so two commands started in a new folder would both create the tables.
    """
    from mlflow.utils.file_utils import ExclusiveFileLock

    file = _file_of(uri) if urlsplit(uri).scheme.lower().startswith("sqlite") else None
    if file is None:
        yield
        return
    name = hashlib.sha256(os.fsencode(file)).hexdigest()[:16]
    with ExclusiveFileLock(f"{tempfile.gettempdir()}/rag-mlflow-{os.getuid()}-{name}.lock"):
        if file.is_file() and _is_unfinished(file):
            _drop_tables(file)
        yield


def _is_unfinished(file: Path) -> bool:
    """Whether MLflow began to create the database, and nobody has written anything to it: it has no experiment yet.

    Only such tables may be deleted. So they must be MLflow's first ones, or stand at a migration that this MLflow knows,
    and all that could hold somebody's data must be empty.
    """
    with contextlib.closing(_connected(file)) as connection:
        tables = _tables(connection)
        if not _names(tables) or not _are_mlflows(tables) or not _is_empty(connection):
            return False
        revisions = _revisions(connection)
        return _names(tables) <= FIRST_TABLES or (bool(revisions) and revisions <= _known_revisions())


def _connected(file: Path) -> sqlite3.Connection:
    return sqlite3.connect(f"file:{quote(str(file))}?mode=rw", uri=True, timeout=LOCK_SECONDS, isolation_level=None)


def _tables(connection: sqlite3.Connection) -> set[str]:
    names = {name for (name,) in connection.execute("SELECT name FROM sqlite_master WHERE type = 'table'")}
    return {name for name in names if not name.startswith("sqlite_")}


def _names(tables: set[str]) -> set[str]:
    """Names of the tables that hold content; one that a migration is copying has its own name."""
    return {name.removeprefix(TEMPORARY) for name in tables} - {"alembic_version"}


def _are_mlflows(tables: set[str]) -> bool:
    """Whether these look like MLflow's tables, not necessarily all of them; a new file has none."""
    names = _names(tables)
    return not names or ("experiments" in names and ("runs" in names or names <= FIRST_TABLES))


def _is_empty(connection: sqlite3.Connection) -> bool:
    """Whether none of MLflow's first tables has a row."""
    for name in _tables(connection):
        if _names({name}) & FIRST_TABLES:
            query = f'SELECT EXISTS (SELECT 1 FROM "{name}")'  # noqa: S608  # nosec B608
            if connection.execute(query).fetchone()[0]:
                return False
    return True


def _revisions(connection: sqlite3.Connection) -> set[str]:
    """The migration that the database stands at; empty before the first one."""
    if "alembic_version" not in _tables(connection):
        return set()
    return {revision for (revision,) in connection.execute("SELECT version_num FROM alembic_version")}


def _known_revisions() -> set[str]:
    return {script.revision for script in migrations().walk_revisions()}


def _check_content(file: Path, uri: str, experiment: str) -> None:
    connection = _connected(file)
    try:
        connection.execute("BEGIN IMMEDIATE")
        tables = _tables(connection)
        if not _are_mlflows(tables):
            raise _unusable(file, "is the database of another program", "Name another file")
        if "experiments" in tables:
            _check_release(connection, file)
            _check_experiment(connection, experiment, uri)
    finally:
        connection.close()


def _drop_tables(file: Path) -> None:
    """Delete the tables of a creation that was interrupted, all or none, so that MLflow starts it again.

    It cannot be continued: SQLite has no transactions around MLflow's migrations, so any one may be half done.
    """
    with contextlib.closing(_connected(file)) as connection:
        connection.execute("PRAGMA foreign_keys = OFF")
        connection.execute("BEGIN IMMEDIATE")
        for name in _tables(connection):
            connection.execute(f'DROP TABLE "{name}"')
        connection.execute("COMMIT")


def _check_release(connection: sqlite3.Connection, file: Path) -> None:
    from mlflow.version import VERSION

    revisions = _revisions(connection)
    if revisions == set(migrations().get_heads()):
        return
    if revisions <= _known_revisions():
        if _is_empty(connection):  # another process is creating it now, or `creation_lock` will complete it
            return
        raise _unusable(
            file,
            f"was written by an older release of MLflow than {VERSION}",
            f"Back it up, then run: mlflow db upgrade sqlite:///{file}",
        )
    raise _unusable(
        file,
        f"was written by a newer release of MLflow than {VERSION}",
        "Use that release here too, or name another file",
    )


def _check_experiment(connection: sqlite3.Connection, experiment: str, uri: str) -> None:
    query = "SELECT experiment_id, lifecycle_stage FROM experiments WHERE name = ?"
    for experiment_id, stage in connection.execute(query, (experiment,)):
        if stage == "deleted":
            raise deleted_experiment(experiment, str(experiment_id), uri)


def _file_of(uri: str) -> Path | None:
    path = uri.partition("///")[2].partition("?")[0]
    return Path(unquote(path)).absolute() if path and path != ":memory:" else None


def _unusable(file: Path, problem: str, remedy: str) -> ConfigError:
    return ConfigError(
        f"MLflow's database {file} {problem}, so no run can be written to it. No work was started. {remedy}, or set "
        "MLFLOW_TRACKING_URI to another store, such as sqlite:///runs.db."
    )
