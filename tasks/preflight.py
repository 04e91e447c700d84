"""Checks before the first stage that need the cluster: workers, batches, processors, Ray's resources."""

from __future__ import annotations

import ray
import torch

from rag_core.embeddings.text_encoder import resolve_precision
from rag_core.errors import ConfigError
from rag_core.training.loop import OptimizerConfig, Place, part_size
from tasks.environment.ray_cluster import cluster_address
from tasks.notices import warn
from tasks.on_ray.retriever_shards import RetrievalConfig
from tasks.on_ray.runtime import ensure_ray, share_of_cluster


def check_optimizer(part: str, config: OptimizerConfig, num_workers: int) -> None:
    """Raise ConfigError if a batch cannot be dealt out over the workers; warn of what is allowed and seldom meant.

    Of a cluster that grows the number of workers is not known before it trains, unless it is set.

    Args:
        part: the section's name, for messages.
        config: how is trained.
        num_workers: 0: one for each GPU, or machine.
    """
    ensure_ray()
    share = share_of_cluster(num_workers)
    if num_workers or not cluster_address():
        part_size(config, Place(world_size=share.num_workers))
    if config.warmup_steps >= config.steps:
        warn(
            f"{part}.optimizer: the learning rates rise over warmup_steps {config.warmup_steps}, and there are "
            f"{config.steps} steps, so they never reach what is set."
        )
    cpu = torch.device("cpu")
    if not share.gpus and config.precision == "bfloat16" and resolve_precision(cpu, "auto") == "float32":
        warn(
            f"{part}.optimizer.precision is bfloat16, which this processor emulates: about five times slower than float32. "
            "'auto' takes what is fast."
        )


def check_resources(part: str, config: RetrievalConfig) -> None:
    """Raise ConfigError if actors of an index ask for Ray resources that this machine's own Ray does not have.

    A cluster may start a machine that has them.
    """
    if config.mode != "sharded" or not config.resources or cluster_address():
        return
    ensure_ray()
    found = ray.cluster_resources()
    missing = [name for name, amount in config.resources.items() if found.get(name, 0) < amount]
    if missing:
        raise ConfigError(
            f"{part}.retrieval.resources asks for {', '.join(missing)}, which Ray on this machine does not have, so no actor "
            "would ever start. Leave resources out, or name a cluster that has them (RAY_ADDRESS)."
        )
