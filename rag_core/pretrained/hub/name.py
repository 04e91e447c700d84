"""Names of hub models: `org/model`, or `org/model@REVISION` with a branch, a tag or a commit."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import constants
from huggingface_hub.file_download import repo_folder_name

from rag_core.network.addresses import without_credentials

COMMIT = re.compile(r"[0-9a-f]{40}")
# What the hub allows in a name; old models have no organisation.
_REPOSITORY = re.compile(r"[A-Za-z0-9][\w.-]{0,95}(/[A-Za-z0-9][\w.-]{0,95})?", re.ASCII)
# A little stricter than Git's rules for references, because a revision becomes a file name in the cache.
_REVISION = re.compile(r"(?!.*(\.\.|//|@\{))[\w][\w./+-]*(?<![./])", re.ASCII)
_SNAPSHOT = re.compile(r"models--(?P<repo>[^/]+)/snapshots/(?P<commit>[0-9a-f]{40})(/|$)")


def hub_address() -> str:
    """The address of the hub: HF_ENDPOINT as it is now, or Hugging Face's."""
    return (os.environ.get("HF_ENDPOINT") or constants.ENDPOINT).rstrip("/")


def shown_address() -> str:
    """The hub's address for messages, without any password."""
    try:
        return without_credentials(hub_address())
    except ValueError:  # not a valid address, such as http://[
        return "HF_ENDPOINT"


@dataclass(frozen=True)
class HubName:
    """A model of a hub; `revision` None means its main branch."""

    repo: str
    revision: str | None = None

    def __str__(self) -> str:
        return f"{self.repo}@{self.revision}" if self.revision else self.repo

    @property
    def commit(self) -> str | None:
        """The revision, if it is a full commit hash."""
        return self.revision if self.revision and COMMIT.fullmatch(self.revision) else None

    def at(self, commit: str) -> HubName:
        """The same model at a commit."""
        return HubName(self.repo, commit)

    @property
    def cache_folder(self) -> Path:
        """Where the hub's cache keeps this model."""
        return Path(constants.HF_HUB_CACHE) / repo_folder_name(repo_id=self.repo, repo_type="model")

    def snapshot(self, commit: str) -> Path:
        """The folder for the files of a commit in the hub's cache, whether or not it exists."""
        return self.cache_folder / "snapshots" / commit


def parse_hub_name(name: str) -> HubName | None:
    """The parts of a hub name, or None if `name` cannot be one."""
    repo, at, revision = name.partition("@")
    if not _REPOSITORY.fullmatch(repo) or (at and not _REVISION.fullmatch(revision)):
        return None
    return HubName(repo, revision if at else None)


def name_of_snapshot(folder: str | Path) -> str:
    """How messages name a folder: hub name and commit for a snapshot in the cache, else its path."""
    match = _SNAPSHOT.search(str(folder))
    return f"{match['repo'].replace('--', '/')}@{match['commit'][:12]}" if match else str(folder)
