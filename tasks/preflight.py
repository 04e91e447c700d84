"""Checks before the first stage that need Ray: workers, batch sizes, processors, Ray resources."""

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
    """Check that a batch can be divided among the workers, and warn of settings that are allowed but seldom meant.

    A cluster may grow until training starts, so batches are checked there only if `num_workers` is set.

    Args:
        part: the section's name, for messages.
        config: the training settings.
        num_workers: 0 means one for each GPU, or one for each machine without GPUs.

    Raises:
        ConfigError: a batch cannot be divided among the workers.
    """
    ensure_ray()
    share = share_of_cluster(num_workers)
    if num_workers or not cluster_address():
        part_size(config, Place(world_size=share.num_workers))
    if config.warmup_steps >= config.steps:
        warn(
            f"{part}.optimizer: warmup_steps is {config.warmup_steps}, but steps is {config.steps}, so the learning "
            "rates never reach their configured values."
        )
    cpu = torch.device("cpu")
    if not share.gpus and config.precision == "bfloat16" and resolve_precision(cpu, "auto") == "float32":
        warn(
            f"{part}.optimizer.precision is bfloat16, which this processor emulates: about five times slower than "
            "float32. Set 'auto' to use the faster one."
        )


def check_resources(part: str, config: RetrievalConfig) -> None:
    """Check that Ray on this machine has the resources that the index's actors ask for.

    A cluster is not checked: it may still start a machine that has them.

    Raises:
        ConfigError: a resource is missing.
    """
    if config.mode != "sharded" or not config.resources or cluster_address():
        return
    ensure_ray()
    available = ray.cluster_resources()
    missing = [name for name, amount in config.resources.items() if available.get(name, 0) < amount]
    if missing:
        raise ConfigError(
            f"{part}.retrieval.resources asks for {', '.join(missing)}, which Ray on this machine does not have, so no "
            "actor would ever start. Remove resources, or set RAY_ADDRESS to a cluster that has them."
        )
