"""Commands started on the same output, with their own Prefect and Ray, two at the same moment: one works, the others wait or
fail, as they were told."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
from pathlib import Path

import pytest

from rag_core.artefacts.verification import verify
from rag_core.corpus import CorpusConfig, write_corpus
from tests.conftest import MINILM
from tests.test_resume import EMBED, WAIT_SECONDS, start

pytestmark = [pytest.mark.chaos(short=False), pytest.mark.timeout(600)]

# All must have begun before the first ends, however quick or busy the machine is.
SLOW_EMBED = (EMBED % MINILM).replace(
    "    embed_corpus(",
    """    import time
    import tasks.embed_corpus as stage
    at_once = stage.embed_on_ray
    stage.embed_on_ray = lambda *arguments: (time.sleep(30), at_once(*arguments))[1]
    embed_corpus(""",
)


def test_of_flow_runs_at_once_one_makes_the_artefact_one_waits_and_one_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = tmp_path / "passages.jsonl"
    rows = [{"id": str(n), "text": f"Place {n} lies {n % 97} km from Lyon."} for n in range(200)]
    source.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    write_corpus([source], tmp_path / "corpus", CorpusConfig(format="jsonl", shard_rows=50))
    out, runs = tmp_path / "out", {}
    try:
        for name, wait in (("first", "500"), ("second", "500"), ("impatient", "0")):
            monkeypatch.setenv("RAG_WAIT_SECONDS", wait)
            (tmp_path / name).mkdir()
            runs[name] = start(SLOW_EMBED, tmp_path / name, tmp_path / "corpus", out)
            if name == "second":  # who does not wait must not be the first
                wait_for(tmp_path / ".out.lock", runs["first"], runs["second"])
        codes = {name: one.wait(2 * WAIT_SECONDS) for name, one in runs.items()}
    finally:
        for one in runs.values():
            if one.poll() is None:
                os.killpg(one.pid, signal.SIGKILL)
    logs = {name: (tmp_path / name / "log").read_text() for name in runs}
    told = {name: "is being written by another run" in log for name, log in logs.items()}
    assert sorted(told[name] for name in ("first", "second")) == [False, True], logs
    assert told["impatient"], logs
    assert (codes["first"], codes["second"]) == (0, 0), logs
    assert codes["impatient"] != 0, logs
    assert verify(out).findings == []
    assert sorted(path.name for path in tmp_path.glob(".out*")) == [".out.mlflow-run"]


def wait_for(file: Path, *processes: subprocess.Popen[bytes]) -> None:
    end = time.monotonic() + WAIT_SECONDS
    while not file.exists():
        assert all(process.poll() is None for process in processes)
        assert time.monotonic() < end
        time.sleep(0.05)
