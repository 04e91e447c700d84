"""Several commands write the same output at once, each with its own Ray: one works, the others wait or fail, as set."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from rag_core.corpus.corpus import CorpusConfig, write_corpus
from rag_core.verification.verification import verify
from tests.conftest import MINILM
from tests.stages.test_resume import EMBED, start

pytestmark = [pytest.mark.chaos(short=False), pytest.mark.timeout(600)]

# The stage waits for the test's signal, so that the order does not depend on the speed of the machine.
HELD_EMBED = (EMBED % MINILM).replace(
    "    embed_corpus(",
    """    import time
    import tasks.stages.embed_corpus as stage
    embed_on_ray = stage.embed_on_ray

    def held(*arguments):
        while not Path("../go-on").exists():
            time.sleep(0.1)
        return embed_on_ray(*arguments)

    stage.embed_on_ray = held
    embed_corpus(""",
)
WAIT_SECONDS = 240
HELD = "is being written by another run"


def test_of_flow_runs_at_once_one_makes_the_artifact_one_waits_and_one_fails(tmp_path: Path, prefect_url: str) -> None:
    source = tmp_path / "passages.jsonl"
    rows = [{"id": str(n), "text": f"Place {n} lies {n % 97} km from Lyon."} for n in range(200)]
    source.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    write_corpus([source], tmp_path / "corpus", CorpusConfig(format="jsonl", shard_rows=50))
    out, runs = tmp_path / "out", {}

    def begin(name: str, wait: str) -> None:
        (tmp_path / name).mkdir()
        settings = {"RAG_WAIT_SECONDS": wait, "PREFECT_API_URL": prefect_url}
        runs[name] = start(HELD_EMBED, tmp_path / name, tmp_path / "corpus", out, **settings)

    def saw_other_run(name: str) -> bool:
        return HELD in (tmp_path / name / "log").read_text()

    try:
        begin("first", "500")
        begin("second", "500")
        wait_until(lambda: saw_other_run("first") or saw_other_run("second"), *runs.values())
        begin("impatient", "0")
        assert runs["impatient"].wait(WAIT_SECONDS) != 0
        assert saw_other_run("impatient")
        (tmp_path / "go-on").touch()
        assert [runs[name].wait(WAIT_SECONDS) for name in ("first", "second")] == [0, 0]
        assert sorted((saw_other_run("first"), saw_other_run("second"))) == [False, True]
    finally:
        for process in runs.values():
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
    assert verify(out).findings == []
    assert sorted(path.name for path in tmp_path.glob(".out*")) == [".out.mlflow-run"]


def wait_until(condition: Callable[[], bool], *processes: subprocess.Popen[bytes]) -> None:
    end = time.monotonic() + WAIT_SECONDS
    while not condition():
        assert all(process.poll() is None for process in processes)
        assert time.monotonic() < end
        time.sleep(0.1)
