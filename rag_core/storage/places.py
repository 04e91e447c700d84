"""Places of artifacts and files: a local path, or `s3://bucket/prefix` in an object store.

Both are `Path`s, so flows, tasks and configurations use one type. `Path("s3://b/x")` drops a slash: `as_place` restores
it, and `ArtifactPath` does so wherever pydantic reads a parameter or a setting.
"""

from __future__ import annotations

import os
from pathlib import Path, PosixPath
from typing import Annotated

from pydantic import AfterValidator

SCHEME = "s3://"


class ObjectPath(PosixPath):
    """A place in an object store. `/`, `name` and `parent` work as for any path; methods that read the disk do not."""

    __slots__ = ()

    def __str__(self) -> str:
        return SCHEME + super().__str__().removeprefix("s3:").lstrip("/")

    def __fspath__(self) -> str:
        return str(self)

    def resolve(self, strict: bool = False) -> ObjectPath:
        """The place itself; a store has no links."""
        return self

    @property
    def bucket(self) -> str:
        """The bucket: the first part after `s3://`."""
        return self.parts[1] if len(self.parts) > 1 else ""

    @property
    def prefix(self) -> str:
        """The key: everything after the bucket, without slashes at either end."""
        return "/".join(self.parts[2:])


def as_place(path: str | Path) -> Path:
    """`s3://…` or `s3:/…` as an `ObjectPath`; any other path unchanged."""
    if isinstance(path, ObjectPath):
        return path
    local = Path(path)
    return ObjectPath(local) if local.parts[:1] == ("s3:",) else local


def absolute(path: str | Path) -> str:
    """The absolute path or full `s3://` address of a place, for processes with another current folder."""
    return str(as_place(path).resolve())


def cache_root() -> Path:
    """The folder of this program's cache: `RAG_CACHE`, or `~/.cache/rag`."""
    return Path(os.environ.get("RAG_CACHE") or Path.home() / ".cache" / "rag")


# Type of a parameter or setting that may be a place in an object store.
ArtifactPath = Annotated[Path, AfterValidator(as_place)]
