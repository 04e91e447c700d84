"""What a worker has to know to fetch a hub's model as the driver would: address, token, and whether the hub answers.

A driver hands it over in a call, and the worker keeps it in its memory. It must get into no file: not into an actor's
construction or Ray's `runtime_env`, which are stored and logged, and not into its own `repr`.
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
        """From now on this process asks that hub with that token, or none if the driver's hub does not answer."""
        os.environ["HF_ENDPOINT"] = self.address
        if self.token:
            os.environ["HF_TOKEN"] = self.token
        if self.silent is not None:
            remember_silence(self.silent)


def hub_access() -> HubAccess:
    """This process's own."""
    return HubAccess(hub_address(), get_token(), silent_reason())
