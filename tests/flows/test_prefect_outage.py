"""If Prefect's server is lost in the middle of a flow, the stage still finishes, and a second run skips it."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from rag_core.storage.artifact import open_artifact
from tests.conftest import _wait_until_healthy
from tests.support.servers.processes import environment_in, free_port

SECONDS = 280

pytestmark = pytest.mark.timeout(900)

# Two stages, and between them a task that writes the file "waiting" and waits until the test deletes it.
TWO_STAGES = """
import os, sys, time
from pathlib import Path
from flows.cli import main, prefect_server

def two_stages():
    from prefect import flow, task
    from flows.stages.make_corpus import make_corpus
    from rag_core.corpus.corpus import CorpusConfig

    @task
    def wait():
        Path("waiting").touch()
        while Path("waiting").exists():
            time.sleep(0.1)

    @flow
    def first():
        result = make_corpus([Path("passages.jsonl")], Path("first"), CorpusConfig(format="jsonl"))
        wait()
        return result

    @flow
    def both():
        results = [first(), make_corpus([Path("passages.jsonl")], Path("second"), CorpusConfig(format="jsonl"))]
        print("skipped:", [result.skipped for result in results], flush=True)

    both()

main.app.command(name="two-stages")(prefect_server.with_services(two_stages, ray=False))
sys.argv = ["rag", "two-stages"]
main.run()
"""


def start(folder: Path, **environment: str) -> subprocess.Popen[bytes]:
    with (folder / "log").open("ab") as log:
        return subprocess.Popen(
            [sys.executable, "-c", TWO_STAGES],
            cwd=folder,
            env=environment_in(folder, **environment),
            stdout=log,
            stderr=log,
        )


def write_passages(folder: Path) -> None:
    rows = [json.dumps({"id": str(number), "text": f"Passage {number}."}) for number in range(10)]
    (folder / "passages.jsonl").write_text("\n".join(rows) + "\n")


def wait_for(file: Path, process: subprocess.Popen[bytes]) -> None:
    end = time.monotonic() + SECONDS
    while not file.exists():
        assert process.poll() is None, (file.parent / "log").read_text()
        assert time.monotonic() < end
        time.sleep(0.1)


@pytest.mark.filterwarnings("ignore:Artifact creation outside of a flow")
def test_a_summary_that_prefect_does_not_take_is_kept_in_a_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from prefect.settings import PREFECT_API_URL, temporary_settings

    from tasks.stage import publish_table

    monkeypatch.setenv("RAG_MLFLOW_UNSENT", str(tmp_path))
    with temporary_settings({PREFECT_API_URL: f"http://127.0.0.1:{free_port()}/api"}):
        publish_table("embed-corpus", {"passages": "10"})
    (page,) = tmp_path.iterdir()
    assert "| passages | 10 |" in page.read_text()
    shown = capsys.readouterr().err
    assert "Prefect's server does not answer" in shown
    assert str(page) in shown


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux lets a bound port be bound again")
def test_a_reserved_port_is_bound_by_no_other_process_before_the_server_listens() -> None:
    from flows.cli.prefect_server import _reserve_port

    port, holder = _reserve_port()
    with holder, socket.socket() as stranger, socket.create_server(("127.0.0.1", port)) as server:
        with pytest.raises(OSError, match="in use"):
            stranger.bind(("127.0.0.1", port))
        server.close()
        with pytest.raises(ConnectionRefusedError):
            socket.create_connection(("127.0.0.1", port))
        with pytest.raises(OSError, match="in use"):
            stranger.bind(("127.0.0.1", port))
        socket.create_server(("127.0.0.1", port)).close()  # the server's replacement


@pytest.mark.chaos(short=False)
def test_a_lost_temporary_server_is_replaced_and_the_flow_goes_on(tmp_path: Path) -> None:
    write_passages(tmp_path)
    process = start(tmp_path)
    wait_for(tmp_path / "waiting", process)
    children = psutil.Process(process.pid).children()
    (server,) = [child for child in children if "uvicorn" in " ".join(child.cmdline())]
    server.send_signal(signal.SIGKILL)
    (tmp_path / "waiting").unlink()
    assert process.wait(SECONDS) == 0, (tmp_path / "log").read_text()
    assert "skipped: [False, False]" in (tmp_path / "log").read_text()
    for name in ("first", "second"):
        assert open_artifact(tmp_path / name, "corpus").counts["passages"] == 10


@pytest.mark.chaos(short=False)
def test_a_server_that_is_lost_for_good_ends_the_flow_with_a_paragraph_and_costs_no_finished_stage(
    tmp_path: Path,
) -> None:
    write_passages(tmp_path)
    port = free_port()
    url = f"http://127.0.0.1:{port}/api"
    command = [sys.executable, "-m", "prefect", "server", "start", "--host", "127.0.0.1", "--port", str(port)]
    with (tmp_path / "server.log").open("w") as log:
        environment = os.environ | {"PREFECT_HOME": str(tmp_path / "server")}
        server = subprocess.Popen(command, env=environment, stdout=log, stderr=log, start_new_session=True)
    _wait_until_healthy(f"{url}/health", server)
    # Prefect's clients retry for a minute by default; here for a few seconds.
    process = start(tmp_path, PREFECT_API_URL=url, PREFECT_CLIENT_MAX_RETRIES="1")
    wait_for(tmp_path / "waiting", process)
    os.killpg(server.pid, signal.SIGKILL)
    server.wait()
    (tmp_path / "waiting").unlink()
    assert process.wait(SECONDS) == 2, (tmp_path / "log").read_text()
    log = " ".join((tmp_path / "log").read_text().split())
    assert f"Error: Prefect's server at {url} does not answer any more" in log
    assert "run the same command to continue" in log
    assert open_artifact(tmp_path / "first", "corpus").counts["passages"] == 10
    assert not (tmp_path / "second").exists()
    again = start(tmp_path)
    wait_for(tmp_path / "waiting", again)
    (tmp_path / "waiting").unlink()
    assert again.wait(SECONDS) == 0, (tmp_path / "log").read_text()
    assert "skipped: [True, False]" in (tmp_path / "log").read_text()
