"""Commands end with the error of `tasks/environment/` before they do any work; `rag doctor` shows the same error."""

from __future__ import annotations

import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.support.environment_checks import SECRET, of_release
from tests.support.servers.odd_servers import absent
from tests.support.servers.processes import environment_in

pytest_plugins = ["tests.support.environment_fixtures"]
pytestmark = pytest.mark.usefixtures("nothing_set")


def rag(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str]:
    """Run the command line in this process; return the exit code and standard error."""
    from flows.cli.main import run

    monkeypatch.setattr(sys, "argv", ["rag", *map(str, arguments)])
    with pytest.raises(SystemExit) as ended:
        run()
    return int(ended.value.code or 0), " ".join(capsys.readouterr().err.split())


def test_a_wrong_variable_ends_a_command_before_its_work(
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
            code, error = rag(patch, capsys, *command)
            assert (code, error[:6]) == (2, "Error:"), error
            assert words in error
    assert not (tmp_path / "corpus").exists()


@pytest.mark.slow
def test_a_stale_address_of_ray_ends_a_command_within_seconds(tmp_path: Path) -> None:
    # The address is checked before the corpus.
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
    # The promise is 20 s, but on a busy machine the imports alone take long.
    assert time.monotonic() - before < 60


def test_doctor_shows_the_same_errors_and_no_secret(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from flows.cli.commands import doctor

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
