"""Strangers are kept out, and secrets in: every port on loopback, Ray asks for its token, no secret on disk or screen.

One command is run as a user would run it, with its own Prefect server and Ray, secrets in its environment; while it runs
the ports of all its processes are listed, and after it everything that it wrote is searched. (A password in
MLFLOW_TRACKING_URI is followed in tests/test_mlflow_outage.py. The cluster that is asked for a token is that of the
fixture `services`.)
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from ipaddress import ip_address
from pathlib import Path

import psutil
import pytest
import yaml

from rag_core.corpus import CorpusConfig, write_corpus
from tests.small_corpus import make_encoder, write_passages_jsonl

ROOT = Path(__file__).resolve().parents[1]
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
SECONDS = 280

pytestmark = [pytest.mark.slow, pytest.mark.timeout(400)]


@dataclass
class Command:
    """What a command left: the folders that it wrote to, and the ports that its processes listened on."""

    folders: list[Path]
    ports: set[tuple[str, str]]


@pytest.fixture(scope="module")
def command(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Command]:
    home = tmp_path_factory.mktemp("secrets")
    encoder = make_encoder(home / "encoder")
    corpus = write_corpus(
        [write_passages_jsonl(home / "passages.jsonl")], home / "corpus", CorpusConfig(format="jsonl")
    )
    assert corpus.counts["passages"]
    # The path of Ray's sockets must be short.
    ray_folder = Path(tempfile.mkdtemp(dir="/tmp"))
    kept = {
        name: value for name, value in os.environ.items() if not name.startswith(("PREFECT_API", "RAY_", "MLFLOW_"))
    }
    environment = kept | {name: f"{CANARY}-{name}" for name in SECRETS}
    environment |= {"PREFECT_HOME": str(home / "prefect"), "PYTHONPATH": str(ROOT), "RAY_TMPDIR": str(ray_folder)}
    arguments = ["embed", "--corpus", "corpus", "--encoder", str(encoder), "--out", "embeddings"]
    with (home / "screen").open("wb") as screen:
        process = subprocess.Popen(
            [sys.executable, "-m", "flows.cli.main", *arguments],
            cwd=home,
            env=environment,
            stdout=screen,
            stderr=subprocess.STDOUT,
        )
    ports: set[tuple[str, str]] = set()
    end = time.monotonic() + SECONDS
    while process.poll() is None:
        assert time.monotonic() < end, (home / "screen").read_text()
        ports |= listening(process.pid)
        time.sleep(0.2)
    assert process.returncode == 0, (home / "screen").read_text()
    yield Command([home, ray_folder], ports)
    shutil.rmtree(ray_folder, ignore_errors=True)


def listening(pid: int) -> set[tuple[str, str]]:
    """Name and address of every port on which the process and its descendants listen."""
    found = set()
    try:
        tree = [psutil.Process(pid), *psutil.Process(pid).children(recursive=True)]
    except psutil.NoSuchProcess:
        return set()
    for process in tree:
        try:
            name = f"{process.name()} {' '.join(process.cmdline()[:5])}"
            connections = process.net_connections(kind="inet")
        except (psutil.NoSuchProcess, psutil.AccessDenied):
            continue
        found |= {(name, one.laddr.ip) for one in connections if one.status == psutil.CONN_LISTEN}
    return found


def is_loopback(address: str) -> bool:
    parsed = ip_address(address)
    return (getattr(parsed, "ipv4_mapped", None) or parsed).is_loopback


def holds_canary(folder: Path) -> list[str]:
    """Files with the canary in their name or content."""
    files = [path for path in folder.rglob("*") if path.is_file() and not path.is_symlink()]
    return [str(file) for file in files if CANARY in file.name or CANARY.encode() in file.read_bytes()]


def test_every_port_of_a_command_is_on_loopback(command: Command) -> None:
    names = " ".join(name for name, _ in command.ports)
    for server in ("uvicorn", "gcs_server", "raylet", "ray::"):
        assert server in names, f"{server} was not seen listening: {names}"
    assert [port for port in command.ports if not is_loopback(port[1])] == []


def test_no_secret_of_the_environment_is_written_anywhere(command: Command) -> None:
    home, ray_folder = command.folders
    assert (home / "embeddings" / "manifest.json").is_file()
    assert (home / "mlflow.db").is_file()
    assert list((home / "prefect").glob("*.db"))
    assert list(ray_folder.rglob("raylet*.out")), "Ray's logs are elsewhere"
    assert [file for folder in command.folders for file in holds_canary(folder)] == []


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
        done = subprocess.run(arguments, env=os.environ | token, capture_output=True, text=True, timeout=60)
        assert "AuthenticationError" in done.stderr, done.stderr
    with_token = subprocess.run([sys.executable, "-c", code, address], capture_output=True, text=True, timeout=60)
    assert with_token.returncode == 0, with_token.stderr


def test_addresses_are_shown_without_their_password(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from flows.cli import doctor, printing
    from rag_core.addresses import without_credentials

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
