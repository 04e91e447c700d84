"""A stage killed with signal 9 resumes where it stopped; its output equals that of an undisturbed run, row for row."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pyarrow.parquet as pq
import pytest

from rag_core.corpus.corpus import CorpusConfig, write_corpus
from rag_core.errors import ArtifactError
from rag_core.storage.artifact import open_artifact, publish
from tests.conftest import MINILM
from tests.support.servers.processes import environment_in, processes_below
from tests.support.small_corpus import QUESTIONS, make_encoder, make_generator, make_index, model_config

WAIT_SECONDS = 240

EMBED = """
def work(corpus, out):
    from flows.stages.embed_corpus import embed_corpus
    from rag_core.embeddings.embeddings import EmbedConfig
    embed_corpus(Path(corpus), Path(out), EmbedConfig(encoder=%r, precision="float32"))
"""
INFER = """
def work(model, index, questions, out):
    from flows.stages.batch_infer import batch_infer
    from rag_core.model.reader import DecodingConfig
    from tasks.on_ray.answering import InferConfig
    decoding = DecodingConfig(num_beams=2, max_new_tokens=6, num_return_sequences=1, precision="float32", batch_size=4)
    config = InferConfig(variant="token", decoding=decoding, shard_questions=16)
    batch_infer(Path(model), Path(index), Path(questions), Path(out), config)
"""
MAIN = """
import sys
from pathlib import Path
from flows.cli.prefect_server import with_services
%s
with_services(work, ray=True)(*sys.argv[1:])
"""


def start(work: str, folder: Path, *arguments: object, **environment: str) -> subprocess.Popen[bytes]:
    """Start `work` in its own process group, as a terminal does; `environment` may name servers to use."""
    command = [sys.executable, "-c", MAIN % work, *map(str, arguments)]
    with (folder / "log").open("ab") as log:
        return subprocess.Popen(
            command,
            cwd=folder,
            env=environment_in(folder, **environment),
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )


def finish(work: str, folder: Path, *arguments: object) -> str:
    """Run `work` to its end; return what it added to the log."""
    before = (folder / "log").stat().st_size if (folder / "log").exists() else 0
    assert start(work, folder, *arguments).wait(2 * WAIT_SECONDS) == 0, (folder / "log").read_text()
    return (folder / "log").read_bytes()[before:].decode()


def kill_when_finished(parts: int, out: Path, pattern: str, process: subprocess.Popen[bytes]) -> None:
    """Send SIGKILL to the whole process group as soon as this many parts of `out` are finished."""
    end = time.monotonic() + WAIT_SECONDS
    while len(draft_files(out, pattern)) < parts:
        assert process.poll() is None, "it ended before it could be killed"
        assert time.monotonic() < end, "it did not get that far"
        time.sleep(0.01)
    # Ray's workers have their own process groups, and end when they notice that their driver is gone.
    workers = processes_below(process.pid, lambda name: "Worker" in name)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    _, alive = psutil.wait_procs(workers, timeout=WAIT_SECONDS)
    assert not alive


def draft_files(out: Path, pattern: str) -> dict[str, int]:
    """Finished parts of an unfinished artifact, and when each was written."""
    drafts = list(out.parent.glob(f".{out.name}.draft-*"))
    return {file.name: file.stat().st_mtime_ns for draft in drafts for file in draft.rglob(pattern)}


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_embedding_goes_on_after_its_process_group_was_killed_twice(tmp_path: Path) -> None:
    source = tmp_path / "passages.jsonl"
    rows = [
        {"id": str(n), "title": f"Place {n}", "text": f"Place {n} lies {n % 97} km from Lyon. " * 3}
        for n in range(1500)
    ]
    source.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    write_corpus([source], tmp_path / "corpus", CorpusConfig(format="jsonl", shard_rows=50))
    work, out = EMBED % MINILM, tmp_path / "out"
    for parts in (4, 12):
        kill_when_finished(parts, out, "emb*.parquet", start(work, tmp_path, tmp_path / "corpus", out))
        assert not out.exists()
    finished = draft_files(out, "emb*.parquet")
    log = finish(work, tmp_path, tmp_path / "corpus", out)
    assert f"an earlier run finished {50 * len(finished)} of 1500" in log
    assert {name: (out / name).stat().st_mtime_ns for name in finished} == finished, (
        "finished shards are not made again"
    )
    finish(work, tmp_path, tmp_path / "corpus", tmp_path / "undisturbed")
    names = sorted(file.name for file in out.glob("*.parquet"))
    assert len(names) == 30
    for name in names:
        assert pq.read_table(out / name).equals(pq.read_table(tmp_path / "undisturbed" / name))
    assert not list(tmp_path.glob(".out.*draft*")) + list(out.glob(".unfinished*"))
    assert open_artifact(out, "embeddings").counts == {"passages": 1500}


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_answering_goes_on_after_its_process_group_was_killed(tmp_path: Path) -> None:
    from rag_core.model.rag_model import RagModel

    encoder = make_encoder(tmp_path / "encoder")
    model = RagModel.from_parts(model_config(encoder, make_generator(tmp_path / "generator", encoder)))
    model.save_pretrained(tmp_path / "model")
    make_index(tmp_path, encoder)
    questions = tmp_path / "questions.jsonl"
    rows = [{"id": str(n), "question": QUESTIONS[n % len(QUESTIONS)][0]} for n in range(1600)]
    questions.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    out, parts = tmp_path / "out", "part*.jsonl"
    arguments = tmp_path / "model", tmp_path / "index", questions
    kill_when_finished(10, out, parts, start(INFER, tmp_path, *arguments, out))
    finished = draft_files(out, parts)
    log = finish(INFER, tmp_path, *arguments, out)
    assert f"an earlier run finished {16 * len(finished)} of 1600" in log
    finish(INFER, tmp_path, *arguments, tmp_path / "undisturbed")
    for name in ("predictions.jsonl", "predictions.parquet"):
        assert (out / name).read_bytes() == (tmp_path / "undisturbed" / name).read_bytes()
    ours, theirs = (open_artifact(folder, "predictions").counts for folder in (out, tmp_path / "undisturbed"))
    assert ours == theirs
    assert ours["questions"] == 1600


def test_only_one_run_writes_at_a_place_and_the_other_is_told_who_does(tmp_path: Path) -> None:
    with publish(tmp_path / "out", "thing") as draft:
        (draft.folder / "data.txt").write_text("first")
        with (
            pytest.raises(ArtifactError, match=rf"being written by another run \(process {os.getpid()} on .*since 2"),
            publish(tmp_path / "out", "thing"),
        ):
            pass
    assert (tmp_path / "out" / "data.txt").read_text() == "first"
    assert [file.name for file in tmp_path.iterdir()] == ["out"], "the lock is gone with the run"


def test_unfinished_work_is_kept_for_the_same_work_only(tmp_path: Path) -> None:
    def stopped(config: dict[str, int]) -> list[str]:
        resumed: list[str] = []
        stopping = contextlib.suppress(KeyboardInterrupt)
        with stopping, publish(tmp_path / "out", "thing", config=config, resume=True) as draft:
            resumed += sorted(file.name for file in draft.folder.iterdir())
            (draft.folder / f"part-{len(resumed)}").write_text("x")
            (draft.folder / ".unfinished-1").write_text("half")
            raise KeyboardInterrupt
        return resumed

    assert [stopped({"seed": 1}) for _ in range(3)] == [[], ["part-0"], ["part-0", "part-1"]]
    assert stopped({"seed": 2}) == []
    assert stopped({"seed": 1}) == [], "the draft of other settings was deleted"


def test_what_a_killed_worker_left_half_written_is_not_published(tmp_path: Path) -> None:
    with publish(tmp_path / "out", "thing", resume=True) as draft:
        (draft.folder / "part-0").write_text("whole")
        (draft.folder / ".unfinished-1").write_text("half")
    assert list(open_artifact(tmp_path / "out", "thing").files) == ["part-0"]
    assert sorted(file.name for file in (tmp_path / "out").iterdir()) == ["manifest.json", "part-0"]


def test_an_artifact_moved_aside_by_a_killed_run_comes_back(tmp_path: Path) -> None:
    with publish(tmp_path / "out", "thing") as draft:
        (draft.folder / "data.txt").write_text("first")
    (tmp_path / "out").rename(tmp_path / ".out.old-1234")
    with pytest.raises(RuntimeError, match="stop"), publish(tmp_path / "out", "thing"):
        raise RuntimeError("stop")
    assert (tmp_path / "out" / "data.txt").read_text() == "first"
    assert open_artifact(tmp_path / "out", "thing")
