"""Load models of the stand-in hub and catch what the user is told: notices, or the one paragraph of a refusal."""

from __future__ import annotations

import warnings

import pytest

from rag_core.errors import ConfigError, ModelNotice
from rag_core.pretrained.hub import revision
from rag_core.pretrained.model_source import resolve_model_source
from tests.support.models.hub_models import BART


def fill_cache(*names: str) -> None:
    for name in names:
        resolve_model_source(name)
    revision.forget()


def notices_of(name: str) -> list[str]:
    """The notices that are shown while the model is downloaded."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        resolve_model_source(name)
    return [str(warning.message) for warning in caught if issubclass(warning.category, ModelNotice)]


def refusal(name: str = BART) -> str:
    with pytest.raises(ConfigError) as caught:
        resolve_model_source(name)
    message = str(caught.value)
    assert "\n" not in message, "more than a paragraph"
    return message
