"""Requests to an object store: list, checked download, upload, and a conditional write that only one writer can win.

The AWS SDK finds credentials, region and endpoint (`AWS_ENDPOINT_URL`, profiles, roles); this module neither logs nor
keeps them. Every object that we upload carries its SHA-256 as metadata.
"""

from __future__ import annotations

import contextlib
import functools
import os
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from rag_core.errors import ArtifactError
from rag_core.storage.draft import finished_file
from rag_core.storage.manifest import FileEntry, sha256_of_file
from rag_core.storage.places import ObjectPath
from rag_core.storage.store_settings import check_store_settings

# Error codes of a conditional write: another writer was faster.
_LOST = ("PreconditionFailed", "ConditionalRequestConflict", "NoSuchKey")


class ManifestChangedError(Exception):
    """A conditional write was refused because another writer has changed the object."""


@contextlib.contextmanager
def explain_store_errors(place: ObjectPath) -> Iterator[None]:
    """Turn errors of the SDK into an ArtifactError that names the place; a missing object stays a FileNotFoundError."""
    from botocore.exceptions import BotoCoreError, ClientError, NoCredentialsError, PartialCredentialsError

    try:
        yield
    except (NoCredentialsError, PartialCredentialsError) as error:
        raise ArtifactError(
            f"{place}: no AWS credentials were found ({' '.join(str(error).split())}). Set AWS_ACCESS_KEY_ID and "
            "AWS_SECRET_ACCESS_KEY, or AWS_PROFILE, then run the same command again: it continues."
        ) from error
    except FileNotFoundError as error:
        if _error_code(error) != "NoSuchBucket":
            raise
        raise ArtifactError(
            f"{place}: there is no bucket {place.bucket!r}. Create it, or correct the place."
        ) from error
    except PermissionError as error:
        raise ArtifactError(
            f"{place}: the store refuses access ({error}). Check the AWS credentials and their permissions."
        ) from error
    except (BotoCoreError, ClientError, OSError) as error:
        # An OSError without a ClientError comes from this machine (a full disk, for example), not from the store.
        if isinstance(error, OSError) and not isinstance(error.__cause__, ClientError):
            raise
        raise ArtifactError(
            f"{place}: the store does not answer as expected ({' '.join(str(error).split())}). Check the network, "
            "AWS_ENDPOINT_URL and AWS_REGION, then run the same command again: it continues."
        ) from error


def read_object(place: ObjectPath) -> tuple[bytes, str] | None:
    """Content and ETag of a small object; None if there is no such object."""
    with explain_store_errors(place):
        try:
            response = _call("get_object", place)
        except FileNotFoundError as error:
            if _error_code(error) == "NoSuchBucket":
                raise
            return None
        return _read_body(response["Body"]), response["ETag"]


def list_objects(place: ObjectPath) -> dict[str, int]:
    """Names of the objects below a place, relative to it, and their sizes in bytes."""
    with explain_store_errors(place):
        try:
            objects = _filesystem().find(f"{place.bucket}/{place.prefix}", detail=True)
        except FileNotFoundError as error:
            if _error_code(error) == "NoSuchBucket":
                raise
            return {}
    start = f"{place.bucket}/{place.prefix}/"
    return {name.removeprefix(start): info["size"] for name, info in objects.items() if name.startswith(start)}


def download(place: ObjectPath, file: Path, entry: FileEntry) -> None:
    """Fetch an object; `file` appears whole and with the right SHA-256, or not at all.

    Raises:
        FileNotFoundError: there is no such object.
        ArtifactError: its size or content differs from `entry`.
    """
    file.parent.mkdir(parents=True, exist_ok=True)
    with finished_file(file) as unfinished:
        with explain_store_errors(place):
            _filesystem().get_file(f"{place.bucket}/{place.prefix}", str(unfinished))
        size = unfinished.stat().st_size
        if size != entry.bytes:
            raise ArtifactError(f"{place} has {size} bytes, the manifest says {entry.bytes} bytes.")
        sha256 = sha256_of_file(unfinished)
        if sha256 != entry.sha256:
            raise ArtifactError(
                f"{place} was changed since it was published: its SHA-256 is {sha256}, the manifest says "
                f"{entry.sha256}."
            )


def download_plain(place: ObjectPath, file: Path) -> None:
    """Fetch an object that no manifest describes."""
    file.parent.mkdir(parents=True, exist_ok=True)
    with finished_file(file) as unfinished, explain_store_errors(place):
        _filesystem().get_file(f"{place.bucket}/{place.prefix}", str(unfinished))


def is_stored(place: ObjectPath, entry: FileEntry) -> bool:
    """Whether the store already has this object with this size and SHA-256 (left by a stopped upload, for example)."""
    with explain_store_errors(place):
        try:
            head = _call("head_object", place)
        except FileNotFoundError:
            return False
    return bool(head["ContentLength"] == entry.bytes and head["Metadata"].get("sha256") == entry.sha256)


def upload(file: Path, place: ObjectPath, entry: FileEntry) -> None:
    """Upload a file. Large files go in parts; the object appears whole or not at all."""
    with explain_store_errors(place):
        _filesystem().put_file(str(file), f"{place.bucket}/{place.prefix}", Metadata={"sha256": entry.sha256})


def write_if_unchanged(place: ObjectPath, content: bytes, etag: str | None) -> None:
    """Write a small object only if the object there still has this `etag` (None: only if there is no object).

    Raises:
        ManifestChangedError: another writer was faster.
    """
    condition = {"IfNoneMatch": "*"} if etag is None else {"IfMatch": etag}
    mark = uuid.uuid4().hex
    with explain_store_errors(place):
        try:
            _call("put_object", place, Body=content, Metadata={"writer": mark}, **condition)
        except OSError as error:
            if _error_code(error) not in _LOST:
                raise
            # If a response is lost, the SDK repeats the request, and the repeat collides with our own first write.
            if _writer_of(place) != mark:
                raise ManifestChangedError(str(place)) from error


def delete(place: ObjectPath, names: list[str]) -> None:
    """Delete objects below a place; missing ones are ignored."""
    with explain_store_errors(place):
        for name in names:
            _call("delete_object", place / name)


def _error_code(error: Exception) -> str:
    """The store's code for an error, such as "NoSuchBucket"."""
    response: dict[str, Any] = getattr(error.__cause__, "response", None) or {}
    return str(response.get("Error", {}).get("Code", ""))


def _writer_of(place: ObjectPath) -> str | None:
    try:
        return str(_call("head_object", place)["Metadata"].get("writer"))
    except FileNotFoundError:
        return None


def _call(method: str, place: ObjectPath, **arguments: Any) -> Any:
    return _filesystem().call_s3(method, Bucket=place.bucket, Key=place.prefix, **arguments)


def _read_body(body: Any) -> bytes:
    from fsspec.asyn import sync

    content: bytes = sync(_filesystem().loop, body.read)
    return content


def _filesystem() -> Any:
    return _filesystem_of(os.getpid())


@functools.cache
def _filesystem_of(process: int) -> Any:
    """One client per process, because connections do not survive a fork. Raises ConfigError if settings are wrong."""
    import s3fs

    check_store_settings()

    return s3fs.S3FileSystem(use_listings_cache=False, skip_instance_cache=True)
