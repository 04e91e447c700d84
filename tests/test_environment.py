"""Variables, folders and servers that are not as expected end in one paragraph before any work begins.

The checks of `tasks/environment/` and `rag_core/artefacts/store_settings.py` are asked in this process, with real files,
real databases and small real servers on loopback; three whole commands show that they are asked.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import sqlite3
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from rag_core.addresses import without_credentials
from rag_core.artefacts.store_settings import check_store_settings
from rag_core.errors import ConfigError
from rag_core.usage_reports import OFF
from tasks.environment import ray_cluster
from tasks.environment.mlflow_store import check_server_is_there, check_store
from tasks.environment.prefect_api import check_prefect
from tasks.environment.ray_cluster import SMALLEST_STORE, ObjectStore, check_ray, object_store
from tasks.environment.variables import FOR_EVERY_COMMAND, FOR_STAGES, check_variables
from tests.odd_servers import HTML, JSON, absent, answering, silent
from tests.processes import environment_in

ROOT = Path(__file__).resolve().parents[1]
SECRET = "canary-77b3"
GIGABYTE = 10**9


def check_tracking() -> None:
    from tasks.tracking import check_tracking

    check_tracking()


def check_all_variables() -> None:
    check_variables({**FOR_EVERY_COMMAND, **FOR_STAGES})


# Of every variable in docs/configuration.md five wrong values, who notices, and what is said beside the variable's name.
URLS = ("banana", "htp://127.0.0.1/x", "http://127.0.0.1:99999", f"http://u:{SECRET}/x@127.0.0.1", "http://a b/api")
SECONDS_WRONG = ("ten", "-1", "nan", "1,5", "1 s")
FOLDERS_WRONG = ("/proc/nothing", "/dev/null", "/dev/null/below", "/proc/self/mem", "/sys/nothing/below")
WRONG: dict[str, tuple[Callable[[], None], tuple[str, ...]]] = {
    "MLFLOW_TRACKING_URI": (check_tracking, ("mlruns", "file:///tmp/mlruns", "s3://bucket/x", *URLS[1:3])),
    "MLFLOW_EXPERIMENT_NAME": (check_all_variables, ("x" * 501, "a\tb", "a\nb", "\x1b[1m", "é" * 600)),
    "MLFLOW_HTTP_REQUEST_TIMEOUT": (check_all_variables, ("ten", "-1", "0", "1.5", "inf")),
    "RAG_MLFLOW_UNSENT": (check_all_variables, FOLDERS_WRONG),
    "PREFECT_API_URL": (check_prefect, URLS),
    "RAY_ADDRESS": (check_ray, ("banana", "127.0.0.1", "http://127.0.0.1:6379", "ray://h:10001", "127.0.0.1:99999")),
    "RAY_TMPDIR": (check_ray, ("/tmp/" + "long" * 12, "/tmp/" + "é" * 20, *FOLDERS_WRONG[:3])),
    "RAY_AUTH_TOKEN_PATH": (check_ray, ("/nothing", "/tmp", "/dev/null/x", "relative/nothing", "~/token")),
    "RAY_AUTH_TOKEN": (check_all_variables, ("a\nb", "ключ", "a\x00b".replace("\x00", "\x01"), "“a”", "a\tb")),
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
# Read by no code of ours, or any text is right: what is wrong with them, a server says.
BY_THE_SERVER = {"MLFLOW_TRACKING_USERNAME", "MLFLOW_TRACKING_PASSWORD", "MLFLOW_TRACKING_TOKEN"}
BY_THE_SERVER |= {"PREFECT_API_AUTH_STRING", "PREFECT_API_KEY"}


@pytest.fixture(autouse=True)
def _nothing_set(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in {*WRONG, *BY_THE_SERVER, "AWS_ENDPOINT_URL_S3"}:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("PREFECT_HOME", str(tmp_path / "prefect"))
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "none"))
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "none"))
    monkeypatch.setenv("TMPDIR", "/tmp")
    monkeypatch.chdir(tmp_path)


def message_of(check: Callable[[], None], *words: str) -> str:
    """The paragraph in which a check ends; it holds the words, and no secret."""
    with pytest.raises(ConfigError) as raised:
        check()
    message = str(raised.value)
    assert "\n" not in message, message
    assert SECRET not in message, message
    for word in words:
        assert word in message, f"{word!r} is not in: {message}"
    return message


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


def test_an_empty_variable_counts_as_one_that_is_not_set(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from tasks.ray_runtime import cluster_wait
    from tasks.tracking import experiment_name, tracking_uri, unsent_folder

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


def test_right_values_pass_and_looking_leaves_nothing_behind(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
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


# --- servers


def quickly(monkeypatch: pytest.MonkeyPatch, *modules: str) -> None:
    """Servers get half a second to answer."""
    for module in modules:
        monkeypatch.setattr(f"{module}.SECONDS", 0.5)


PREFECT_WRONG = {
    "asks for a password": (401, '{"detail":"Unauthorized"}', JSON, "/api", ["password", "PREFECT_API_AUTH_STRING"]),
    "refuses us": (403, "{}", JSON, "/api", ["403", "PREFECT_API_AUTH_STRING"]),
    "is no Prefect": (404, "{}", JSON, "/api", ["404", "no API of Prefect's"]),
    "is unwell": (500, "oh", JSON, "/api", ["500", "its log"]),
    "a gateway's page": (502, "<html>", HTML, "/api", ["502", "HTML"]),
    "a page": (200, "<html>", HTML, "/api", ["not as Prefect does"]),
    "the address of the pages": (200, "<html>", HTML, "", ["ends in /api", "/api, or unset"]),
    "another thing's JSON": (200, '{"version": 1}', JSON, "/api", ["not as Prefect does"]),
    "an older Prefect": (200, '"2.20.4"', JSON, "/api", ["2.20.4", "first numbers must be equal"]),
}


@pytest.mark.parametrize("case", PREFECT_WRONG)
def test_a_server_that_is_no_prefect_of_ours_is_named(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    status, body, kind, path, words = PREFECT_WRONG[case]
    with answering(status, body, kind) as address:
        monkeypatch.setenv("PREFECT_API_URL", address.replace("//", f"//u:{SECRET}@") + path)
        message_of(check_prefect, address, "unset PREFECT_API_URL", *words)


def test_a_wrong_password_for_prefect_is_told_from_a_missing_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PREFECT_API_AUTH_STRING", f"me:{SECRET}")
    with answering(401, '{"detail":"Unauthorized"}') as address:
        monkeypatch.setenv("PREFECT_API_URL", f"{address}/api")
        message_of(check_prefect, "refuses what PREFECT_API_AUTH_STRING holds")


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
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=60)
    assert "ConfigError: Prefect cannot read its setting PREFECT_" in done.stderr, done.stderr


EXPERIMENT = {"experiment": {"experiment_id": "7", "name": "rag", "lifecycle_stage": "active"}}
DELETED = {"experiment": {"experiment_id": "7", "name": "rag", "lifecycle_stage": "deleted"}}
MLFLOW_WRONG = {
    "asks who we are": (401, "You are not authenticated", HTML, ["asks who we are", "MLFLOW_TRACKING_USERNAME"]),
    "refuses us": (403, "{}", JSON, ["403", "MLFLOW_TRACKING_TOKEN"]),
    "is no MLflow": (404, "not found", HTML, ["404", "no MLflow of ours"]),
    "is a Prefect": (404, '{"detail":"Not Found"}', JSON, ["404", "no MLflow of ours"]),
    "is unwell": (500, "{}", JSON, ["500", "its log"]),
    "a gateway's page": (503, "<html>", HTML, ["503", "HTML"]),
    "too much asked": (429, "", JSON, ["429"]),
    "a page": (200, "<html>", HTML, ["HTML page", "no MLflow of ours"]),
    "a deleted experiment": (200, json.dumps(DELETED), JSON, ["restore --experiment-id 7", "MLFLOW_EXPERIMENT_NAME"]),
}


@pytest.mark.parametrize("case", MLFLOW_WRONG)
def test_a_server_that_is_no_mlflow_of_ours_is_named(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    status, body, kind, words = MLFLOW_WRONG[case]
    with answering(status, body, kind) as address:
        monkeypatch.setenv("MLFLOW_TRACKING_URI", address.replace("//", f"//u:{SECRET}@"))
        message_of(check_tracking, address, *words)


def test_a_wrong_password_for_mlflow_is_told_from_a_missing_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_USERNAME", "me")
    monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", SECRET)
    with answering(401) as address:
        monkeypatch.setenv("MLFLOW_TRACKING_URI", address)
        message_of(check_tracking, "refuses what MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD say")


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


def test_an_mlflow_that_nobody_answers_for_is_named_before_mlflow_is_imported(monkeypatch: pytest.MonkeyPatch) -> None:
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


def test_an_object_store_that_does_not_answer_or_is_none_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    quickly(monkeypatch, "rag_core.artefacts.store_settings")
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


def test_a_ray_cluster_that_is_not_there_is_named_and_nothing_waits_for_minutes(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    patience = {name: "1" for name in ray_cluster._PATIENCE if name.endswith(("_s", "_seconds"))}
    monkeypatch.setattr(ray_cluster, "_PATIENCE", ray_cluster._PATIENCE | patience)
    with silent() as hole:
        for address, reason in {
            absent(): "connection refused",
            "no-such-machine.invalid:6379": "no machine of that name",
            hole: "does not answer as Ray does",
        }.items():
            monkeypatch.setenv("RAY_ADDRESS", address)
            message_of(check_ray, address, reason, "unset RAY_ADDRESS")


def test_a_running_cluster_passes_with_its_token_and_is_named_without(
    services: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    import ray

    monkeypatch.setenv("RAY_ADDRESS", ray.get_runtime_context().gcs_address)
    check_ray()
    ray_cluster._check_cluster.cache_clear()
    (tmp_path / "other").write_text("w" * 64)
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(tmp_path / "other"))
    message_of(check_ray, "asks for another token", "RAY_AUTH_MODE=token", "RAY_AUTH_TOKEN_PATH")
    monkeypatch.delenv("RAY_AUTH_TOKEN_PATH")
    changed = ray_cluster._PROBE.replace("compute_version_info()]", "['2.9.0', '3.11.7']]")
    monkeypatch.setattr(ray_cluster, "_PROBE", changed)
    message_of(check_ray, f"runs Ray {ray.__version__}", "Ray 2.9.0", "Both must be equal")


# --- files, memory


@pytest.fixture(scope="module")
def database(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A database of MLflow's as it is installed, with an experiment "gone" that was deleted."""
    from mlflow import MlflowClient

    file = tmp_path_factory.mktemp("mlflow") / "mlflow.db"
    client = MlflowClient(f"sqlite:///{file}")
    client.delete_experiment(client.create_experiment("gone"))
    return file


def of_release(file: Path, revision: str) -> None:
    with sqlite3.connect(file) as connection:
        connection.execute("UPDATE alembic_version SET version_num = ?", (revision,))


def foreign(file: Path) -> None:
    file.unlink()
    with sqlite3.connect(file) as connection:
        connection.execute("CREATE TABLE customers (name TEXT)")


def as_folder(file: Path) -> None:
    file.unlink()
    file.mkdir()


@pytest.mark.parametrize("steps", [0, 1, 12, -1])
def test_a_database_whose_making_was_killed_is_finished(steps: int, tmp_path: Path) -> None:
    """`steps` of MLflow's migrations were done; -1: all but the last."""
    import sqlalchemy
    from alembic import command
    from alembic.script import ScriptDirectory
    from mlflow import MlflowClient
    from mlflow.store.db.utils import _get_alembic_config
    from mlflow.store.tracking.dbmodels.initial_models import Base

    uri = f"sqlite:///{tmp_path}/mlflow.db"
    Base.metadata.create_all(sqlalchemy.create_engine(uri, poolclass=sqlalchemy.NullPool))
    config = _get_alembic_config(uri)
    revisions = [one.revision for one in ScriptDirectory.from_config(config).walk_revisions()][::-1]
    if steps:
        command.upgrade(config, revisions[steps - 1])
    check_store(uri, "rag")
    assert MlflowClient(uri).create_experiment("rag")


DATABASES: dict[str, tuple[Callable[[Path], object], list[str]]] = {
    # The revision of MLflow 2.0 in its own list of migrations.
    "of an older release": (
        lambda file: of_release(file, "cc1f77228345"),
        ["older release", "mlflow db upgrade sqlite:"],
    ),
    "of a newer release": (lambda file: of_release(file, "0123456789ab"), ["newer release of MLflow than"]),
    "of another program": (foreign, ["another program"]),
    "no database": (lambda file: file.write_text("runs: none"), ["no SQLite database"]),
    "cut off": (lambda file: file.write_bytes(file.read_bytes()[:9000]), ["damaged"]),
    "a folder": (as_folder, ["is a folder", "Name a file"]),
}


@pytest.mark.parametrize("case", DATABASES)
def test_a_database_that_is_not_mlflows_of_today_is_named_and_left_alone(
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


def test_runs_of_old_in_a_folder_are_named_with_the_command_that_takes_them_along(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "mlruns" / "0").mkdir(parents=True)
    (tmp_path / "mlruns" / "0" / "meta.yaml").write_text("name: Default\n")
    message_of(check_tracking, f"{tmp_path}/mlruns holds MLflow runs", "migrate-filestore", "sqlite:///mlflow.db")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "sqlite:///mlflow.db")
    check_tracking()


def test_the_folder_of_rays_sockets_may_be_as_long_as_ray_takes_it(monkeypatch: pytest.MonkeyPatch) -> None:
    rest = len("/ray/session_2026-11-27_16-39-29_123456_/sockets/plasma_store") + len(str(os.getpid()))
    longest = "/tmp/" + "x" * (ray_cluster.LONGEST_SOCKET_PATH - rest - len("/tmp/"))
    monkeypatch.setenv("RAY_TMPDIR", longest)
    check_ray()
    monkeypatch.setenv("RAY_TMPDIR", longest + "x")
    message_of(check_ray, "RAY_TMPDIR", f"{len(longest)}.", "/tmp")


def test_rays_object_store_fits_the_shared_memory_that_is_there() -> None:
    assert object_store(4 * GIGABYTE, 8 * GIGABYTE, 0, "/tmp") == ObjectStore()
    assert object_store(4 * GIGABYTE, GIGABYTE, 0, "/tmp") == ObjectStore(int(0.95 * GIGABYTE))
    small = object_store(4 * GIGABYTE, 64 * 2**20, 10 * GIGABYTE, "/tmp")
    assert small.options == {"object_store_memory": 2 * 2**30, "_plasma_directory": "/tmp"}
    assert "/dev/shm has 67 MB free" in small.notice
    assert "--shm-size" in small.notice
    none = object_store(4 * GIGABYTE, None, 2 * SMALLEST_STORE, "/scratch")
    assert none.options == {"object_store_memory": SMALLEST_STORE, "_plasma_directory": "/scratch"}
    for shared in (None, 2**20):
        message_of(lambda shared=shared: object_store(4 * GIGABYTE, shared, 10**8, "/tmp"), "/dev/shm", "RAY_TMPDIR")


# --- whole commands


def rag(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str]:
    """Runs the command line in this process; the exit code and standard error."""
    from flows.cli.main import run

    monkeypatch.setattr(sys, "argv", ["rag", *map(str, arguments)])
    with pytest.raises(SystemExit) as ended:
        run()
    return int(ended.value.code or 0), " ".join(capsys.readouterr().err.split())


def test_a_stage_ends_with_the_paragraph_before_its_work(
    services: Path,
    prefect_url: str,
    database: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / "passages.jsonl").write_text('{"id": "1", "text": "Lyon is in France."}\n')
    older = Path(shutil.copy(database, tmp_path / "older.db"))
    of_release(older, "cc1f77228345")
    command = "corpus", tmp_path / "passages.jsonl", "--out", tmp_path / "corpus"
    for name, value, words in (
        ("PREFECT_API_URL", prefect_url.removesuffix("/api"), f"set it to {prefect_url}"),
        ("MLFLOW_TRACKING_URI", f"sqlite:///{older}", f"mlflow db upgrade sqlite:///{older}"),
        ("RAG_WAIT_SECONDS", "soon", "RAG_WAIT_SECONDS"),
        ("MLFLOW_HTTP_REQUEST_TIMEOUT", "soon", "MLFLOW_HTTP_REQUEST_TIMEOUT"),
    ):
        with monkeypatch.context() as patch:
            patch.setenv("PREFECT_API_URL", prefect_url)
            patch.setenv(name, value)
            code, said = rag(patch, capsys, *command)
            assert (code, said[:6]) == (2, "Error:"), said
            assert words in said
    assert not (tmp_path / "corpus").exists()


@pytest.mark.slow
def test_a_stale_address_of_ray_ends_a_command_within_seconds(tmp_path: Path) -> None:
    # The address is looked at before the corpus is.
    command = [sys.executable, "-m", "flows.cli.main", "embed", "--corpus", "c", "--encoder", "e", "--out", "out"]
    address, before = absent(), time.monotonic()
    done = subprocess.run(
        command,
        cwd=tmp_path,
        env=environment_in(tmp_path, RAY_ADDRESS=address),
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 2, done.stderr
    assert f"Error: The Ray cluster at {address} (RAY_ADDRESS) does not answer (connection refused)" in done.stderr
    assert "Traceback" not in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1, done.stderr
    # The whole promise is 20 s; a busy machine takes its time for the imports alone.
    assert time.monotonic() - before < 60


def test_doctor_says_the_same_words_and_no_secret(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from flows.cli import doctor

    wrong = {
        "RAG_WAIT_SECONDS": "soon",
        "RAG_CACHE": "/dev/null/[/b]",
        "PREFECT_API_URL": f"http://u:{SECRET}@{absent()}/api",
        "MLFLOW_TRACKING_URI": f"http://u:{SECRET}@{absent()}",
        "RAY_ADDRESS": absent(),
        "AWS_ENDPOINT_URL": "banana",
        "HF_TOKEN": f"{SECRET}\n{SECRET}",
    }
    for name, value in wrong.items():
        monkeypatch.setenv(name, value)
    assert doctor.examine() == 1
    shown = capsys.readouterr().out
    flat = " ".join(shown.split())
    assert [name for name in wrong if name not in flat] == []
    assert flat.count("wrong: ") == len(wrong)
    assert "connection refused" in flat
    assert "'/dev/null/[/b]'" in flat
    assert SECRET not in shown


# --- addresses and usage reports


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


@pytest.mark.parametrize("module", ["rag_core", "tasks.environment", "flows.cli.main"])
def test_usage_reports_are_off_in_whatever_imports_us_unless_somebody_wants_them(module: str) -> None:
    code = f"import json, os, {module}; print(json.dumps(dict(os.environ)))"
    clean = {name: value for name, value in os.environ.items() if name not in OFF}

    def environment_after(**more: str) -> dict[str, str]:
        command = [sys.executable, "-c", code]
        done = subprocess.run(
            command, env=clean | more, cwd=ROOT, capture_output=True, text=True, check=True, timeout=60
        )
        found: dict[str, str] = json.loads(done.stdout)
        return found

    assert OFF.items() <= environment_after().items()
    assert environment_after(DO_NOT_TRACK="0")["DO_NOT_TRACK"] == "0"


def test_the_tools_understand_what_switches_them_off() -> None:
    code = (
        "import rag_core, huggingface_hub.constants, mlflow.telemetry, prefect.analytics\n"
        "from prefect.settings import get_current_settings\n"
        "from ray._common.usage.usage_lib import usage_stats_enabled\n"
        "print(huggingface_hub.constants.HF_HUB_DISABLE_TELEMETRY, mlflow.telemetry.get_telemetry_client(),\n"
        "      prefect.analytics.is_telemetry_enabled(), get_current_settings().server.analytics_enabled,\n"
        "      usage_stats_enabled())"
    )
    # MLflow and Prefect report nothing from a test or a CI machine, so those marks go too.
    marks = ("PYTEST", "CI", "GITHUB_", "BUILD", "JENKINS", "TF_BUILD", "TEAMCITY")
    clean = {name: value for name, value in os.environ.items() if name not in OFF and not name.startswith(marks)}
    done = subprocess.run(
        [sys.executable, "-c", code], env=clean, cwd=ROOT, capture_output=True, text=True, timeout=120
    )
    assert done.stdout.split() == ["True", "None", "False", "False", "False"], done.stderr


def test_a_served_model_ends_the_usage_reports_that_its_server_had_begun() -> None:
    code = (
        "import os, runpy, mlflow\n"
        "print(mlflow.telemetry.get_telemetry_client() is None)\n"
        f"runpy.run_path({str(ROOT / 'tasks' / 'answering_model.py')!r})\n"
        "print(mlflow.telemetry.get_telemetry_client() is None)"
    )
    marks = ("PYTEST", "CI", "GITHUB_", "BUILD", "JENKINS", "TF_BUILD", "TEAMCITY")
    clean = {name: value for name, value in os.environ.items() if name not in OFF and not name.startswith(marks)}
    # The client looks up its settings at a name of the internet when it has something to send: it has nothing here.
    done = subprocess.run(
        [sys.executable, "-c", code], env=clean, cwd=ROOT, capture_output=True, text=True, timeout=120
    )
    assert done.stdout.split() == ["False", "True"], done.stderr
