"""Two commands started at the same moment on the same output, with their own Prefect and Ray: one works, one waits."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path

import pytest

from rag_core.artefacts.verification import verify
from rag_core.corpus import CorpusConfig, write_corpus
from tests.conftest import MINILM
from tests.test_resume import EMBED, WAIT_SECONDS, start

pytestmark = [pytest.mark.chaos(short=False), pytest.mark.timeout(600)]

# Both must have begun before the first ends, however quick or busy the machine is.
SLOW_EMBED = (EMBED % MINILM).replace(
    "    embed_corpus(",
    """    import time
    import tasks.embed_corpus as stage
    at_once = stage.embed_on_ray
    stage.embed_on_ray = lambda *arguments: (time.sleep(20), at_once(*arguments))[1]
    embed_corpus(""",
)


@pytest.mark.parametrize("wait", ["500", "0"])
def test_of_two_flow_runs_at_once_one_makes_the_artefact_and_the_other_waits_or_fails(
    wait: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RAG_WAIT_SECONDS", wait)
    source = tmp_path / "passages.jsonl"
    rows = [{"id": str(n), "text": f"Place {n} lies {n % 97} km from Lyon."} for n in range(200)]
    source.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    write_corpus([source], tmp_path / "corpus", CorpusConfig(format="jsonl", shard_rows=50))
    homes, out, both = [tmp_path / "first", tmp_path / "second"], tmp_path / "out", []
    try:
        for home in homes:
            home.mkdir()
            both.append(start(SLOW_EMBED, home, tmp_path / "corpus", out))
        codes = [one.wait(2 * WAIT_SECONDS) for one in both]
    finally:
        for one in both:
            if one.poll() is None:
                os.killpg(one.pid, signal.SIGKILL)
    logs = [(home / "log").read_text() for home in homes]
    held = ["is being written by another run" in log for log in logs]
    assert sorted(held) == [False, True], logs
    assert codes[held.index(False)] == 0
    assert (codes[held.index(True)] == 0) == (wait != "0"), logs
    assert verify(out).findings == []
    assert sorted(path.name for path in tmp_path.glob(".out*")) == [".out.mlflow-run"]
