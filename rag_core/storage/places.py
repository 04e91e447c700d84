"""Where artifacts and files lie: a local path, or `s3://bucket/prefix` in an object store.

Both are `Path`s, so that flows, tasks and configurations name places in one type. `Path("s3://b/x")` forgets a slash;
`as_place` gives it back, and `ArtifactPath` does so wherever pydantic reads a parameter or a setting.
"""

from __future__ import annotations

from pathlib import Path, PosixPath
from typing import Annotated

from pydantic import AfterValidator

SCHEME = "s3://"


class ObjectPath(PosixPath):
    """A place in an object store; `/`, `name` and `parent` work as on any path, the file system knows nothing of it."""

    __slots__ = ()

    def __str__(self) -> str:
        return SCHEME + super().__str__().removeprefix("s3:").lstrip("/")

    def __fspath__(self) -> str:
        return str(self)

    def resolve(self, strict: bool = False) -> ObjectPath:
        """Itself: there is nothing to resolve."""
        return self

    @property
    def bucket(self) -> str:
        """The first part of the place."""
        return self.parts[1] if len(self.parts) > 1 else ""

    @property
    def prefix(self) -> str:
        """What follows the bucket, without slashes at its ends."""
        return "/".join(self.parts[2:])


def as_place(path: str | Path) -> Path:
    """A local path as it is, and `s3://…` (one slash lost or not) as an `ObjectPath`."""
    if isinstance(path, ObjectPath):
        return path
    found = Path(path)
    return ObjectPath(found) if found.parts[:1] == ("s3:",) else found


def absolute(path: str | Path) -> str:
    """A place by its full name, for processes with another current folder."""
    return str(as_place(path).resolve())


# A parameter or setting that may be in an object store.
ArtifactPath = Annotated[Path, AfterValidator(as_place)]
