"""Workers on Ray load the commit that the driver chose, with the driver's token, which is written nowhere."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import ray
from huggingface_hub import constants

from flows.stages.embed_corpus import embed_corpus
from rag_core.corpus.corpus import CorpusConfig, write_corpus
from rag_core.embeddings.embeddings import EmbedConfig, Embeddings
from rag_core.pretrained.hub.access import HubAccess, hub_access
from rag_core.storage.artifact import manifest_at
from tests.support.models.hub_models import CONTEXT_ENCODER, Files, dpr_files
from tests.support.servers.hub_server import HubServer
from tests.support.small_corpus import write_passages_jsonl

# Workers do not have the tests among their modules.
ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])

pytest_plugins = ["tests.support.hub_fixtures"]
CANARY = "canary-token-5d20e7"


def environment_of_worker(names: list[str]) -> dict[str, str | None]:
    return {name: os.environ.get(name) for name in names}


def set_cache(folder: str, offline: bool) -> tuple[str, bool]:
    """In the worker: use another cache; return the former one."""
    before = constants.HF_HUB_CACHE, constants.HF_HUB_OFFLINE
    constants.HF_HUB_CACHE, constants.HF_HUB_OFFLINE = folder, offline
    return before


@pytest.fixture
def worker_with_empty_cache(services: Path, tmp_path: Path) -> Iterator[None]:
    """A worker with an empty cache, as on another machine."""
    from tasks.on_ray.runtime import share_of_cluster
    from tasks.on_ray.workers import run_on_worker

    before = run_on_worker(share_of_cluster(), set_cache, str(tmp_path / "worker-cache"), False)
    yield
    run_on_worker(share_of_cluster(), set_cache, *before)


def test_the_token_reaches_workers_and_is_in_no_file(
    services: Path, hub: HubServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    from ray._private.worker import _global_node

    from tasks.on_ray.runtime import progress, share_of_cluster
    from tasks.on_ray.workers import run_on_worker

    # Set after Ray has started, so that no process of Ray's has it in its environment, as on another machine.
    monkeypatch.setenv("HF_TOKEN", CANARY)
    environment = run_on_worker(share_of_cluster(1), environment_of_worker, ["HF_TOKEN", "HF_ENDPOINT"])
    assert environment == {"HF_TOKEN": CANARY, "HF_ENDPOINT": hub.url}
    with progress("training", 1) as meter:
        access = ray.get(meter.hub_access.remote())
    assert access.token == CANARY
    assert CANARY not in repr(access)
    session = Path(_global_node.get_session_dir_path())
    files = [file for file in session.rglob("*") if file.is_file()]
    assert any(file.name.startswith("worker-") for file in files), "Ray's logs are elsewhere"
    assert [file for file in files if CANARY.encode() in file.read_bytes()] == []


def test_a_worker_that_knows_that_no_hub_answers_makes_no_request(hub: HubServer) -> None:
    from rag_core.pretrained.hub import revision
    from rag_core.pretrained.model_source import resolve_model_source

    folder = resolve_model_source(CONTEXT_ENCODER)
    commit = Path(folder).name
    revision.forget()
    hub.requests.clear()
    HubAccess(hub.url, None, "no answer in time").use()
    assert hub_access().silent == "no answer in time"
    assert resolve_model_source(f"{CONTEXT_ENCODER}@{commit}") == folder
    assert resolve_model_source(CONTEXT_ENCODER) == folder
    assert hub.requests == []


def test_workers_load_the_commit_that_the_driver_chose_and_it_is_recorded(
    services: Path,
    hub: HubServer,
    worker_with_empty_cache: None,
    paper_models: Files,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The main branch moves while the stage runs, and the worker has nothing in its cache."""
    from tasks.stages import embed_corpus as stage

    first = hub.repositories[CONTEXT_ENCODER].references["main"]
    other = dpr_files(tmp_path / "other", seed=9)
    embed = stage.embed_on_ray

    def main_moves_first(*arguments: object) -> int:
        hub.publish(CONTEXT_ENCODER, other)
        return embed(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(stage, "embed_on_ray", main_moves_first)
    hub.repositories[CONTEXT_ENCODER].readers = {"good-token"}
    monkeypatch.setenv("HF_TOKEN", "good-token")
    write_corpus([write_passages_jsonl(tmp_path / "p.jsonl")], tmp_path / "corpus", CorpusConfig(format="jsonl"))
    result = embed_corpus(tmp_path / "corpus", tmp_path / "out", EmbedConfig(encoder=CONTEXT_ENCODER))
    details = manifest_at(tmp_path / "out").details
    assert details["encoder"] == f"{CONTEXT_ENCODER}@{first}"

    assert hub.files().count("pytorch_model.bin") == 2, "once by the driver and once by the worker"

    import mlflow
    import numpy as np

    from rag_core.embeddings.text_encoder import TextEncoder, passage_text

    params = mlflow.get_run(result.run_id).data.params
    assert params["encoder"] == f"{CONTEXT_ENCODER}@{first}"
    encoder = TextEncoder.from_pretrained(f"{CONTEXT_ENCODER}@{first}")
    rows = [json.loads(line) for line in (tmp_path / "p.jsonl").read_text().splitlines()]
    expected = encoder.encode([passage_text(row["title"], row["text"], encoder.settings) for row in rows])
    (vectors,) = (vectors for _, vectors in Embeddings.open(tmp_path / "out").iter_vectors())
    np.testing.assert_allclose(vectors, expected, rtol=1e-2, atol=1e-2)

    from typer.testing import CliRunner

    from flows.cli.main import app

    shown = CliRunner().invoke(app, ["verify", str(tmp_path / "out")])
    assert f"encoder: {CONTEXT_ENCODER}@{first}" in shown.output
    # Another commit with the same content does not make the stage run again.
    hub.publish(CONTEXT_ENCODER, paper_models[CONTEXT_ENCODER] | {"README.md": b"new words"})
    from rag_core.pretrained.hub import revision

    revision.forget()
    again = embed_corpus(tmp_path / "corpus", tmp_path / "out", EmbedConfig(encoder=CONTEXT_ENCODER))
    assert again.skipped
