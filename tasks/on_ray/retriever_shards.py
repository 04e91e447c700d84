"""Serves an index from Ray actors, one shard each, when the index does not fit on every machine that searches it.

A stage uses `retrieval`. It yields a function that the stage's workers call to get a `Retriever`, which either
searches in the worker itself (`mode: local`) or asks the actors. Both give the same answers. Ray restarts a
lost actor, on another machine if necessary; meanwhile the shard's other replicas answer, or the search waits. A
search returns only when all shards have answered; otherwise it raises an error.
"""

from __future__ import annotations

import contextlib
import logging
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal

import faiss
import numpy as np
import ray
from pydantic import BaseModel, ConfigDict, Field
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from rag_core.corpus.passages import Passage
from rag_core.errors import ArtifactError, ConfigError, RagError
from rag_core.index.retriever import Retrieved, Retriever, shard_ranges
from rag_core.index.shard import IndexShard
from rag_core.storage.artifact import Manifest, local_copy, open_artifact
from rag_core.storage.places import as_place
from tasks.on_ray.runtime import ensure_ray

logger = logging.getLogger(__name__)

# For this long after a failure, a replica is asked only if all other replicas of its shard have failed too.
SUSPECT_SECONDS = 10.0
# Pause before shards that did not answer are asked again.
PAUSE_SECONDS = 0.1


class RetrievalConfig(BaseModel):
    """Where searches run. No setting here changes a result."""

    model_config = ConfigDict(extra="forbid")

    mode: Literal["local", "sharded"] = Field(
        "local", description="local: every worker maps the whole index; sharded: actors hold a shard each"
    )
    replicas: int = Field(1, ge=1, description="actors for each shard, on different machines where there are as many")
    threads: int = Field(1, ge=1, description="FAISS threads of an actor; Ray reserves no cores for them")
    resources: dict[str, Annotated[float, Field(gt=0)]] = Field(
        default_factory=dict, description="Ray's custom resources that each actor takes of its machine"
    )
    memory_gb: float = Field(0, ge=0, description="main memory that Ray reserves for each actor")
    start_seconds: float = Field(120, gt=0, description="by when all actors must have started")
    answer_seconds: float = Field(60, gt=0, description="an actor that has not answered by then is started again")
    give_up_seconds: float = Field(300, gt=0, description="a search that no replica has answered by then is an error")

    def actor_options(self) -> dict[str, Any]:
        """Ray's options for an actor: the resources and memory to reserve."""
        return {"resources": self.resources, **({"memory": int(self.memory_gb * 2**30)} if self.memory_gb else {})}


@ray.remote(num_cpus=0, max_restarts=-1, max_task_retries=0)
class RetrieverShard:
    """One replica of one shard. It answers only from the index with the fingerprint it was started for."""

    def __init__(self, path: str, number: int, fingerprint: str, threads: int) -> None:
        faiss.omp_set_num_threads(threads)
        self._shard: IndexShard | None = None
        self._refusal: RagError | None = None
        try:
            self._shard = open_shard(Path(path), number, fingerprint)
        except RagError as error:  # raised at each call: if __init__ raised it, callers would only see a dead actor
            self._refusal = error

    def ready(self) -> None:
        """Raise the ArtifactError that keeps this replica from answering, if there is one."""
        self._opened()

    def search(self, queries_BD: np.ndarray, k: int) -> Retrieved:
        return self._opened().search(queries_BD, k)

    def passages(self, rows_n: np.ndarray) -> list[Passage]:
        return self._opened().passages(rows_n)

    def process(self) -> int:
        """The actor's process id."""
        return os.getpid()

    def _opened(self) -> IndexShard:
        if self._shard is None:
            assert self._refusal is not None
            raise self._refusal
        return self._shard


def open_shard(path: Path, number: int, fingerprint: str) -> IndexShard:
    """Map one shard of the index at `path`, or of its local copy if `path` is in an object store.

    Raises:
        ArtifactError: the index is missing, one of its files does not have the size in the manifest, or the index
            has another fingerprint.
    """
    folder = local_copy(path)
    manifest = open_artifact(folder, "index", check_content=False)
    if manifest.fingerprint != fingerprint:
        raise ArtifactError(
            f"{path} holds another index ({manifest.fingerprint[:12]}…) than the one that this stage started with "
            f"({fingerprint[:12]}…). Do not change an index while it is in use, and let every machine see the same one."
        )
    shard = shard_ranges(manifest)[number]
    return IndexShard(folder / shard.folder, shard.first_row, manifest.details)


class ShardedRetriever(Retriever):
    """Asks one replica of every shard, taking turns between replicas, and merges their answers.

    Args:
        path, manifest: those of the index.
        replicas: for each shard, the handles of the actors that hold it.
        config: how long to wait.
    """

    def __init__(
        self, path: Path, manifest: Manifest, replicas: Sequence[Sequence[Any]], config: RetrievalConfig
    ) -> None:
        super().__init__(path, manifest)
        self._replicas, self._config = replicas, config
        self._turn = os.getpid()  # so that workers do not all ask the same replicas at the same time
        self._suspected_until: dict[Any, float] = {}
        self._no_restart_before: dict[Any, float] = {}

    def _search_shards(self, queries_BD: np.ndarray, k: int) -> list[Retrieved]:
        answers = self._ask("search", dict.fromkeys(range(len(self._replicas)), (queries_BD, k)))
        return [answers[number] for number in range(len(self._replicas))]

    def _passages_of_shards(self, rows_n: Mapping[int, np.ndarray]) -> Mapping[int, list[Passage]]:
        return self._ask("passages", {number: (rows,) for number, rows in rows_n.items()})

    def _ask(self, method: str, arguments: Mapping[int, tuple[Any, ...]]) -> dict[int, Any]:
        """Answers of one replica of each shard. Ask shards that do not answer again until the time is up."""
        end = time.monotonic() + self._config.give_up_seconds
        answers: dict[int, Any] = {}
        warned: set[int] = set()
        while True:
            missing = [number for number in arguments if number not in answers]
            lost = self._ask_once(method, {number: arguments[number] for number in missing}, answers, end)
            if not lost:
                return answers
            for number in lost.keys() - warned:
                logger.warning("Shard %d of %s: %s. Asking again.", number, self.path, lost[number])
                warned.add(number)
            if time.monotonic() > end:
                raise ConfigError(self._no_answer(lost))
            time.sleep(PAUSE_SECONDS)

    def _ask_once(
        self, method: str, arguments: Mapping[int, tuple[Any, ...]], answers: dict[int, Any], end: float
    ) -> dict[int, str]:
        """Ask each shard once and add to `answers`; return the failure of each shard that did not answer."""
        self._turn += 1
        chosen = {number: self._choose(number) for number in arguments}
        calls = {getattr(chosen[number], method).remote(*arguments[number]): number for number in arguments}
        limit = max(0.0, min(self._config.answer_seconds, end - time.monotonic()))
        ready, late = ray.wait(list(calls), num_returns=len(calls), timeout=limit)
        lost: dict[int, str] = {}
        for call in ready:
            number = calls[call]
            try:
                answers[number] = ray.get(call)
            except ray.exceptions.RayTaskError as error:
                if isinstance(error.cause, RagError):
                    raise error.cause from error
                raise
            except ray.exceptions.RayError as error:  # the process or the machine is lost
                lost[number] = f"{type(error).__name__}: {' '.join(str(error).split())}"
        for call in late:
            lost[calls[call]] = f"no answer within {limit:.0f} s"
            self._restart(chosen[calls[call]])
        for number in lost:
            self._suspected_until[chosen[number]] = time.monotonic() + SUSPECT_SECONDS
        return lost

    def _restart(self, replica: Any) -> None:
        """Kill an actor that hangs, so that Ray restarts it, unless it was restarted less than `start_seconds` ago."""
        now = time.monotonic()
        if self._no_restart_before.get(replica, 0.0) < now:
            self._no_restart_before[replica] = now + self._config.start_seconds
            ray.kill(replica, no_restart=False)

    def _choose(self, number: int) -> Any:
        replicas, now = self._replicas[number], time.monotonic()
        in_turn = [replicas[(self._turn + offset) % len(replicas)] for offset in range(len(replicas))]
        return min(in_turn, key=lambda replica: self._suspected_until.get(replica, 0.0) > now)

    def _no_answer(self, lost: Mapping[int, str]) -> str:
        number, reason = next(iter(lost.items()))
        return (
            f"{len(lost)} of {len(self._replicas)} shards of the index {self.path} did not answer within "
            f"{self._config.give_up_seconds:g} s (shard {number}: {reason}). {_requirements(self._config)}"
        )


@contextlib.contextmanager
def retrieval(index: str, manifest: Manifest, config: RetrievalConfig) -> Iterator[Callable[[], Retriever]]:
    """Yield a function that a worker calls to open the index, or to connect to the actors that serve it.

    The actors end with the block.

    Args:
        index: absolute path or `s3://` address of the index.
        manifest: the index's manifest; actors refuse an index with another fingerprint.

    Raises:
        ConfigError: not all actors could be placed and started within `config.start_seconds`.
        ArtifactError: an actor found a damaged shard, or another index.
    """
    path = as_place(index)
    if config.mode == "local":
        yield partial(_open_local, path)
        return
    ensure_ray()
    replicas: list[list[Any]] = []
    try:
        for number in range(len(shard_ranges(manifest))):
            replicas.append([])
            for placement in _placements(number, config):
                arguments = str(path), number, manifest.fingerprint, config.threads
                options = config.actor_options() | {"scheduling_strategy": placement}
                replicas[-1].append(RetrieverShard.options(**options).remote(*arguments))  # type: ignore[attr-defined]
        _wait_until_ready(path, replicas, config)
        yield partial(ShardedRetriever, path, manifest, replicas, config)
    finally:
        if ray.is_initialized():
            for replica in (actor for actors in replicas for actor in actors):
                ray.kill(replica)


def _open_local(path: Path) -> Retriever:
    from rag_core.index.passage_index import PassageIndex  # imports PyTorch, which actors do not need

    return PassageIndex.open(path, check_content=False)


def _placements(number: int, config: RetrievalConfig) -> list[Any]:
    """Where Ray should place each replica of a shard: on a different machine each, if those have room."""
    fitting = [
        node["NodeID"]
        for node in sorted(ray.nodes(), key=lambda node: node["NodeID"])
        if node["Alive"] and all(node["Resources"].get(name, 0) >= amount for name, amount in config.resources.items())
    ]
    if not fitting:  # an autoscaler may still add a machine
        return ["SPREAD"] * config.replicas
    return [
        NodeAffinitySchedulingStrategy(
            fitting[(number + replica) % len(fitting)], soft=True, _spill_on_unavailable=True
        )
        for replica in range(config.replicas)
    ]


def _wait_until_ready(path: Path, replicas: Sequence[Sequence[Any]], config: RetrievalConfig) -> None:
    calls = {actor.ready.remote(): number for number, actors in enumerate(replicas) for actor in actors}
    ready, late = ray.wait(list(calls), num_returns=len(calls), timeout=config.start_seconds)
    for call in ready:
        try:
            ray.get(call)
        except ray.exceptions.RayTaskError as error:
            if isinstance(error.cause, RagError):
                raise error.cause from error
            raise
    if late:
        shards = ", ".join(str(number) for number in sorted({calls[call] for call in late}))
        raise ConfigError(
            f"{len(late)} of {len(calls)} actors for the index {path} (shards {shards}) did not start within "
            f"{config.start_seconds:g} s. {_requirements(config)}"
        )


def _requirements(config: RetrievalConfig) -> str:
    """What each actor asks for and what the cluster has, for an error message."""
    requested = ", ".join(f"{name}: {amount:g}" for name, amount in config.resources.items())
    requested += f"{', ' if requested else ''}{config.memory_gb:g} GB of memory" if config.memory_gb else ""
    names = {*config.resources, *(["memory"] if config.memory_gb else [])}
    total = ray.cluster_resources()
    available = ", ".join(f"{name}: {total.get(name, 0):g}" for name in sorted(names))
    if not requested:
        return "Look at the state of the Ray cluster, and at the logs of its workers."
    return (
        f"Each actor asks for {requested}; the whole cluster has {available}. Add machines, or change "
        "`retrieval.resources`, `memory_gb` or `replicas`."
    )
