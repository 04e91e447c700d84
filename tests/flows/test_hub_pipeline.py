"""The paper's configuration as a user runs it, against a stand-in for the hub; only files, sizes and steps differ.

The tests run the command `rag pipeline --config` in its own environment. Requests that go neither to the hub
nor to this machine go to a proxy, which records the addresses, so that no other contact stays unnoticed.
"""

from __future__ import annotations

import json
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.support.models.hub_models import BART, CONTEXT_ENCODER, QUESTION_ENCODER, RAG_TOKEN, Files, poisoned
from tests.support.servers.hub_server import HubServer
from tests.support.servers.processes import environment_in
from tests.support.small_corpus import FACTS, write_questions_jsonl

pytest_plugins = ["tests.support.hub_fixtures"]
pytestmark = [pytest.mark.slow, pytest.mark.timeout(400)]
CONFIG = Path(__file__).resolve().parents[2] / "configs" / "nq-bart-large.yaml"
SECONDS = 280


@pytest.fixture
def called() -> Iterator[tuple[str, list[str]]]:
    """A proxy that refuses every request: its own address, and the addresses that were requested."""
    requested: list[str] = []

    class Proxy(BaseHTTPRequestHandler):
        def log_message(self, format: str, *args: Any) -> None:
            """Say nothing."""

        def _refuse(self) -> None:
            requested.append(self.path)
            self.send_error(502)

        do_CONNECT = do_GET = do_POST = do_HEAD = do_PUT = _refuse

    server = ThreadingHTTPServer(("127.0.0.1", 0), Proxy)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_address[1]}", requested
    server.shutdown()
    server.server_close()


def run_rag(home: Path, hub: HubServer, proxy: str, *arguments: str) -> str:
    """Run a command of `rag` to its end; return its output."""
    environment = environment_in(
        home,
        HF_ENDPOINT=hub.url,
        HF_HOME=str(home / "hf"),
        HF_HUB_OFFLINE="0",
        HTTP_PROXY=proxy,
        HTTPS_PROXY=proxy,
        NO_PROXY="127.0.0.1,localhost",
    )
    for name in ("HF_TOKEN", "http_proxy", "https_proxy", "no_proxy", "DISABLE_SAFETENSORS_CONVERSION"):
        environment.pop(name, None)
    command = [sys.executable, "-m", "flows.cli.main", *arguments]
    done = subprocess.run(command, cwd=home, env=environment, capture_output=True, text=True, timeout=SECONDS)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


def scaled_down(home: Path) -> dict[str, Any]:
    """The paper's settings with other files, fewer steps and shorter texts; all else is unchanged."""
    (home / "data").mkdir()
    rows = [f"{number}\t{text}\t{title}" for number, (_, title, text) in enumerate(FACTS, 1)]
    (home / "data" / "psgs_w100.tsv").write_text("\n".join(["id\ttext\ttitle", *rows]) + "\n")
    for split in ("train", "dev", "test"):
        write_questions_jsonl(home / "data" / f"nq-{split}.jsonl")
    settings: dict[str, Any] = yaml.safe_load(CONFIG.read_text())
    settings["corpus"]["shard_rows"] = 4
    settings["train"]["optimizer"] |= {
        "steps": 2,
        "batch_size": 2,
        "accumulation": 1,
        "warmup_steps": 1,
        "eval_every": 2,
    }
    settings["train"]["eval_questions"] = 2
    settings["infer"]["decoding"] |= {"num_beams": 2, "max_new_tokens": 4}
    (home / "run.yaml").write_text(yaml.safe_dump(settings))
    return settings


def test_the_papers_configuration_runs_unchanged_with_three_lookups_per_model(
    hub: HubServer, called: tuple[str, list[str]], paper_models: Files, tmp_path: Path
) -> None:
    proxy, contacted = called
    settings = scaled_down(tmp_path)
    names = settings["embed"]["encoder"], settings["model"]["question_encoder"], settings["model"]["generator"]
    assert names == (CONTEXT_ENCODER, QUESTION_ENCODER, BART)
    commits = {name: hub.repositories[name].references["main"] for name in names}
    hub.open_pull_request(BART, {"model.safetensors": poisoned(paper_models[BART], tmp_path / "poison")})
    shown = run_rag(tmp_path, hub, proxy, "pipeline", "--config", "run.yaml", "--out", "runs/nq")

    assert contacted == [], "an address that no setting names was contacted"
    by_model = Counter(name for lookup in hub.lookups() for name in names if f"/{name}" in lookup.path)
    assert len(hub.lookups()) == sum(by_model.values()), "the hub was asked for something else"
    assert max(by_model.values()) <= 3, by_model
    # The driver downloads each file once; workers read it from the cache.
    file_requests = [request for request in hub.requests if request.file]
    downloads = Counter((request.method, request.path) for request in file_requests)
    assert set(downloads.values()) == {1}
    paths = [request.path for request in hub.requests]
    assert [path for path in paths if "refs%2Fpr" in path or "discussions" in path] == []
    assert all(
        commits[name] in request.path for request in file_requests for name in names if f"/{name}/" in request.path
    )
    print(f"requests: {len(hub.requests)}, of which {len(hub.lookups())} for no file: {dict(by_model)}")

    assert f"Note: {BART}@{commits[BART][:12]} has pickled weights (pytorch_model.bin)" in shown
    details = {
        kind: json.loads((tmp_path / "runs" / "nq" / kind / "manifest.json").read_text())["details"]
        for kind in ("embeddings", "rag-sequence", "rag-token")
    }
    assert details["embeddings"]["encoder"] == f"{CONTEXT_ENCODER}@{commits[CONTEXT_ENCODER]}"
    for variant in ("rag-sequence", "rag-token"):
        assert details[variant]["question_encoder"] == f"{QUESTION_ENCODER}@{commits[QUESTION_ENCODER]}"
        assert details[variant]["generator"] == f"{BART}@{commits[BART]}"

    # A second run without a network skips every stage, at the same commits.
    hub.stop()
    shown = run_rag(tmp_path, hub, proxy, "pipeline", "--config", "run.yaml", "--out", "runs/nq")
    assert f"{BART} is taken from the cache, commit {commits[BART]}" in shown
    assert contacted == []


def test_a_rag_checkpoint_of_the_hub_is_imported_as_documented(
    hub: HubServer, called: tuple[str, list[str]], tmp_path: Path
) -> None:
    proxy, contacted = called
    run_rag(tmp_path, hub, proxy, "import-hf", RAG_TOKEN, "imported")
    assert contacted == []
    assert len(hub.lookups()) <= 3
    manifest = json.loads((tmp_path / "imported" / "manifest.json").read_text())
    assert manifest["details"]["hf_rag"] == f"{RAG_TOKEN}@{hub.repositories[RAG_TOKEN].references['main']}"
    refused = f"{RAG_TOKEN}@v9"
    with pytest.raises(AssertionError, match="has no revision 'v9'"):
        run_rag(tmp_path, hub, proxy, "import-hf", refused, "other")
