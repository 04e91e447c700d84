"""Ray before it is asked to connect or to start: the cluster at `RAY_ADDRESS`, or folders and memory on this machine.

Ray itself asks a cluster that is not there for minutes and then ends the whole process with SIGTERM, so a small process of
its own asks first, with short patience.
"""

from __future__ import annotations

import functools
import json
import os
import shutil
import socket
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rag_core.errors import ConfigError
from rag_core.network.addresses import without_credentials
from rag_core.network.server_probe import SECONDS, reason_of, within
from tasks.environment.variables import writable_folder

# How long that process may take; its own limits end it after 10 s.
PROBE_SECONDS = 13.0
_PATIENCE = {
    "RAY_gcs_rpc_server_connect_timeout_s": "3",
    "RAY_gcs_rpc_server_reconnect_timeout_s": "3",
    "RAY_gcs_server_request_timeout_seconds": "3",
    "RAY_BACKEND_LOG_LEVEL": "fatal",
}
_PROBE = """
import json, sys
from ray._private.authentication.authentication_token_setup import maybe_enable_token_auth_if_token_available
from ray._private.utils import compute_version_info
from ray._raylet import GcsClient
if sys.argv[2] == "auto":  # as ray.init does, and only then
    maybe_enable_token_auth_if_token_available(warn_if_disabled=False)
known = GcsClient(address=sys.argv[1]).internal_kv_get(b"CLUSTER_METADATA", b"cluster", timeout=3)
print(json.dumps([json.loads(known) if known else {}, compute_version_info()]))
"""
# What Ray adds to its folder for its sockets, without the process's id; the system's limit for a socket's path.
_SOCKET = "/ray/session_2026-11-27_16-39-29_123456_/sockets/plasma_store"
LONGEST_SOCKET_PATH = 103 if sys.platform == "darwin" else 107
# The least that Ray accepts, and the most for which it leaves /dev/shm by itself.
SMALLEST_STORE, LARGEST_OUTSIDE = 75 * 2**20, 10**10
SHARED_MEMORY = "/dev/shm"  # noqa: S108  # nosec B108
MEGABYTE = 10**6


def cluster_address() -> str:
    """`RAY_ADDRESS`, or "" where Ray starts on this machine."""
    address = os.environ.get("RAY_ADDRESS", "").strip()
    return "" if address == "local" else address


def check_ray() -> None:
    """The cluster, or what Ray needs here.

    Raises:
        ConfigError: the address is wrong, nobody or no Ray answers there, it asks for another token, or is of another
            version; or (without an address) a folder or the memory is not what Ray needs.
    """
    check_ray_settings()
    if address := cluster_address():
        _check_cluster(address)


def check_ray_settings() -> None:
    """What can be said without asking a cluster. Raises ConfigError as `check_ray` does."""
    token = os.environ.get("RAY_AUTH_TOKEN_PATH", "").strip()
    if (token and not os.access(token, os.R_OK)) or (token and Path(token).is_dir()):
        raise ConfigError(
            f"RAY_AUTH_TOKEN_PATH is {token!r}, but no file can be read there. Name the file with the cluster's token, or "
            "unset it: ~/.ray/auth_token is used then, and made where it is not there."
        )
    if address := cluster_address():
        if address != "auto":
            host_and_port(address)
    else:
        check_session_folder()


def host_and_port(address: str) -> tuple[str, int]:
    """The two parts of a cluster's address.

    Raises:
        ConfigError: it has others, or no such parts.
    """
    problem, (host, _, port) = "", address.rpartition(":")
    if "://" in address:
        problem = f"{address.partition('://')[0]}:// is not understood here"
        if address.startswith("ray://"):
            problem = (
                "Ray's client (ray://) is not supported; run the command on a machine that reaches the cluster itself"
            )
    elif not host or any(letter.isspace() for letter in address):
        problem = "it has no host and port"
    elif not (port.isascii() and port.isdigit() and 0 < int(port) < 65536):
        problem = "its port is no number from 1 to 65535"
    elif ":" in host and not (host.startswith("[") and host.endswith("]")):
        problem = "an IPv6 address belongs in brackets"
    if problem:
        raise ConfigError(
            f"RAY_ADDRESS is {without_credentials(address)!r}: {problem}. Give HOST:PORT of the cluster's head, usually port "
            "6379 (or auto on one of its machines), or unset RAY_ADDRESS to work on this machine."
        )
    return host.strip("[]"), int(port)


@functools.cache
def _check_cluster(address: str) -> None:
    # Once a process: what connects later need not ask again.
    known = address if address != "auto" else _address_on_this_machine()
    host, port = host_and_port(known)
    try:
        within(SECONDS, lambda: socket.create_connection((host, port), timeout=SECONDS).close())
    except OSError as error:
        raise _no_cluster(address, f"does not answer ({reason_of(error)})") from error
    command = [sys.executable, "-c", _PROBE, known, address]
    try:
        done = subprocess.run(
            command, env=os.environ | _PATIENCE, capture_output=True, text=True, timeout=PROBE_SECONDS, check=False
        )
    except subprocess.TimeoutExpired as error:
        raise _no_cluster(address, "takes connections, but does not answer as Ray does") from error
    if "AuthenticationError" in done.stderr:
        raise ConfigError(
            f"The Ray cluster at {address} (RAY_ADDRESS) asks for another token than ours. Set RAY_AUTH_MODE=token and give "
            "the cluster's token: in RAY_AUTH_TOKEN, in a file that RAY_AUTH_TOKEN_PATH names, or in ~/.ray/auth_token "
            "(on the cluster: ray get-auth-token). Or unset RAY_ADDRESS to work on this machine."
        )
    try:
        cluster, ours = json.loads(done.stdout.strip().splitlines()[-1])
    except (ValueError, IndexError) as error:
        raise _no_cluster(address, "takes connections, but does not answer as Ray does") from error
    theirs = [cluster.get("ray_version", ours[0]), cluster.get("python_version", ours[1])]
    if theirs != list(ours):
        raise ConfigError(
            f"The Ray cluster at {address} (RAY_ADDRESS) runs Ray {theirs[0]} on Python {theirs[1]}, this process Ray "
            f"{ours[0]} on Python {ours[1]}. Both must be equal: install the same on the cluster, or unset RAY_ADDRESS to "
            "work on this machine."
        )


def _address_on_this_machine() -> str:
    from ray._private.services import get_ray_address_from_environment

    try:
        return str(get_ray_address_from_environment("auto", None))
    except ConnectionError as error:
        raise _no_cluster("auto", "is not there: no cluster runs on this machine") from error


def _no_cluster(address: str, what: str) -> ConfigError:
    return ConfigError(
        f"The Ray cluster at {address} (RAY_ADDRESS) {what}. Nothing was begun. Start it, correct the address (HOST:PORT of "
        "its head, usually port 6379), or unset RAY_ADDRESS to work on this machine."
    )


def check_session_folder() -> None:
    """Where Ray on this machine keeps its sockets and logs: RAY_TMPDIR, else TMPDIR, else /tmp.

    Raises:
        ConfigError: nothing can be written there, or its path is too long for a socket.
    """
    name, folder = session_folder()
    writable_folder(name, folder)
    length = len(os.fsencode(folder)) + len(_SOCKET) + len(str(os.getpid()))
    if length > LONGEST_SOCKET_PATH:
        most = LONGEST_SOCKET_PATH - len(_SOCKET) - len(str(os.getpid()))
        raise ConfigError(
            f"{name} is {folder!r}, {len(os.fsencode(folder))} bytes long: Ray keeps sockets below it, and the path of a "
            f"socket may have {LONGEST_SOCKET_PATH} bytes, so the folder's may have {most}. Set RAY_TMPDIR to a shorter one, "
            "such as /tmp."
        )


def session_folder() -> tuple[str, str]:
    """The variable that names the folder, and the folder."""
    for name in ("RAY_TMPDIR", "TMPDIR"):
        if folder := os.environ.get(name, "").strip():
            return name, folder
    return "RAY_TMPDIR", "/tmp"  # noqa: S108  # nosec B108


@dataclass(frozen=True)
class ObjectStore:
    """How Ray's object store on this machine is made: bytes and folder (None: as Ray chooses), and what to say of it."""

    bytes: int | None = None
    folder: str | None = None
    notice: str = ""

    @property
    def options(self) -> dict[str, Any]:
        """For `ray.init`."""
        size = {"object_store_memory": self.bytes} if self.bytes else {}
        return {**size, **({"_plasma_directory": self.folder} if self.folder else {})}


def object_store(wanted: int, shared: int | None, elsewhere: int, folder: str) -> ObjectStore:
    """A store that fits: in shared memory, smaller if need be, else in files.

    Args:
        wanted: bytes that Ray would take.
        shared: bytes free in /dev/shm; None if there is none.
        elsewhere: bytes free in `folder`.
        folder: where files of Ray's may lie.

    Raises:
        ConfigError: there is not even room for the smallest.
    """
    usable = int((shared or 0) * 0.95)
    found = "is not there" if shared is None else f"has {shared / MEGABYTE:.0f} MB free"
    remedy = "more (with Docker: --shm-size=2g) is faster" if shared is not None else "mount it (a tmpfs) for speed"
    if usable >= wanted:
        return ObjectStore()
    if usable >= SMALLEST_STORE:
        return ObjectStore(usable)
    size = min(wanted, elsewhere // 2, 2 * 2**30)
    if size < SMALLEST_STORE:
        raise ConfigError(
            f"Ray's object store needs {SMALLEST_STORE / MEGABYTE:.0f} MB of shared memory, but {SHARED_MEMORY} {found}, and "
            f"in its place {folder} has {elsewhere / MEGABYTE:.0f} MB free. Free some, give the container more shared memory "
            "(with Docker: --shm-size=2g), or set RAY_TMPDIR to a folder with room."
        )
    notice = f"{SHARED_MEMORY} {found}: Ray keeps its objects in files below {folder}; {remedy}."
    return ObjectStore(size, folder, notice)


def object_store_here() -> ObjectStore:
    """The store for Ray on this machine. Raises ConfigError as `object_store` does."""
    from ray._private.ray_constants import DEFAULT_OBJECT_STORE_MEMORY_PROPORTION
    from ray._private.utils import estimate_available_memory

    if sys.platform != "linux":
        return ObjectStore()
    wanted = int(estimate_available_memory() * DEFAULT_OBJECT_STORE_MEMORY_PROPORTION)
    folder = session_folder()[1]
    try:
        shared: int | None = shutil.disk_usage(SHARED_MEMORY).free
    except OSError:
        shared = None
    there = Path(folder)
    while not there.is_dir():
        there = there.parent
    return object_store(min(wanted, LARGEST_OUTSIDE), shared, shutil.disk_usage(there).free, str(there))
