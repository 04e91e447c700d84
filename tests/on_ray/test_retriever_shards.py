"""Shards served by Ray actors answer as a local index does, bit for bit, even while actors are killed; or they fail."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import ray

from rag_core.corpus.corpus import Corpus
from rag_core.embeddings.embeddings import Embeddings
from rag_core.errors import ArtifactError, ConfigError
from rag_core.index.passage_index import IndexConfig, PassageIndex, build_index
from rag_core.index.retriever import Retriever
from rag_core.model.rag_model import RagModel
from rag_core.model.reader import DecodingConfig
from rag_core.questions.questions import read_questions
from rag_core.storage.artifact import manifest_at
from rag_core.training.objectives import EndToEnd, EndToEndRates
from tasks.on_ray import retriever_shards
from tasks.on_ray.answering import InferConfig
from tasks.on_ray.retriever_shards import RetrievalConfig, RetrieverShard, ShardedRetriever, retrieval
from tests.index.test_shards import assert_same
from tests.support.clock import Clock
from tests.support.small_corpus import make_encoder, make_generator, make_index, model_config, write_questions_jsonl

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]

SHARDS = 2


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, PassageIndex]:
    """Encoder, generator, and an index of nine facts in two shards."""
    folder = tmp_path_factory.mktemp("shards")
    encoder = make_encoder(folder / "encoder")
    make_index(folder, encoder)
    corpus, embeddings = Corpus.open(folder / "corpus"), Embeddings.open(folder / "embeddings")
    build_index(embeddings, corpus, folder / "sharded", IndexConfig(shards=SHARDS))
    return encoder, make_generator(folder / "generator", encoder), PassageIndex.open(folder / "sharded")


@contextmanager
def served(index: PassageIndex, **settings: object) -> Iterator[ShardedRetriever]:
    """Serve the index from actors; yield the client that a worker gets."""
    config = RetrievalConfig.model_validate({"mode": "sharded", **settings})
    with retrieval(str(index.path), index.manifest, config) as open_retriever:
        retriever = open_retriever()
        assert isinstance(retriever, ShardedRetriever)
        yield retriever


@pytest.fixture(scope="module")
def two_replicas(services: Path, parts: tuple[Path, Path, PassageIndex]) -> Iterator[ShardedRetriever]:
    """Two actors for each shard, for the tests of this file."""
    with served(parts[2], replicas=2) as retriever:
        yield retriever


def client(retriever: ShardedRetriever, *, replicas: int, **settings: float) -> ShardedRetriever:
    """Another worker's client, which knows only the first `replicas` replicas of each shard."""
    known = [actors[:replicas] for actors in retriever._replicas]
    return ShardedRetriever(retriever.path, retriever.manifest, known, RetrievalConfig.model_validate(settings))


def actors(retriever: ShardedRetriever) -> list[object]:
    return [actor for replicas in retriever._replicas for actor in replicas]


def process_of(actor: object, *, but: int = 0, seconds: float = 240) -> int:
    """The actor's process id. Wait while the actor restarts, and until the id is not `but`."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        try:
            process: int = ray.get(actor.process.remote(), timeout=seconds)
        except ray.exceptions.RayActorError:
            process = but
        if process != but:
            return process
        time.sleep(0.1)
    raise AssertionError("the actor was not replaced")


def alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "Z"


def gone(processes: list[int], seconds: float = 120) -> bool:
    end = time.monotonic() + seconds
    while any(map(alive, processes)) and time.monotonic() < end:
        time.sleep(0.05)
    return not any(map(alive, processes))


def queries(index: Retriever, count: int = 4) -> np.ndarray:
    return np.random.default_rng(3).normal(size=(count, index.dim)).astype(np.float32)


def test_actors_answer_as_the_index_does_and_a_training_loss_is_equal_to_the_last_bit(
    two_replicas: ShardedRetriever, parts: tuple[Path, Path, PassageIndex], tmp_path: Path
) -> None:
    index, retriever = parts[2], two_replicas
    for k in (1, 5, len(index)):  # up to more than a shard has
        retrieved, expected = retriever.search(queries(index), k), index.search(queries(index), k)
        assert_same(retrieved, expected)
        assert retriever.passages_of(retrieved.rows_BK) == index.passages_of(expected.rows_BK)
    with pytest.raises(ConfigError, match=r"10 passages per question .* holds 9"):
        retriever.search(queries(index), 10)
    questions, learnt = read_questions(write_questions_jsonl(tmp_path / "questions.jsonl")), []
    for searched in (index, retriever):
        model = RagModel.from_parts(model_config(parts[0], parts[1]))
        objective = EndToEnd(model, searched, "token", EndToEndRates(question_encoder=1e-3, generator=1e-3)).eval()
        loss = objective(questions).sum()
        loss.backward()
        gradients = [weight.grad.numpy().tobytes() for weight in model.parameters() if weight.grad is not None]
        learnt.append((loss.item(), gradients))
    assert learnt[0] == learnt[1]


@pytest.mark.parametrize("replicas", [1, 2])
def test_while_an_actor_is_killed_and_replaced_every_answer_is_complete(
    two_replicas: ShardedRetriever, parts: tuple[Path, Path, PassageIndex], replicas: int
) -> None:
    index, retriever = parts[2], client(two_replicas, replicas=replicas)
    queries_BD, expected = queries(index), index.search(queries(index), 5)
    victim = retriever._replicas[0][0]
    process, answers = process_of(victim), 0
    killer = threading.Thread(
        target=lambda: (time.sleep(0.2), os.kill(process, signal.SIGKILL), process_of(victim, but=process))
    )
    killer.start()
    while killer.is_alive() or answers < 20:
        retrieved = retriever.search(queries_BD, 5)
        answers += 1
        assert_same(retrieved, expected)
        assert retriever.passages_of(retrieved.rows_BK) == index.passages_of(expected.rows_BK)
    assert not alive(process)
    assert process_of(victim) != process


@pytest.mark.chaos
def test_an_actor_that_hangs_is_started_again(
    two_replicas: ShardedRetriever, parts: tuple[Path, Path, PassageIndex]
) -> None:
    index, retriever = parts[2], client(two_replicas, replicas=1, answer_seconds=1)
    process = process_of(retriever._replicas[1][0])
    os.kill(process, signal.SIGSTOP)
    assert_same(retriever.search(queries(index), 5), index.search(queries(index), 5))
    assert gone([process])


def test_a_search_that_no_replica_answers_is_an_error_and_never_half_an_answer(
    two_replicas: ShardedRetriever, parts: tuple[Path, Path, PassageIndex], monkeypatch: pytest.MonkeyPatch
) -> None:
    lost = RetrieverShard.remote(str(parts[2].path), 1, parts[2].manifest.fingerprint, 1)
    ray.kill(lost)
    monkeypatch.setattr(retriever_shards, "time", Clock())
    retriever = client(two_replicas, replicas=1, give_up_seconds=5)
    retriever._replicas = [retriever._replicas[0], [lost]]
    with pytest.raises(ConfigError, match=r"^1 of 2 shards of the index .* did not answer within 5 s \(shard 1: "):
        retriever.search(queries(parts[2]), 5)


def test_actors_that_find_no_place_are_an_error_that_says_what_is_missing(
    services: Path, parts: tuple[Path, Path, PassageIndex]
) -> None:
    with (
        pytest.raises(
            ConfigError, match=r"2 of 2 actors .* \(shards 0, 1\) .* within 1 s\. Each actor asks for nowhere: 1"
        ),
        served(parts[2], resources={"nowhere": 1}, start_seconds=1),
    ):
        pass


def test_an_actor_refuses_a_damaged_shard_and_another_index_and_ends_with_its_stage(
    services: Path, parts: tuple[Path, Path, PassageIndex], tmp_path: Path
) -> None:
    folder, path = parts[2].path.parent, tmp_path / "index"
    corpus, embeddings = Corpus.open(folder / "corpus"), Embeddings.open(folder / "embeddings")
    build_index(embeddings, corpus, path, IndexConfig(shards=2))
    index = PassageIndex.open(path)
    processes: list[int] = []

    def interrupted_stage() -> None:
        with served(index) as retriever:
            processes.extend(process_of(actor) for actor in actors(retriever))
            build_index(embeddings, corpus, path, IndexConfig(shards=2, factory="HNSW8"))
            os.kill(processes[0], signal.SIGKILL)
            with pytest.raises(
                ArtifactError, match=r"holds another index \(\w{12}…\) than the one that this stage started"
            ):
                retriever.search(queries(index), 5)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted_stage()
    assert gone(processes)
    file = path / "shard-00001" / "index.faiss"
    file.write_bytes(file.read_bytes()[:-1])
    with (
        pytest.raises(ArtifactError, match=r"shard-00001/index\.faiss has \d+ bytes, the manifest says"),
        served(PassageIndex(path, manifest_at(path))),
    ):
        pass


def test_predictions_are_the_same_bytes_and_no_actor_outlives_the_stage(
    services: Path, parts: tuple[Path, Path, PassageIndex], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from flows.stages.batch_infer import batch_infer

    processes: list[int] = []
    wait = retriever_shards._wait_until_ready

    def remember(path: Path, replicas: list[list[object]], config: RetrievalConfig) -> None:
        wait(path, replicas, config)
        processes.extend(process_of(actor) for actors in replicas for actor in actors)

    monkeypatch.setattr(retriever_shards, "_wait_until_ready", remember)
    model = model_config(parts[0], parts[1])
    questions = write_questions_jsonl(tmp_path / "questions.jsonl")
    decoding = DecodingConfig(num_beams=2, max_new_tokens=4, num_return_sequences=1)
    config = InferConfig(variant="token", decoding=decoding, shard_questions=3)
    sharded = config.model_copy(update={"retrieval": RetrievalConfig(mode="sharded")})
    local = batch_infer(model, parts[2].path, questions, tmp_path / "local", config)
    other = batch_infer(model, parts[2].path, questions, tmp_path / "sharded", sharded)
    assert len(processes) == SHARDS
    assert gone(processes)
    assert local.fingerprint == other.fingerprint
    for name in ("predictions.jsonl", "predictions.parquet"):
        assert (tmp_path / "local" / name).read_bytes() == (tmp_path / "sharded" / name).read_bytes()
    again = batch_infer(model, parts[2].path, questions, tmp_path / "local", sharded)
    assert again.skipped, "where questions are searched is not part of the work's key"


def test_the_commands_hand_on_the_number_of_shards_and_where_to_search(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from flows.cli.commands import stages as stage_commands

    configs: list[Any] = []
    for flow in ("build_index.build_index", "batch_infer.batch_infer", "train.train_token"):
        monkeypatch.setattr(f"flows.stages.{flow}", lambda *arguments: configs.append(arguments[-1]))
    monkeypatch.setattr(stage_commands, "print_stage", lambda result: None)
    paths = [tmp_path / name for name in ("model", "index", "questions", "out")]
    file = tmp_path / "run.yaml"
    file.write_text("model: {question_encoder: e, generator: g}\ntrain: {retrieval: {threads: 2, replicas: 3}}\n")
    stage_commands.index(*paths[:3], shards=4)
    stage_commands.infer(*paths)
    stage_commands.infer(*paths, retrieval="sharded", replicas=2)
    stage_commands.train("token", *paths[:3], file, paths[3], retrieval="sharded")
    index, local, sharded, train = configs
    assert index.shards == 4
    assert local.retrieval == RetrievalConfig()
    assert sharded.retrieval == RetrievalConfig(mode="sharded", replicas=2)
    assert train.retrieval == RetrievalConfig(mode="sharded", replicas=3, threads=2), "options override the file"
    with pytest.raises(ConfigError, match=r"retrieval\.mode: Input should be 'local' or 'sharded'"):
        stage_commands.infer(*paths, retrieval="nearby")
