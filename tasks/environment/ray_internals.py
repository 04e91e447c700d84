"""Private parts of Ray that we need, in one place. `tests/project/test_internals.py` names one that was moved.

Each function names the public feature that would replace it.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator

# Asks a cluster for its versions of Ray and Python, and prints them with ours: `python -c PROBE ADDRESS RAY_ADDRESS`.
# It runs in a process of its own, because Ray's client ends the process if the cluster does not answer.
# Public replacement: a `ray.init` that raises within a time limit.
CLUSTER_PROBE = """
import json, sys
from ray._private.authentication.authentication_token_setup import maybe_enable_token_auth_if_token_available
from ray._private.utils import compute_version_info
from ray._raylet import GcsClient
if sys.argv[2] == "auto":  # as ray.init does, and only then
    maybe_enable_token_auth_if_token_available(warn_if_disabled=False)
known = GcsClient(address=sys.argv[1]).internal_kv_get(b"CLUSTER_METADATA", b"cluster", timeout=3)
print(json.dumps([json.loads(known) if known else {}, compute_version_info()]))
"""


# Ray's loggers whose messages no user needs.
LOGGERS = ("ray.train", "ray.tune", "ray._private")


def address_of_cluster_here() -> str:
    """The address of the cluster that runs on this machine, as RAY_ADDRESS=auto means it.

    Public replacement: none; `ray.init("auto")` finds it only by connecting.

    Raises:
        ConnectionError: no cluster runs here.
    """
    from ray._private.services import get_ray_address_from_environment

    return str(get_ray_address_from_environment("auto", None))


def default_object_store_bytes() -> int:
    """The size that Ray gives its object store on this machine, in bytes, before it looks at /dev/shm.

    Public replacement: none; Ray tells the size only after it has started.
    """
    from ray._private.ray_constants import DEFAULT_OBJECT_STORE_MEMORY_PROPORTION
    from ray._private.utils import estimate_available_memory

    return int(estimate_available_memory() * DEFAULT_OBJECT_STORE_MEMORY_PROPORTION)


def new_authentication_token() -> str:
    """A token for ~/.ray/auth_token, as Ray makes it.

    Public replacement: the command `ray get-auth-token --generate`.
    """
    from ray._private.authentication.authentication_token_generator import generate_new_authentication_token

    return str(generate_new_authentication_token())


@contextlib.contextmanager
def single_machine(environment: dict[str, str]) -> Iterator[None]:
    """Ray started in the block believes that it cannot form a cluster, and so listens on 127.0.0.1 alone.

    `_node_ip_address="127.0.0.1"` does not do that: Ray replaces it by the machine's address. On macOS and Windows Ray
    behaves as wanted, because it does not support clusters there. Public replacement: an option of `ray.init`.

    Args:
        environment: further variables for the processes that are started in the block. All are restored afterwards:
            another cluster may be used later.
    """
    from ray._private import ray_constants

    before = dict(os.environ), ray_constants.ENABLE_RAY_CLUSTER
    ours = {ray_constants.ENABLE_RAY_CLUSTERS_ENV_VAR: "0"} | environment
    os.environ |= ours
    ray_constants.ENABLE_RAY_CLUSTER = False
    try:
        yield
    finally:
        for name in ours:
            os.environ.pop(name)
            os.environ |= {name: before[0][name]} if name in before[0] else {}
        ray_constants.ENABLE_RAY_CLUSTER = before[1]


@contextlib.contextmanager
def without_api_server() -> Iterator[None]:
    """Ray started in the block has no API server.

    Without the dashboard that process only gathers usage reports. Even with reports switched off it asks the metadata
    servers of three clouds where it runs (169.254.169.254, metadata.google.internal), and it takes 100 MB. Public
    replacement: `include_dashboard=False`, once that ends the whole process.
    """
    from ray._private import services

    before = services.start_api_server
    services.start_api_server = lambda *_, **__: (None, None)
    try:
        yield
    finally:
        services.start_api_server = before
