"""What is asked of an object store: listing, checked downloads, uploads, and a write that only one of two can win.

Credentials, region and endpoint are the AWS SDK's affair (`AWS_ENDPOINT_URL`, profiles, roles); nothing of them is logged
or kept here. Every object of ours carries its SHA-256 as metadata.
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

# Answers to a conditional write that another one was faster.
_LOST = ("PreconditionFailed", "ConditionalRequestConflict", "NoSuchKey")


class ManifestChangedError(Exception):
    """A conditional write was refused: what stands there is not what was expected."""


@contextlib.contextmanager
def store_errors_named(place: ObjectPath) -> Iterator[None]:
    """Turn what the SDK raises into an ArtifactError that names the place; a missing object stays FileNotFoundError."""
    from botocore.exceptions import BotoCoreError, ClientError, NoCredentialsError, PartialCredentialsError

    try:
        yield
    except (NoCredentialsError, PartialCredentialsError) as error:
        raise ArtifactError(
            f"{place}: no AWS credentials were found ({' '.join(str(error).split())}). Set AWS_ACCESS_KEY_ID and "
            "AWS_SECRET_ACCESS_KEY, or AWS_PROFILE; the same command then goes on."
        ) from error
    except FileNotFoundError as error:
        if _code(error) != "NoSuchBucket":
            raise
        raise ArtifactError(f"{place}: there is no bucket {place.bucket!r}. Make it, or correct the place.") from error
    except PermissionError as error:
        raise ArtifactError(
            f"{place}: the store refuses access ({error}). Check the AWS credentials in use and what they may do."
        ) from error
    except (BotoCoreError, ClientError, OSError) as error:
        # Full disks and the like are not the store's.
        if isinstance(error, OSError) and not isinstance(error.__cause__, ClientError):
            raise
        raise ArtifactError(
            f"{place}: the store does not answer as expected ({' '.join(str(error).split())}). Check the network, "
            "AWS_ENDPOINT_URL and AWS_REGION; the same command then goes on."
        ) from error


def read_object(place: ObjectPath) -> tuple[bytes, str] | None:
    """Content and ETag of a small object; None if it is not there."""
    with store_errors_named(place):
        try:
            answer = _call("get_object", place)
        except FileNotFoundError as error:
            if _code(error) == "NoSuchBucket":
                raise
            return None
        return _read_body(answer["Body"]), answer["ETag"]


def list_objects(place: ObjectPath) -> dict[str, int]:
    """Names below a place, relative to it, and their sizes in bytes."""
    with store_errors_named(place):
        try:
            found = _filesystem().find(f"{place.bucket}/{place.prefix}", detail=True)
        except FileNotFoundError as error:
            if _code(error) == "NoSuchBucket":
                raise
            return {}
    start = f"{place.bucket}/{place.prefix}/"
    return {name.removeprefix(start): one["size"] for name, one in found.items() if name.startswith(start)}


def download(place: ObjectPath, file: Path, entry: FileEntry) -> None:
    """Fetch an object; `file` appears whole and with the right SHA-256, or not at all.

    Raises:
        FileNotFoundError: there is no such object.
        ArtifactError: it has another size or content than `entry` says.
    """
    file.parent.mkdir(parents=True, exist_ok=True)
    with finished_file(file) as unfinished:
        with store_errors_named(place):
            _filesystem().get_file(f"{place.bucket}/{place.prefix}", str(unfinished))
        size = unfinished.stat().st_size
        if size != entry.bytes:
            raise ArtifactError(f"{place} has {size} bytes, the manifest says {entry.bytes} bytes.")
        found = sha256_of_file(unfinished)
        if found != entry.sha256:
            raise ArtifactError(
                f"{place} was changed since it was published: its SHA-256 is {found}, the manifest says {entry.sha256}."
            )


def download_plain(place: ObjectPath, file: Path) -> None:
    """Fetch an object that no manifest describes."""
    file.parent.mkdir(parents=True, exist_ok=True)
    with finished_file(file) as unfinished, store_errors_named(place):
        _filesystem().get_file(f"{place.bucket}/{place.prefix}", str(unfinished))


def is_stored(place: ObjectPath, entry: FileEntry) -> bool:
    """Whether an object of ours with this size and SHA-256 is there already (as an upload that was stopped leaves it)."""
    with store_errors_named(place):
        try:
            head = _call("head_object", place)
        except FileNotFoundError:
            return False
    return bool(head["ContentLength"] == entry.bytes and head["Metadata"].get("sha256") == entry.sha256)


def upload(file: Path, place: ObjectPath, entry: FileEntry) -> None:
    """Store a file; large ones go in parts, and appear whole or not at all."""
    with store_errors_named(place):
        _filesystem().put_file(str(file), f"{place.bucket}/{place.prefix}", Metadata={"sha256": entry.sha256})


def write_if_unchanged(place: ObjectPath, content: bytes, etag: str | None) -> None:
    """Write a small object only if the one that stands there is still that with `etag` (None: if there is none).

    Raises:
        ManifestChangedError: another writer was faster.
    """
    condition = {"IfNoneMatch": "*"} if etag is None else {"IfMatch": etag}
    mark = uuid.uuid4().hex
    with store_errors_named(place):
        try:
            _call("put_object", place, Body=content, Metadata={"writer": mark}, **condition)
        except OSError as error:
            if _code(error) not in _LOST:
                raise
            # The SDK repeats a request whose answer was lost, and the repetition meets our own write.
            if _writer_of(place) != mark:
                raise ManifestChangedError(str(place)) from error


def delete(place: ObjectPath, names: list[str]) -> None:
    """Delete objects below a place; those that are gone already do no harm."""
    with store_errors_named(place):
        for name in names:
            _call("delete_object", place / name)


def _code(error: Exception) -> str:
    """What the store called an error."""
    answer: dict[str, Any] = getattr(error.__cause__, "response", None) or {}
    return str(answer.get("Error", {}).get("Code", ""))


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
    """One for each process: connections do not outlive a fork. Raises ConfigError if its settings are wrong."""
    import s3fs

    check_store_settings()

    return s3fs.S3FileSystem(use_listings_cache=False, skip_instance_cache=True)
