"""What a worker needs to download a hub's model as the driver would: address, token, and whether the hub answers.

A driver passes it as an argument of a call, and the worker keeps it in memory. It must not reach any file. So it is not
an argument of an actor's constructor or part of Ray's `runtime_env`, which are stored and logged, and its `repr` hides
the token.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, field

from huggingface_hub import get_token

from rag_core.pretrained.hub.name import hub_address
from rag_core.pretrained.hub.revision import remember_silence, silent_reason


@dataclass(frozen=True)
class HubAccess:
    """Made in a driver, used in a worker."""

    address: str
    token: str | None = field(repr=False)
    silent: str | None

    def use(self) -> None:
        """Make this process use that hub and that token, or no hub at all if the driver's does not answer."""
        os.environ["HF_ENDPOINT"] = self.address
        if self.token:
            os.environ["HF_TOKEN"] = self.token
        if self.silent is not None:
            remember_silence(self.silent)


def hub_access() -> HubAccess:
    """The access that this process has."""
    return HubAccess(hub_address(), get_token(), silent_reason())
