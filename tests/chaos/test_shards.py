"""Sharded retrieval that keeps losing actors and machines: training learns the same weights, and no search fails."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import ray

from rag_core.corpus.corpus import Corpus
from rag_core.embeddings.embeddings import Embeddings
from rag_core.index.passage_index import IndexConfig, build_index
from tasks.on_ray import retriever_shards
from tasks.on_ray.retriever_shards import RetrievalConfig
from tasks.stages.train import TrainConfig
from tests.support.servers.ray_cluster import LocalCluster
from tests.support.small_corpus import (
    make_encoder,
    make_generator,
    make_index,
    model_config,
    optimizer,
    write_questions_jsonl,
)

pytestmark = [pytest.mark.chaos, pytest.mark.timeout(600)]

SMOKE = os.environ.get("CHAOS") == "smoke"

ON_TWO_MACHINES = """
import json, sys, time
from pathlib import Path
import numpy as np
import ray
from rag_core.index.passage_index import PassageIndex
from tasks.on_ray.runtime import ensure_ray
from tasks.on_ray.retriever_shards import RetrievalConfig, retrieval

index = PassageIndex.open(Path(sys.argv[1]))
queries_BD = np.random.default_rng(1).normal(size=(8, index.dim)).astype(np.float32)
expected = index.search(queries_BD, 5)
ensure_ray()

def node_of(actor):
    return ray.get(actor.__ray_call__.remote(lambda self: ray.get_runtime_context().get_node_id()), timeout=60)

def all_nodes(retriever, seconds):
    end = time.monotonic() + seconds
    while True:
        try:
            return [[node_of(actor) for actor in replicas] for replicas in retriever._replicas]
        except (ray.exceptions.RayActorError, ray.exceptions.GetTimeoutError):
            if time.monotonic() > end:
                raise
            time.sleep(0.5)

config = RetrievalConfig(mode="sharded", replicas=2, resources={"retriever": 1})
with retrieval(str(index.path), index.manifest, config) as open_retriever:
    retriever = open_retriever()
    before = all_nodes(retriever, 60)
    print("ready", flush=True)
    answers, longest, end = 0, 0.0, time.monotonic() + float(sys.argv[2])
    while time.monotonic() < end:
        start = time.monotonic()
        candidates = retriever.search(queries_BD, 5)
        longest = max(longest, time.monotonic() - start)
        for name in ("rows_BK", "scores_BK", "vectors_BKD"):
            assert getattr(candidates, name).tobytes() == getattr(expected, name).tobytes()
        answers += 1
    after = all_nodes(retriever, 120)
print(json.dumps({"before": before, "after": after, "answers": answers, "longest": longest}))
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Encoder, generator, and an index of nine facts in two shards."""
    folder = tmp_path_factory.mktemp("shards")
    encoder = make_encoder(folder / "encoder")
    make_generator(folder / "generator", encoder)
    make_index(folder, encoder)
    corpus, embeddings = Corpus.open(folder / "corpus"), Embeddings.open(folder / "embeddings")
    build_index(embeddings, corpus, folder / "sharded", IndexConfig(shards=2))
    return folder


def test_replicas_are_on_different_machines_and_losing_one_loses_no_answer(folder: Path) -> None:
    command = [sys.executable, "-c", ON_TWO_MACHINES, str(folder / "sharded"), "5" if SMOKE else "12"]
    with LocalCluster(nodes=2, resources={"retriever": 4}) as cluster:
        cluster.wait_for_nodes(2)
        with subprocess.Popen(command, env=cluster.environment, stdout=subprocess.PIPE, text=True) as driver:
            assert driver.stdout
            assert driver.stdout.readline() == "ready\n"
            cluster.remove(cluster.nodes[0])
            output = driver.stdout.read()
        assert driver.returncode == 0
    report = json.loads(output.splitlines()[-1])
    assert all(len(set(nodes)) == 2 for nodes in report["before"]), "the replicas of a shard are on two machines"
    assert len({node for nodes in report["after"] for node in nodes}) == 1, "the other machine holds all of them"
    assert report["answers"] > 0


def test_training_with_shards_that_are_killed_again_and_again_learns_the_same_weights(
    services: Path, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from flows.stages.train import train_token

    stop, kills = threading.Event(), 0
    killers: list[threading.Thread] = []
    wait_until_ready = retriever_shards._wait_until_ready

    def wait_then_kill(path: Path, replicas: list[list[Any]], config: RetrievalConfig) -> None:
        wait_until_ready(path, replicas, config)
        rng = np.random.default_rng(0)

        def kill() -> None:
            nonlocal kills
            pause = 0.0
            while not stop.wait(pause):
                pause = 4.0
                victim = replicas[rng.integers(2)][rng.integers(2)]
                try:
                    os.kill(ray.get(victim.process.remote(), timeout=10), signal.SIGKILL)
                    kills += 1
                except (ray.exceptions.RayActorError, ray.exceptions.GetTimeoutError, ProcessLookupError):
                    continue  # it is being replaced

        killers.append(threading.Thread(target=kill))
        killers[0].start()

    monkeypatch.setattr(retriever_shards, "_wait_until_ready", wait_then_kill)
    questions = write_questions_jsonl(tmp_path / "questions.jsonl")
    model = model_config(folder / "encoder", folder / "generator")
    steps = 60 if SMOKE else 120
    local = TrainConfig(optimizer=optimizer(steps, eval_every=steps // 2, log_every=20))
    sharded = local.model_copy(update={"retrieval": RetrievalConfig(mode="sharded", replicas=2)})
    undisturbed = train_token(folder / "sharded", questions, questions, tmp_path / "local", model, local)
    start = time.monotonic()
    try:
        disturbed = train_token(folder / "sharded", questions, questions, tmp_path / "sharded", model, sharded)
    finally:
        stop.set()
        for killer in killers:
            killer.join()
    assert kills > 0, f"no actor was killed in {time.monotonic() - start:.0f} s"
    assert disturbed.fingerprint == undisturbed.fingerprint
    assert disturbed.counts == undisturbed.counts
