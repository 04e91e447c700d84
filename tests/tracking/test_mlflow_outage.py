"""An MLflow server is killed while runs write: work continues, and every write reaches it later, once and in order.

One scenario, with a real server process and a real Ray worker (fixture `services`): the server is killed while driver
and worker write; a second run starts and ends without it; the server comes back while the first run continues.
"""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from rag_core.errors import ArtifactError, ConfigError
from tests.support.servers.mlflow_server import MlflowServer
from tests.support.servers.processes import content_of

# A write may wait about a second for a server that does not answer (`PROMPT_SECONDS`), and longer on a busy machine.
# MLflow's own clients retry for minutes.
LONGEST_SECONDS = 20.0
PASSWORD = "canary-8e21"

pytestmark = [pytest.mark.slow, pytest.mark.timeout(400)]


@dataclass
class Scenario:
    """What was written, how long the longest write took, and which messages the user saw."""

    server: MlflowServer
    first: str
    unsent_in_the_middle: list[str]
    written: dict[str, int]
    longest: dict[str, float]
    messages: str
    sync_output: str


def writing_worker(stop: str, address):  # type: ignore[no-untyped-def]
    """Start a Ray worker that writes a curve until the file `stop` exists.

    Its result: the number of points, and the seconds that the slowest write took.
    """
    import ray

    # Defined here, so that the worker need not import this file.
    @ray.remote(num_cpus=0)
    def write() -> tuple[int, float]:
        import os
        import time

        step, longest = 0, 0.0
        while not os.path.exists(stop):
            before = time.monotonic()
            address.log_metrics({"worker": float(step)}, step)
            longest = max(longest, time.monotonic() - before)
            step += 1
            time.sleep(0.02)
        return step, longest

    return write.remote()


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[MlflowServer]:
    """A server that is not started yet; killed in the end in any case."""
    server = MlflowServer(tmp_path_factory.mktemp("mlflow-outage"))
    yield server
    server.kill()


@pytest.fixture(scope="module")
def scenario(services: Path, server: MlflowServer) -> Scenario:
    import ray
    from typer.testing import CliRunner

    from flows.cli.main import app
    from tasks.tracking import runs as tracking

    folder, messages = server.folder, list[str]()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MLFLOW_TRACKING_URI", server.uri.replace("http://", f"http://rag:{PASSWORD}@"))
        patch.setenv("RAG_MLFLOW_UNSENT", str(folder / "unsent"))
        patch.setattr("tasks.notices.say", lambda text, **options: messages.append(text))
        server.start()
        tracking.prepare_store()
        with tracking.open_run("parent") as parent, tracking.open_run("first", parent.run_id) as run:
            stop = folder / "stop"
            worker = writing_worker(str(stop), run.address)
            written, longest = 0, 0.0

            def write(points: int) -> None:
                nonlocal written, longest
                for step in range(written, written + points):
                    before = time.monotonic()
                    run.log_metrics({"driver": float(step)}, step)
                    longest = max(longest, time.monotonic() - before)
                written += points

            write(10)
            server.kill()
            write(300)
            run.log_params({"late": {"seed": 7}})
            run.log_dict({"answer": 42}, "late.json")
            with tracking.open_run("second", parent.run_id) as second:
                second.log_metrics({"recall@1": 0.5})
            shutil.copytree(folder / "unsent", folder / "copy")
            in_the_middle = sorted(file.name for file in (folder / "unsent").glob("*.jsonl"))
            server.start()
            synced = CliRunner().invoke(app, ["sync-mlflow"])
            assert synced.exit_code == 0, synced.exception
            write(20)
            stop.touch()
            by_worker, worker_longest = ray.get(worker, timeout=240)
    return Scenario(
        server,
        run.run_id,
        in_the_middle,
        {"driver": written, "worker": by_worker},
        {"driver": longest, "worker": worker_longest},
        " ".join(messages),
        synced.output,
    )


def client_of(scenario: Scenario) -> Any:
    """A client of the server, which is restarted first if another test has killed it."""
    from mlflow import MlflowClient

    scenario.server.start()
    return MlflowClient(scenario.server.uri)


def test_every_point_arrives_once_and_in_order_from_driver_and_worker(scenario: Scenario) -> None:
    client = client_of(scenario)
    for name, count in scenario.written.items():
        history = client.get_metric_history(scenario.first, name)
        assert [point.step for point in history] == list(range(count))
        assert [point.value for point in history] == [float(step) for step in range(count)]
        times = [point.timestamp for point in history]
        assert times == sorted(times), "points keep the time at which they were written"
    assert not list((scenario.server.folder / "unsent").iterdir())


def test_no_write_holds_up_a_step(scenario: Scenario) -> None:
    assert max(scenario.longest.values()) < LONGEST_SECONDS, scenario.longest


def test_parameters_files_and_the_end_arrive_too_and_a_tag_names_the_outage(scenario: Scenario) -> None:
    client = client_of(scenario)
    run = client.get_run(scenario.first)
    assert run.info.status == "FINISHED"
    assert run.data.params["late.seed"] == "7"
    file = client.download_artifacts(scenario.first, "late.json", str(scenario.server.folder))
    assert json.loads(Path(file).read_text()) == {"answer": 42}
    assert "kept and sent later" in run.data.tags["mlflow_unreachable"]
    assert "does not answer" in scenario.messages
    assert "mlflow-unsent" not in scenario.messages, "the folder is the one that was set"
    assert str(scenario.server.folder / "unsent") in scenario.messages
    assert "rag sync-mlflow" in scenario.messages
    assert "MLflow answers again" in scenario.messages


def test_a_run_that_began_without_the_server_is_made_once_under_its_parent(scenario: Scenario) -> None:
    client = client_of(scenario)
    runs = client.search_runs([client.get_experiment_by_name("rag").experiment_id])
    by_name = {run.info.run_name: run for run in runs}
    # "lost" is another test's.
    assert sorted(run.info.run_name for run in runs if run.info.run_name != "lost") == ["first", "parent", "second"]
    second = by_name["second"]
    assert second.data.tags["mlflow.parentRunId"] == by_name["parent"].info.run_id
    assert second.data.metrics == {"recall_at_1": 0.5}
    assert second.info.status == "FINISHED"
    names = [f"{second.data.tags['local_run_id']}.jsonl", f"{scenario.first}.jsonl"]
    assert set(names) <= set(scenario.unsent_in_the_middle)


def test_the_password_of_the_address_is_written_nowhere(scenario: Scenario) -> None:
    import ray

    logs = Path(ray._private.worker._global_node.get_session_dir_path()) / "logs"
    folders = scenario.server.folder, logs
    files = [file for folder in folders for file in folder.rglob("*") if file.is_file()]
    assert {"server.db", "raylet.out"} <= {file.name for file in files}
    assert [file for file in files if file.parent.name == "copy"], "what was kept in the middle is among them"
    assert [str(file) for file in files if PASSWORD.encode() in content_of(file)] == []
    assert PASSWORD not in scenario.messages + scenario.sync_output


def test_if_the_server_never_comes_back_the_user_is_told_which_file_keeps_the_writes(
    scenario: Scenario, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    from typer.testing import CliRunner

    from flows.cli.main import app
    from tasks.tracking import runs as tracking
    from tasks.tracking.journal import read_journal

    messages: list[str] = []
    monkeypatch.setattr("tasks.notices.say", lambda text, **options: messages.append(text))
    monkeypatch.setenv("RAG_MLFLOW_UNSENT", str(tmp_path))
    monkeypatch.setenv("MLFLOW_TRACKING_URI", scenario.server.uri)
    scenario.server.start()
    tracking.prepare_store()
    with tracking.open_run("lost") as run:
        scenario.server.freeze()
        for step in range(2):
            before = time.monotonic()
            run.log_metrics({"loss": 1.0}, step)
            assert time.monotonic() - before < LONGEST_SECONDS, "a server that hangs does not hold up a step either"
            tracking.pause_of(scenario.server.uri).until = 0.0
        scenario.server.kill()
    file = tmp_path / f"{run.run_id}.jsonl"
    assert f"3 writes of this run have not reached MLflow (MLflow at {scenario.server.uri}" in messages[-1]
    assert str(file) in messages[-1]
    header, entries = read_journal(file)
    assert header["run"] == run.run_id
    assert [entry["do"] for entry in entries] == ["metrics"] * 2 + ["end"]
    assert [entry["step"] for entry in entries[:2]] == [0, 1]
    synced = CliRunner().invoke(app, ["sync-mlflow", str(file)])
    assert isinstance(synced.exception, ArtifactError)
    assert str(file) in str(synced.exception)
    assert file.exists()


def test_a_server_that_is_missing_at_the_start_is_an_error_before_any_work(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from tasks.tracking import runs as tracking
    from tests.support.servers.processes import free_port

    uri = f"http://somebody:secret@127.0.0.1:{free_port()}"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    with pytest.raises(ConfigError, match=r"does not answer \(connection refused\).*No work was started") as raised:
        tracking.prepare_store()
    assert "secret" not in str(raised.value)
    with pytest.raises(ConfigError, match="No work was started"), tracking.open_run("first"):
        pass
