"""Strangers are kept out, and secrets in: every port on loopback, Ray asks for its token, no secret on disk or screen,
and nobody outside this machine is contacted.

Two commands, embedding and training by two workers, are run as a user would run them, with their own Prefect server and
Ray, secrets in their environment; while they run the ports and peers of all their processes are listed, each Python process
notes whom it contacts (tests/contacts/), and after it everything that they wrote is searched. (A password in MLFLOW_TRACKING_URI is followed in tests/tracking/test_mlflow_outage.py. The cluster that is
asked for a token is that of the fixture `services`.)
"""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from ipaddress import ip_address
from pathlib import Path

import psutil
import pytest
import yaml

from rag_core.network.usage_reports import OFF
from tests.support.servers.processes import content_of, environment_in, kill_tree
from tests.support.small_corpus import (
    make_encoder,
    make_generator,
    make_index,
    model_config,
    optimizer,
    write_questions_jsonl,
)

ROOT = Path(__file__).resolve().parents[2]
CANARY = "canary-4f1d9c"
SECRETS = (
    "AWS_SECRET_ACCESS_KEY",
    "AWS_SESSION_TOKEN",
    "HF_TOKEN",
    "MLFLOW_TRACKING_PASSWORD",
    "MLFLOW_TRACKING_TOKEN",
    "PREFECT_API_KEY",
    "WANDB_API_KEY",
)
MARKS_OF_TESTS = ("PYTEST", "CI", "GITHUB_", "BUILD", "JENKINS", "TF_BUILD", "TEAMCITY")
SECONDS = 280

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]


@dataclass
class Commands:
    """What two commands left: the folders that they wrote to, and the addresses that their processes listened on.

    `peers` are the machines that they were seen connected to, `contacts` the lines of tests/contacts/.
    """

    folders: list[Path]
    embed_ports: set[tuple[str, str]]
    train_ports: set[tuple[str, str]]
    peers: set[tuple[str, str]]
    contacts: list[str]


@pytest.fixture(scope="module")
def commands(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Commands]:
    home = tmp_path_factory.mktemp("secrets")
    encoder = make_encoder(home / "encoder")
    make_index(home, encoder)
    write_questions_jsonl(home / "questions.jsonl")
    model = model_config(encoder, make_generator(home / "generator", encoder))
    settings = {"model": model.model_dump(mode="json"), "train": {"optimizer": optimizer(4).model_dump(mode="json")}}
    (home / "run.yaml").write_text(yaml.safe_dump(settings))
    # The path of Ray's sockets must be short.
    ray_folder = Path(tempfile.mkdtemp(dir="/tmp"))
    embed = "embed", "--corpus", "corpus", "--encoder", str(encoder), "--out", "out"
    train = "train", "--variant", "token", "--config", "run.yaml", "--index", "index", "--out", "trained"
    train += "--questions", "questions.jsonl", "--dev", "questions.jsonl", "--num-workers", "2"
    peers: set[tuple[str, str]] = set()
    ports = [ports_of(home, ray_folder, arguments, peers) for arguments in (embed, train)]
    contacts = (home / "contacts").read_text().splitlines()
    yield Commands([home, ray_folder], *ports, peers, contacts)
    shutil.rmtree(ray_folder, ignore_errors=True)


def ports_of(
    home: Path, ray_folder: Path, arguments: Sequence[str], peers: set[tuple[str, str]]
) -> set[tuple[str, str]]:
    """Run a command in `home` to its end; name and address of every port on which its processes listened meanwhile.

    Those that they were connected to are added to `peers`.
    """
    noting = {"PYTHONPATH": f"{ROOT}/tests/contacts:{ROOT}", "RAG_TEST_CONTACTS": str(home / "contacts")}
    secrets = {name: f"{CANARY}-{name}" for name in SECRETS}
    environment = environment_in(home, RAY_TMPDIR=str(ray_folder), **secrets, **noting)
    # As on a user's machine: MLflow and Prefect report nothing from a test or a CI machine anyway.
    for name in [name for name in environment if name in OFF or name.startswith(MARKS_OF_TESTS)]:
        del environment[name]
    with (home / f"screen-{arguments[0]}").open("wb") as screen:
        process = subprocess.Popen(
            [sys.executable, "-m", "flows.cli.main", *arguments],
            cwd=home,
            env=environment,
            stdout=screen,
            stderr=subprocess.STDOUT,
        )
    ports: set[tuple[str, str]] = set()
    end = time.monotonic() + SECONDS
    try:
        while process.poll() is None:
            assert time.monotonic() < end, Path(screen.name).read_text()
            listening, connected = addresses_of(process.pid)
            ports |= listening
            peers |= connected
            time.sleep(0.2)
    finally:
        kill_tree(process)
    assert process.returncode == 0, Path(screen.name).read_text()
    return ports


def addresses_of(pid: int) -> tuple[set[tuple[str, str]], set[tuple[str, str]]]:
    """Names of the process and its descendants, with the addresses they listen on, and with those they are connected to."""
    found, peers = set[tuple[str, str]](), set[tuple[str, str]]()
    try:
        tree = [psutil.Process(pid), *psutil.Process(pid).children(recursive=True)]
    except psutil.NoSuchProcess:
        return found, peers
    for process in tree:
        try:
            name = f"{process.name()} {' '.join(process.cmdline()[:5])}"
            connections = process.net_connections(kind="inet")
        except (psutil.NoSuchProcess, psutil.AccessDenied):
            continue
        found |= {(name, one.laddr.ip) for one in connections if one.status == psutil.CONN_LISTEN}
        peers |= {(name, one.raddr.ip) for one in connections if one.raddr and one.type == socket.SOCK_STREAM}
    return found, peers


def is_loopback(address: str) -> bool:
    parsed = ip_address(address)
    return (getattr(parsed, "ipv4_mapped", None) or parsed).is_loopback


def holds_canary(folder: Path) -> list[str]:
    """Files with the canary in their name or content."""
    files = [path for path in folder.rglob("*") if path.is_file() and not path.is_symlink()]
    return [str(file) for file in files if CANARY in file.name or CANARY.encode() in content_of(file)]


def test_every_port_of_a_command_is_on_loopback(commands: Commands) -> None:
    servers = "uvicorn", "gcs_server", "raylet", "ray::"
    for ports, expected in ((commands.embed_ports, servers), (commands.train_ports, (*servers, "ray::RayTrainWorker"))):
        names = " ".join(name for name, _ in ports)
        for server in expected:
            assert server in names, f"{server} was not seen listening: {names}"
        assert [port for port in ports if not is_loopback(port[1])] == []


def test_a_command_contacts_nobody_outside_this_machine(commands: Commands) -> None:
    names = " ".join(name for name, _ in commands.peers)
    for process in ("raylet", "gcs_server", "uvicorn", "ray::"):
        assert process in names, f"{process} was not seen connected: {names}"
    assert [peer for peer in commands.peers if not is_loopback(peer[1])] == []
    assert any("flows.cli.main" in line for line in commands.contacts), "nothing was noted"
    assert [line for line in commands.contacts if not stays_here(line.split()[2])] == []


def stays_here(host: str) -> bool:
    """Whether a name or address that was looked up or connected to is this machine's."""
    if host in ("None", "", "localhost", "0.0.0.0", "::", socket.gethostname(), socket.getfqdn()):
        return True
    try:
        return is_loopback(host)
    except ValueError:  # a name
        return False


def test_no_secret_of_the_environment_is_written_anywhere(commands: Commands) -> None:
    home, ray_folder = commands.folders
    assert (home / "out" / "manifest.json").is_file()
    assert (home / "trained" / "manifest.json").is_file()
    assert (home / "mlflow.db").is_file()
    assert list(home.glob("mlruns/**/MLmodel")), "the registered model is elsewhere"
    assert list((home / "prefect").glob("*.db"))
    assert list(ray_folder.rglob("raylet*.out")), "Ray's logs are elsewhere"
    assert [file for folder in commands.folders for file in holds_canary(folder)] == []


def test_ray_refuses_a_client_without_the_token(services: Path) -> None:
    import ray

    code = "import sys; from ray._raylet import GcsClient; GcsClient(address=sys.argv[1])"
    address = ray.get_runtime_context().gcs_address
    assert is_loopback(address.rpartition(":")[0])
    wrong: list[dict[str, str]] = [
        {"RAY_AUTH_MODE": "disabled"},
        {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": "w" * 64},
    ]
    for token in wrong:
        arguments = [sys.executable, "-c", code, address]
        done = subprocess.run(arguments, env=os.environ | token, capture_output=True, text=True, timeout=240)
        assert "AuthenticationError" in done.stderr, done.stderr
    with_token = subprocess.run([sys.executable, "-c", code, address], capture_output=True, text=True, timeout=240)
    assert with_token.returncode == 0, with_token.stderr


def test_of_commands_that_start_at_once_on_a_new_machine_one_makes_the_token_for_all(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from tasks.on_ray import runtime as ray_runtime

    monkeypatch.delenv("RAY_AUTH_MODE", raising=False)
    for number in range(20):
        home = tmp_path / str(number)
        monkeypatch.setenv("HOME", str(home))
        at_once = threading.Barrier(8)

        def start(home: Path = home, at_once: threading.Barrier = at_once) -> str:
            at_once.wait()
            ray_runtime._make_token_once()
            return (home / ".ray" / "auth_token").read_text()

        with ThreadPoolExecutor(8) as pool:
            tokens = list(pool.map(lambda start: start(), [start] * 8))
        assert len(set(tokens)) == 1
        assert len(tokens[0]) >= 32
        assert [file.name for file in (home / ".ray").iterdir()] == ["auth_token"]
        assert (home / ".ray" / "auth_token").stat().st_mode & 0o077 == 0


def test_addresses_are_shown_without_their_password(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from flows.cli import printing
    from flows.cli.commands import doctor
    from rag_core.network.addresses import without_credentials

    for name in ("MLFLOW_TRACKING_URI", "PREFECT_API_URL"):
        monkeypatch.setenv(name, f"https://rag:{CANARY}@servers.example/api")
    printing.print_pages()
    doctor.examine()
    shown = capsys.readouterr().out
    assert "servers.example" in shown
    assert CANARY not in shown
    for kept in ("sqlite:////tmp/a@b/mlflow.db", "http://127.0.0.1:5000", "mlruns", "file:///x"):
        assert without_credentials(kept) == kept
    assert without_credentials("postgresql://u:p@host:5432/mlflow") == "postgresql://host:5432/mlflow"


def test_containers_publish_their_ports_to_this_machine_only() -> None:
    services = yaml.safe_load((ROOT / "infra" / "compose.yaml").read_text())["services"]
    ports = [port for service in services.values() for port in service.get("ports", [])]
    assert ports
    assert all(port.startswith("127.0.0.1:") for port in ports)


def test_the_servers_of_the_makefile_listen_on_loopback() -> None:
    lines = [
        line for line in (ROOT / "Makefile").read_text().splitlines() if "mlflow ui" in line or "server start" in line
    ]
    assert len(lines) == 2
    assert all("--host 127.0.0.1" in line for line in lines)
