"""An index served by Ray actors, shard by shard: for an index that does not fit on every machine that asks it.

`retrieval` is what a stage uses: it yields a function that its workers call to get a `Retriever`, which searches in the
worker itself (`mode: local`) or asks the actors. Answers are the same. Ray starts a lost actor again, on another machine
if need be; meanwhile its replicas are asked, or it is waited for. An answer that lacks a shard is never given: either all
shards answered, or there is an error.
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

# So long a replica that failed is asked only if all others of its shard have failed, too.
SUSPECT_SECONDS = 10.0
# Between two rounds in which replicas are asked that have just failed.
PAUSE_SECONDS = 0.1


class RetrievalConfig(BaseModel):
    """Where questions are searched. Nothing of it changes a result."""

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
        """What Ray is asked for."""
        return {"resources": self.resources, **({"memory": int(self.memory_gb * 2**30)} if self.memory_gb else {})}


@ray.remote(num_cpus=0, max_restarts=-1, max_task_retries=0)
class RetrieverShard:
    """One replica of one shard. It answers only from the index that it was started for."""

    def __init__(self, path: str, number: int, fingerprint: str, threads: int) -> None:
        faiss.omp_set_num_threads(threads)
        self._shard: IndexShard | None = None
        self._refusal: RagError | None = None
        try:
            self._shard = open_shard(Path(path), number, fingerprint)
        except RagError as error:  # told to whoever asks; an actor whose start fails only says that it died
            self._refusal = error

    def ready(self) -> None:
        """Raises the ArtifactError for which this replica cannot answer."""
        self._opened()

    def search(self, queries_BD: np.ndarray, k: int) -> Retrieved:
        return self._opened().search(queries_BD, k)

    def passages(self, rows_n: np.ndarray) -> list[Passage]:
        return self._opened().passages(rows_n)

    def process(self) -> int:
        """Its process id."""
        return os.getpid()

    def _opened(self) -> IndexShard:
        if self._shard is None:
            assert self._refusal is not None
            raise self._refusal
        return self._shard


def open_shard(path: Path, number: int, fingerprint: str) -> IndexShard:
    """Map one shard of the index at `path` (or of its copy here, if it is in an object store).

    Raises:
        ArtifactError: the index is missing, a file of it has another size than its manifest says, or it is not the one
            with this fingerprint.
    """
    folder = local_copy(path)
    manifest = open_artifact(folder, "index", check_content=False)
    if manifest.fingerprint != fingerprint:
        raise ArtifactError(
            f"{path} holds another index ({manifest.fingerprint[:12]}…) than the one that this stage began with "
            f"({fingerprint[:12]}…). Leave an index alone while it is used, and let every machine see the same one."
        )
    one = shard_ranges(manifest)[number]
    return IndexShard(folder / one.folder, one.first_row, manifest.details)


class ShardedRetriever(Retriever):
    """Asks one replica of every shard, in turn, and merges.

    Args:
        path, manifest: of the index.
        replicas: handles of the actors, for each shard those that hold it.
        config: how long to wait.
    """

    def __init__(
        self, path: Path, manifest: Manifest, replicas: Sequence[Sequence[Any]], config: RetrievalConfig
    ) -> None:
        super().__init__(path, manifest)
        self._replicas, self._config = replicas, config
        self._turn = os.getpid()  # so that not all workers ask the same replicas at the same time
        self._suspected_until: dict[Any, float] = {}
        self._spared_until: dict[Any, float] = {}

    def _search_shards(self, queries_BD: np.ndarray, k: int) -> list[Retrieved]:
        found = self._ask("search", dict.fromkeys(range(len(self._replicas)), (queries_BD, k)))
        return [found[number] for number in range(len(self._replicas))]

    def _passages_of_shards(self, rows_n: Mapping[int, np.ndarray]) -> Mapping[int, list[Passage]]:
        return self._ask("passages", {number: (rows,) for number, rows in rows_n.items()})

    def _ask(self, method: str, arguments: Mapping[int, tuple[Any, ...]]) -> dict[int, Any]:
        """What one replica of each shard answers; shards without an answer are asked again until the time is up."""
        end = time.monotonic() + self._config.give_up_seconds
        found: dict[int, Any] = {}
        told: set[int] = set()
        while True:
            missing = [number for number in arguments if number not in found]
            lost = self._ask_once(method, {number: arguments[number] for number in missing}, found, end)
            if not lost:
                return found
            for number in lost.keys() - told:
                logger.warning("Shard %d of %s: %s. Asking again.", number, self.path, lost[number])
                told.add(number)
            if time.monotonic() > end:
                raise ConfigError(self._unanswered(lost))
            time.sleep(PAUSE_SECONDS)

    def _ask_once(
        self, method: str, arguments: Mapping[int, tuple[Any, ...]], found: dict[int, Any], end: float
    ) -> dict[int, str]:
        """Adds to `found`; returns for each shard that did not answer what happened."""
        self._turn += 1
        asked = {number: self._choose(number) for number in arguments}
        calls = {getattr(asked[number], method).remote(*arguments[number]): number for number in arguments}
        limit = max(0.0, min(self._config.answer_seconds, end - time.monotonic()))
        ready, late = ray.wait(list(calls), num_returns=len(calls), timeout=limit)
        lost: dict[int, str] = {}
        for call in ready:
            number = calls[call]
            try:
                found[number] = ray.get(call)
            except ray.exceptions.RayTaskError as error:
                if isinstance(error.cause, RagError):
                    raise error.cause from error
                raise
            except ray.exceptions.RayError as error:  # the process or the machine is gone, and what it had found
                lost[number] = f"{type(error).__name__}: {' '.join(str(error).split())}"
        for call in late:
            lost[calls[call]] = f"no answer within {limit:.0f} s"
            self._restart(asked[calls[call]])
        for number in lost:
            self._suspected_until[asked[number]] = time.monotonic() + SUSPECT_SECONDS
        return lost

    def _restart(self, replica: Any) -> None:
        """End an actor that hangs, so that Ray starts it again; not one that may just be starting."""
        now = time.monotonic()
        if self._spared_until.get(replica, 0.0) < now:
            self._spared_until[replica] = now + self._config.start_seconds
            ray.kill(replica, no_restart=False)

    def _choose(self, number: int) -> Any:
        replicas, now = self._replicas[number], time.monotonic()
        in_turn = [replicas[(self._turn + at) % len(replicas)] for at in range(len(replicas))]
        return min(in_turn, key=lambda one: self._suspected_until.get(one, 0.0) > now)

    def _unanswered(self, lost: Mapping[int, str]) -> str:
        number, reason = next(iter(lost.items()))
        return (
            f"{len(lost)} of {len(self._replicas)} shards of the index {self.path} did not answer within "
            f"{self._config.give_up_seconds:g} s (shard {number}: {reason}). {_needs(self._config)}"
        )


@contextlib.contextmanager
def retrieval(index: str, manifest: Manifest, config: RetrievalConfig) -> Iterator[Callable[[], Retriever]]:
    """Yields a function, to be called in a worker, that opens an index there or connects to actors that serve it.

    The actors end when the block is left.

    Args:
        index: where it is, by its full name.
        manifest: what it was found to be; actors refuse any other.

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
            for home in _homes(number, config):
                arguments = str(path), number, manifest.fingerprint, config.threads
                options = config.actor_options() | {"scheduling_strategy": home}
                replicas[-1].append(RetrieverShard.options(**options).remote(*arguments))  # type: ignore[attr-defined]
        _wait_until_ready(path, replicas, config)
        yield partial(ShardedRetriever, path, manifest, replicas, config)
    finally:
        if ray.is_initialized():
            for replica in (one for ones in replicas for one in ones):
                ray.kill(replica)


def _open_local(path: Path) -> Retriever:
    from rag_core.index.passage_index import PassageIndex  # imports PyTorch, which the actors do without

    return PassageIndex.open(path, check_content=False)


def _homes(number: int, config: RetrievalConfig) -> list[Any]:
    """For each replica of a shard the machine where it should be, if that has room: a different one for each."""
    fitting = [
        node["NodeID"]
        for node in sorted(ray.nodes(), key=lambda node: node["NodeID"])
        if node["Alive"] and all(node["Resources"].get(name, 0) >= much for name, much in config.resources.items())
    ]
    if not fitting:  # none yet: an autoscaler may bring one
        return ["SPREAD"] * config.replicas
    return [
        NodeAffinitySchedulingStrategy(fitting[(number + at) % len(fitting)], soft=True, _spill_on_unavailable=True)
        for at in range(config.replicas)
    ]


def _wait_until_ready(path: Path, replicas: Sequence[Sequence[Any]], config: RetrievalConfig) -> None:
    calls = {one.ready.remote(): number for number, ones in enumerate(replicas) for one in ones}
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
            f"{config.start_seconds:g} s. {_needs(config)}"
        )


def _needs(config: RetrievalConfig) -> str:
    wanted = ", ".join(f"{name}: {much:g}" for name, much in config.resources.items())
    wanted += f"{', ' if wanted else ''}{config.memory_gb:g} GB of memory" if config.memory_gb else ""
    names = {*config.resources, *(["memory"] if config.memory_gb else [])}
    total = ray.cluster_resources()
    has = ", ".join(f"{name}: {total.get(name, 0):g}" for name in sorted(names))
    if not wanted:
        return "Look at the state of the Ray cluster, and at the logs of its workers."
    return (
        f"Each actor asks for {wanted}; the whole cluster has {has}. Add machines, or change `retrieval.resources`, "
        "`memory_gb` or `replicas`."
    )
