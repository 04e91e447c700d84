"""Check Ray before it connects or starts: the cluster at `RAY_ADDRESS`, or folders and memory on this machine.

Ray itself tries to reach a missing cluster for minutes and then ends the whole process with SIGTERM. So a small
subprocess with short timeouts asks the cluster first.
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
from tasks.environment.ray_internals import CLUSTER_PROBE, address_of_cluster_here, default_object_store_bytes
from tasks.environment.variables import writable_folder

# Seconds that the subprocess may take; its own timeouts end it after 10 s.
PROBE_SECONDS = 13.0
_TIMEOUTS = {
    "RAY_gcs_rpc_server_connect_timeout_s": "3",
    "RAY_gcs_rpc_server_reconnect_timeout_s": "3",
    "RAY_gcs_server_request_timeout_seconds": "3",
    "RAY_BACKEND_LOG_LEVEL": "fatal",
}
# The path that Ray appends to its folder for a socket, without the process id; the system's limit for a socket's path.
_SOCKET = "/ray/session_2026-11-27_16-39-29_123456_/sockets/plasma_store"
LONGEST_SOCKET_PATH = 103 if sys.platform == "darwin" else 107
# The smallest object store that Ray accepts, and the largest that it puts outside /dev/shm by itself; in bytes.
SMALLEST_STORE, LARGEST_OUTSIDE = 75 * 2**20, 10**10
SHARED_MEMORY = "/dev/shm"  # noqa: S108  # nosec B108
MEGABYTE = 10**6


def cluster_address() -> str:
    """`RAY_ADDRESS`, or "" if Ray is to start on this machine."""
    address = os.environ.get("RAY_ADDRESS", "").strip()
    return "" if address == "local" else address


def check_ray() -> None:
    """Check the cluster at `RAY_ADDRESS`, or without an address the folder that Ray needs on this machine.

    Raises:
        ConfigError: the address is wrong, no Ray answers there, or the cluster has another token or another version; or
            Ray cannot use its folder on this machine.
    """
    check_ray_settings()
    if address := cluster_address():
        _check_cluster(address)


def check_ray_settings() -> None:
    """The checks of `check_ray` that do not connect to a cluster. Raises ConfigError as `check_ray` does."""
    token = os.environ.get("RAY_AUTH_TOKEN_PATH", "").strip()
    if (token and not os.access(token, os.R_OK)) or (token and Path(token).is_dir()):
        raise ConfigError(
            f"RAY_AUTH_TOKEN_PATH is {token!r}, but no file can be read there. Set it to the file with the cluster's "
            "token, or unset it: ~/.ray/auth_token is then used, and created if it is missing."
        )
    if address := cluster_address():
        if address != "auto":
            host_and_port(address)
    else:
        check_session_folder()


def host_and_port(address: str) -> tuple[str, int]:
    """Host and port of a cluster's address.

    Raises:
        ConfigError: the address is not of the form HOST:PORT.
    """
    problem, (host, _, port) = "", address.rpartition(":")
    if "://" in address:
        problem = f"{address.partition('://')[0]}:// is not supported"
        if address.startswith("ray://"):
            problem = (
                "Ray's client (ray://) is not supported; run the command on a machine that reaches the cluster itself"
            )
    elif not host or any(letter.isspace() for letter in address):
        problem = "it has no host and port"
    elif not (port.isascii() and port.isdigit() and 0 < int(port) < 65536):
        problem = "its port is not a number from 1 to 65535"
    elif ":" in host and not (host.startswith("[") and host.endswith("]")):
        problem = "an IPv6 address must be in brackets"
    if problem:
        raise ConfigError(
            f"RAY_ADDRESS is {without_credentials(address)!r}: {problem}. Set it to HOST:PORT of the cluster's head, "
            "usually port 6379 (or to auto on one of its machines), or unset RAY_ADDRESS to work on this machine."
        )
    return host.strip("[]"), int(port)


@functools.cache
def _check_cluster(address: str) -> None:
    # Cached: one check per process is enough.
    resolved = address if address != "auto" else _address_on_this_machine()
    host, port = host_and_port(resolved)
    try:
        within(SECONDS, lambda: socket.create_connection((host, port), timeout=SECONDS).close())
    except OSError as error:
        raise _no_cluster(address, f"does not answer ({reason_of(error)})") from error
    command = [sys.executable, "-c", CLUSTER_PROBE, resolved, address]
    try:
        probe = subprocess.run(
            command, env=os.environ | _TIMEOUTS, capture_output=True, text=True, timeout=PROBE_SECONDS, check=False
        )
    except subprocess.TimeoutExpired as error:
        raise _no_cluster(address, "accepts connections, but does not answer as Ray does") from error
    if "AuthenticationError" in probe.stderr:
        raise ConfigError(
            f"The Ray cluster at {address} (RAY_ADDRESS) asks for another token than ours. Set RAY_AUTH_MODE=token, "
            "and put the cluster's token (on the cluster: ray get-auth-token) into RAY_AUTH_TOKEN, into a file that "
            "RAY_AUTH_TOKEN_PATH names, or into ~/.ray/auth_token. Or unset RAY_ADDRESS to work on this machine."
        )
    try:
        cluster, ours = json.loads(probe.stdout.strip().splitlines()[-1])
    except (ValueError, IndexError) as error:
        raise _no_cluster(address, "accepts connections, but does not answer as Ray does") from error
    theirs = [cluster.get("ray_version", ours[0]), cluster.get("python_version", ours[1])]
    if theirs != list(ours):
        raise ConfigError(
            f"The Ray cluster at {address} (RAY_ADDRESS) runs Ray {theirs[0]} on Python {theirs[1]}, this process Ray "
            f"{ours[0]} on Python {ours[1]}. Both must be equal: install the same versions on the cluster, or unset "
            "RAY_ADDRESS to work on this machine."
        )


def _address_on_this_machine() -> str:
    try:
        return address_of_cluster_here()
    except ConnectionError as error:
        raise _no_cluster("auto", "was not found: no cluster runs on this machine") from error


def _no_cluster(address: str, problem: str) -> ConfigError:
    return ConfigError(
        f"The Ray cluster at {address} (RAY_ADDRESS) {problem}. No work was started. Start it, correct the address "
        "(HOST:PORT of its head, usually port 6379), or unset RAY_ADDRESS to work on this machine."
    )


def check_session_folder() -> None:
    """Check the folder for Ray's sockets and logs on this machine: RAY_TMPDIR, else TMPDIR, else /tmp.

    Raises:
        ConfigError: the folder is not writable, or its path is too long for a socket.
    """
    name, folder = session_folder()
    writable_folder(name, folder)
    length = len(os.fsencode(folder)) + len(_SOCKET) + len(str(os.getpid()))
    if length > LONGEST_SOCKET_PATH:
        most = LONGEST_SOCKET_PATH - len(_SOCKET) - len(str(os.getpid()))
        raise ConfigError(
            f"{name} is {folder!r}, {len(os.fsencode(folder))} bytes long. Ray keeps sockets below it, and a socket's "
            f"path may have {LONGEST_SOCKET_PATH} bytes, so the folder's path may have {most}. Set RAY_TMPDIR to a "
            "shorter path, such as /tmp."
        )


def session_folder() -> tuple[str, str]:
    """The name of the variable that sets Ray's folder, and the folder."""
    for name in ("RAY_TMPDIR", "TMPDIR"):
        if folder := os.environ.get(name, "").strip():
            return name, folder
    return "RAY_TMPDIR", "/tmp"  # noqa: S108  # nosec B108


@dataclass(frozen=True)
class ObjectStore:
    """Ray's object store on this machine: size in bytes and folder (None: Ray's default), and a notice for the user."""

    bytes: int | None = None
    folder: str | None = None
    notice: str = ""

    @property
    def options(self) -> dict[str, Any]:
        """Arguments for `ray.init`."""
        size = {"object_store_memory": self.bytes} if self.bytes else {}
        return {**size, **({"_plasma_directory": self.folder} if self.folder else {})}


def object_store(wanted: int, shared: int | None, on_disk: int, folder: str) -> ObjectStore:
    """An object store that fits: in shared memory, made smaller if necessary, else in files.

    Args:
        wanted: bytes that Ray would take.
        shared: bytes free in /dev/shm; None if it does not exist.
        on_disk: bytes free in `folder`.
        folder: folder for files, if shared memory is too small.

    Raises:
        ConfigError: there is no room even for the smallest store.
    """
    usable = int((shared or 0) * 0.95)
    state = "does not exist" if shared is None else f"has {shared / MEGABYTE:.0f} MB free"
    remedy = "more (with Docker: --shm-size=2g) is faster" if shared is not None else "mount it (a tmpfs) for speed"
    if usable >= wanted:
        return ObjectStore()
    if usable >= SMALLEST_STORE:
        return ObjectStore(usable)
    size = min(wanted, on_disk // 2, 2 * 2**30)
    if size < SMALLEST_STORE:
        raise ConfigError(
            f"Ray's object store needs {SMALLEST_STORE / MEGABYTE:.0f} MB of shared memory, but {SHARED_MEMORY} "
            f"{state}, and {folder}, used instead, has {on_disk / MEGABYTE:.0f} MB free. Free some, give the container "
            "more shared memory (with Docker: --shm-size=2g), or set RAY_TMPDIR to a folder with room."
        )
    notice = f"{SHARED_MEMORY} {state}: Ray keeps its objects in files below {folder}; {remedy}."
    return ObjectStore(size, folder, notice)


def object_store_here() -> ObjectStore:
    """The store for Ray on this machine. Raises ConfigError as `object_store` does."""
    if sys.platform != "linux":
        return ObjectStore()
    wanted = default_object_store_bytes()
    folder = session_folder()[1]
    try:
        shared: int | None = shutil.disk_usage(SHARED_MEMORY).free
    except OSError:
        shared = None
    existing = Path(folder)
    while not existing.is_dir():
        existing = existing.parent
    return object_store(min(wanted, LARGEST_OUTSIDE), shared, shutil.disk_usage(existing).free, str(existing))
