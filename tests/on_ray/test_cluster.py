"""Commands on a Ray cluster of several nodes: a node is lost in the middle of each stage, and no work is lost.

A disturbed and an undisturbed stage on the same cluster must publish equal fingerprints, so equal bytes in every file.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from rag_core.corpus.corpus import CorpusConfig, write_corpus
from rag_core.model.rag_model import RagModel
from rag_core.storage.artifact import open_artifact
from tests.support.prepared import RAG, Command, Prepared
from tests.support.servers.ray_cluster import LocalCluster
from tests.support.small_corpus import FACTS, QUESTIONS, make_encoder, make_generator, model_config, optimizer

pytestmark = pytest.mark.timeout(600)

SMOKE = os.environ.get("CHAOS") == "smoke"
WAIT_SECONDS = 180
PASSAGES, SHARD_ROWS = (24_000, 1_000) if SMOKE else (48_000, 1_000)
NUM_QUESTIONS = 768 if SMOKE else 1_280
SAME = "a node killed, every file the same"
Figure = Callable[[str], None]


class Site:
    """A cluster of two one-processor nodes, a folder with inputs, and commands that run there."""

    def __init__(self, cluster: LocalCluster, folder: Path, prefect_url: str) -> None:
        self.cluster, self.folder = cluster, folder
        self.environment = cluster.environment | {
            "PREFECT_HOME": str(folder / "prefect"),
            "PREFECT_API_URL": prefect_url,
        }
        self._prepared = Prepared(RAG, folder, self.environment)
        encoder = make_encoder(folder / "encoder")
        generator = make_generator(folder / "generator", encoder)
        model = model_config(encoder, generator)
        RagModel.from_parts(model).save_pretrained(folder / "model")
        rows = [
            {"id": str(n), "title": FACTS[n % 9][1], "text": f"{FACTS[n % 9][2]} {n} people of Oslo live in Cork. " * 2}
            for n in range(PASSAGES)
        ]
        write_lines(folder / "passages.jsonl", rows)
        write_corpus(
            [folder / "passages.jsonl"], folder / "corpus", CorpusConfig(format="jsonl", shard_rows=SHARD_ROWS)
        )
        questions = [
            {"id": str(n), "question": QUESTIONS[n % 8][0], "answers": [QUESTIONS[n % 8][1]]}
            for n in range(NUM_QUESTIONS)
        ]
        write_lines(folder / "questions.jsonl", questions)
        write_lines(folder / "dev.jsonl", questions[:8])
        train = {"optimizer": optimizer(120, eval_every=60, log_every=10).model_dump(mode="json")}
        content = {"model": model.model_dump(mode="json"), "train": train}
        (folder / "run.yaml").write_text(yaml.safe_dump(content))

    def __enter__(self) -> Site:
        self._prepared.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        self._prepared.__exit__(*error)

    def start(self, *words: object) -> Command:
        (self.folder / "log").write_bytes(b"")
        return self._prepared.start(*words)

    def refused(self, *words: object, **environment: str) -> str:
        """Run a command in a new process, with these variables added; it must end with exit code 2. Returns stderr."""
        command = [sys.executable, "-m", "flows.cli.main", *map(str, words)]
        environment = self.environment | environment
        done = subprocess.run(
            command, cwd=self.folder, env=environment, capture_output=True, text=True, timeout=WAIT_SECONDS
        )
        assert done.returncode == 2, done.stderr
        return done.stderr

    def finish(self, *words: object, out: str) -> str:
        """Run a command to its end; return the fingerprint of the artifact that it published in `out`."""
        return self.end(self.start(*words, "--out", self.folder / out), out)

    def end(self, process: Command, out: str) -> str:
        assert process.wait(WAIT_SECONDS) == 0, self.log()
        kind = json.loads((self.folder / out / "manifest.json").read_text())["kind"]
        return open_artifact(self.folder / out, kind).fingerprint

    def disturbed(self, *words: object, out: str, when: Callable[[], bool], rejoin: bool = True) -> str:
        """Like `finish`, but kill a node as soon as `when` is true; if `rejoin`, add a new node to the cluster."""
        process = self.start(*words, "--out", self.folder / out)
        end = time.monotonic() + WAIT_SECONDS
        while not when():
            assert process.poll() is None, f"it ended before a node was removed: {self.log()}"
            assert time.monotonic() < end, self.log()
            time.sleep(0.01)
        self.cluster.remove(self.cluster.nodes[0])
        assert process.poll() is None, "it had ended when the node was removed"
        if rejoin:
            self.cluster.add()
        return self.end(process, out)

    def log(self) -> str:
        """The end of the command's output."""
        return (self.folder / "log").read_text()[-6000:]

    def parts_of(self, out: str, pattern: str) -> int:
        """Finished parts of an artifact that is being written."""
        return sum(1 for draft in self.folder.glob(f".{out}.draft-*") for _ in draft.rglob(pattern))


def write_lines(file: Path, rows: list[dict[str, object]]) -> None:
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


@pytest.fixture(scope="module")
def site(prefect_url: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    with LocalCluster(nodes=2) as cluster, Site(cluster, tmp_path_factory.mktemp("site"), prefect_url) as site:
        cluster.wait_for_nodes(2)
        yield site


@pytest.mark.chaos
def test_embedding_finishes_on_the_remaining_node(site: Site, figure: Figure) -> None:
    command = "embed", "--corpus", site.folder / "corpus", "--encoder", site.folder / "encoder"
    undisturbed = site.finish(*command, out="embeddings")
    fingerprint = site.disturbed(
        *command, out="disturbed", when=lambda: site.parts_of("disturbed", "emb*.parquet") >= 2, rejoin=False
    )
    assert fingerprint == undisturbed
    figure(SAME)
    site.cluster.add()


@pytest.mark.chaos(short=False)
def test_an_index_is_built_while_a_node_is_lost(site: Site, figure: Figure) -> None:
    inputs = "--corpus", site.folder / "corpus", "--embeddings", site.folder / "embeddings"
    command = "index", *inputs, "--factory", "IVF256,SQ8"
    undisturbed = site.finish(*command, out="index")
    assert site.disturbed(*command, out="index-2", when=lambda: site.parts_of("index-2", "*") >= 1) == undisturbed
    figure(SAME)


@pytest.mark.chaos(short=False)
def test_training_on_two_nodes_resumes_from_its_checkpoint(site: Site, figure: Figure) -> None:
    files = "--questions", site.folder / "questions.jsonl", "--dev", site.folder / "dev.jsonl"
    command = "train", "--variant", "token", "--config", site.folder / "run.yaml", "--index", site.folder / "index"
    command += *files, "--num-workers", 2
    site.cluster.wait_for_nodes(2)
    undisturbed = site.finish(*command, out="trained")
    site.cluster.wait_for_nodes(2)
    assert site.disturbed(*command, out="trained-2", when=lambda: "train-token: " in site.log()) == undisturbed
    figure(SAME)


@pytest.mark.chaos(short=False)
def test_answering_continues_on_the_remaining_node_and_the_one_that_joins(site: Site, figure: Figure) -> None:
    files = "--questions", site.folder / "questions.jsonl", "--index", site.folder / "index"
    command = "infer", "--model", site.folder / "model", *files, "--variant", "token", "--num-workers", 2
    command += "--num-beams", 2, "--max-new-tokens", 6
    site.cluster.wait_for_nodes(2)
    undisturbed = site.finish(*command, out="answers")
    fingerprint = site.disturbed(*command, out="answers-2", when=lambda: site.parts_of("answers-2", "part*.jsonl") >= 1)
    assert fingerprint == undisturbed
    figure(SAME)


@pytest.mark.chaos(short=False)
def test_a_command_with_another_token_is_refused_with_the_reason(site: Site) -> None:
    wrong = {"RAY_AUTH_TOKEN": "0" * 64}
    error = site.refused("embed", "--corpus", "corpus", "--encoder", "encoder", "--out", "out", **wrong)
    assert f"The Ray cluster at {site.cluster.address} (RAY_ADDRESS) asks for another token than ours" in error


@pytest.mark.chaos(short=False)
def test_without_a_machine_a_stage_waits_for_the_set_time_and_says_what_is_missing(site: Site) -> None:
    for node in list(site.cluster.nodes):
        site.cluster.remove(node)
    site.cluster.wait_for_nodes(0)
    patience = {"RAG_CLUSTER_WAIT_SECONDS": "5"}
    error = site.refused("embed", "--corpus", "corpus", "--encoder", "encoder", "--out", "out", **patience)
    assert "For 5 s no machine of the Ray cluster has had 1 CPU free for a worker; it has 1 machine" in error
