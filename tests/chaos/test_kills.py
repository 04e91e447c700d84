"""Embedding and inference, killed with SIGKILL at thirty random moments, give the output of an undisturbed run.

A kill hits a Ray worker (the run replaces it and continues), the command itself, or the command's whole process group
(the same command starts again). The moments follow from a seed, shown in failures; `CHAOS_SEED` sets it. Embedding has
its own Prefect server, which is killed with its group; inference uses a server that survives.
"""

from __future__ import annotations

import json
import os
import random
import signal
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from rag_core.corpus.corpus import CorpusConfig, write_corpus
from rag_core.storage.artifact import open_artifact
from tasks.on_ray.workers import REPLACEMENTS
from tests.conftest import MINILM
from tests.stages.test_resume import EMBED, INFER, WAIT_SECONDS, draft_files
from tests.support.prepared import WORK, Command, Prepared
from tests.support.servers.processes import environment_in, processes_below
from tests.support.small_corpus import QUESTIONS, make_encoder, make_generator, make_index, model_config

SMOKE = os.environ.get("CHAOS") == "smoke"
KILLS = {"worker": 1, "command": 1, "group": 1} if SMOKE else {"worker": 9, "command": 3, "group": 3}  # of each stage
EMBEDDED, ANSWERED = (60, 40) if SMOKE else (200, 110)  # shards
SEED = int(os.environ.get("CHAOS_SEED", "20261125"))
# A killed worker loses its unfinished shard; finished shards are never made again.
PARTS_BETWEEN_KILLS = 3


@dataclass
class Killer:
    """Runs one command repeatedly, kills each of `victims`, then lets the command finish."""

    command: Callable[[], Command]
    out: Path
    pattern: str
    chance: random.Random
    killed: Counter[str] = field(default_factory=Counter)
    finished: dict[str, int] = field(default_factory=dict)

    def run(self, victims: list[str]) -> None:
        process, starts_lost = self.command(), 0
        for victim in victims:
            # The command gives up after too many workers that died without finishing a shard.
            at_least = 1 if victim == "worker" and starts_lost == REPLACEMENTS else 0
            parts = self.chance.randint(at_least, PARTS_BETWEEN_KILLS)
            self._wait_for_parts(process, parts)
            time.sleep(self.chance.uniform(0, 0.5))
            if victim == "worker":
                self._kill_worker(process)
                starts_lost += parts == 0
            else:
                self._kill(process, victim)
                process, starts_lost = self.command(), 0
            self.killed[victim] += 1
            self._nothing_finished_was_made_again()
        assert process.wait(5 * WAIT_SECONDS) == 0

    def _wait_for_parts(self, process: Command, parts: int) -> None:
        wanted, end = self._parts() + parts, time.monotonic() + WAIT_SECONDS
        while self._parts() < wanted:
            assert process.poll() is None, f"seed {SEED}: the command ended with {process.returncode}"
            assert time.monotonic() < end, f"seed {SEED}: no further part was finished after {dict(self.killed)}"
            time.sleep(0.02)

    def _parts(self) -> int:
        """Number of finished parts. Polled all the time, so cheaper than `draft_files`."""
        return sum(1 for draft in self.out.parent.glob(f".{self.out.name}.draft-*") for _ in draft.rglob(self.pattern))

    def _kill_worker(self, process: Command) -> None:
        end = time.monotonic() + WAIT_SECONDS
        while time.monotonic() < end:
            for worker in processes_below(process.pid, lambda name: name.startswith("ray::Worker")):
                worker.kill()
                worker.wait(WAIT_SECONDS)
                return
            assert process.poll() is None, f"seed {SEED}: the command ended with {process.returncode}"
            time.sleep(0.05)
        raise AssertionError(f"seed {SEED}: no worker appeared")

    def _kill(self, process: Command, victim: str) -> None:
        started = processes_below(process.pid, lambda name: not name.endswith("Agent"))
        if victim == "group":
            os.killpg(process.pid, signal.SIGKILL)
        else:
            process.send_signal(signal.SIGKILL)
        process.wait()
        # The processes that the command started end by themselves: its server, Ray, and Ray's workers. Ray's agents are
        # left out: they do no work, and notice within a minute that their node is gone.
        _, alive = psutil.wait_procs(started, timeout=WAIT_SECONDS)
        assert not alive, f"seed {SEED}: still there {WAIT_SECONDS} s after the {victim} was killed: {alive}"

    def _nothing_finished_was_made_again(self) -> None:
        published = {file.name: file.stat().st_mtime_ns for file in self.out.glob(self.pattern)}
        now = draft_files(self.out, self.pattern) | published
        assert {name: now.get(name) for name in self.finished} == self.finished, f"seed {SEED}"
        self.finished = now


def victims_of(chance: random.Random) -> list[str]:
    victims = [victim for victim, number in KILLS.items() for _ in range(number)]
    chance.shuffle(victims)
    return victims


@pytest.mark.chaos
def test_embedding_killed_at_random_moments_ends_with_every_row_once(
    tmp_path: Path, figure: Callable[[str], None]
) -> None:
    texts = [f"Place {number} lies {number % 97} km from Lyon." for number in range(10 * EMBEDDED)]
    rows = [{"id": str(number), "title": "Places", "text": text} for number, text in enumerate(texts)]
    source = tmp_path / "passages.jsonl"
    source.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    corpus, out, undisturbed = tmp_path / "corpus", tmp_path / "out", tmp_path / "undisturbed"
    write_corpus([source], corpus, CorpusConfig(format="jsonl", shard_rows=10))
    main, chance = WORK % (EMBED % MINILM), random.Random(SEED)
    with Prepared(main, tmp_path, environment_in(tmp_path)) as commands:
        killer = Killer(lambda: commands.start(corpus, out), out, "emb*.parquet", chance)
        killer.run(victims_of(chance))
        commands.finish(corpus, undisturbed)
    names = sorted(file.name for file in undisturbed.glob("*.parquet"))
    assert sorted(file.name for file in out.glob("*.parquet")) == names
    embedded = pa.concat_tables([pq.read_table(out / name) for name in names])
    assert embedded["id"].to_pylist() == [row["id"] for row in rows], "no row twice, none missing, in order"
    assert embedded.equals(pa.concat_tables([pq.read_table(undisturbed / name) for name in names]))
    assert open_artifact(out, "embeddings").fingerprint == open_artifact(undisturbed, "embeddings").fingerprint
    assert {name: (out / name).stat().st_mtime_ns for name in killer.finished} == killer.finished
    assert killer.killed == KILLS
    figure(f"embedding: killed {dict(killer.killed)}, {len(rows)} rows equal, no finished shard made again")


@pytest.mark.chaos
def test_answering_killed_at_random_moments_ends_with_every_answer_once(
    tmp_path: Path, prefect_url: str, figure: Callable[[str], None]
) -> None:
    from rag_core.model.rag_model import RagModel

    encoder = make_encoder(tmp_path / "encoder")
    model = RagModel.from_parts(model_config(encoder, make_generator(tmp_path / "generator", encoder)))
    model.save_pretrained(tmp_path / "model")
    make_index(tmp_path, encoder)
    questions = tmp_path / "questions.jsonl"
    rows = [{"id": str(n), "question": QUESTIONS[n % len(QUESTIONS)][0]} for n in range(16 * ANSWERED)]
    questions.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    out, undisturbed = tmp_path / "out", tmp_path / "undisturbed"
    arguments, chance = (tmp_path / "model", tmp_path / "index", questions), random.Random(SEED + 1)
    with Prepared(WORK % INFER, tmp_path, environment_in(tmp_path, PREFECT_API_URL=prefect_url)) as commands:
        killer = Killer(lambda: commands.start(*arguments, out), out, "part*.jsonl", chance)
        killer.run(victims_of(chance))
        commands.finish(*arguments, undisturbed)
    for name in ("predictions.jsonl", "predictions.parquet"):
        assert (out / name).read_bytes() == (undisturbed / name).read_bytes()
    answered_ids = [
        json.loads(line)["id"] for line in (out / "predictions.jsonl").read_text(encoding="utf-8").splitlines()
    ]
    assert answered_ids == [row["id"] for row in rows]
    assert open_artifact(out, "predictions").counts == open_artifact(undisturbed, "predictions").counts
    assert killer.killed == KILLS
    figure(f"answering: killed {dict(killer.killed)}, {len(rows)} answers equal, no finished shard made again")
