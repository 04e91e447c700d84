"""Fixtures: a stand-in for the hub that serves the paper's models, and this process configured to use it.

A test module requests them by `pytest_plugins = ["tests.support.hub_fixtures"]`.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from huggingface_hub import constants
from transformers import DPRQuestionEncoder

from rag_core.pretrained.hub import revision
from tests.support.models.hub_models import (
    BART,
    CONTEXT_ENCODER,
    MINILM,
    QUESTION_ENCODER,
    RAG_TOKEN,
    Files,
    bart_files,
    dpr_files,
    rag_files,
    sentence_transformers_files,
)
from tests.support.servers.hub_server import HubServer, hub_server


@pytest.fixture(scope="session")
def paper_models(tmp_path_factory: pytest.TempPathFactory) -> Files:
    """Hub name of each model → its files."""
    home = tmp_path_factory.mktemp("models")
    return {
        BART: bart_files(home / "bart"),
        CONTEXT_ENCODER: dpr_files(home / "context"),
        QUESTION_ENCODER: dpr_files(home / "question", DPRQuestionEncoder, seed=1),
        RAG_TOKEN: rag_files(home / "rag"),
        MINILM: sentence_transformers_files(home / "minilm"),
    }


@pytest.fixture
def hub(paper_models: Files, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[HubServer]:
    """The stand-in with these models. This process uses it, without a token, and with an empty cache."""
    with hub_server() as server:
        for name, files in paper_models.items():
            server.publish(name, files)
        monkeypatch.setenv("HF_ENDPOINT", server.url)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "token"))
        monkeypatch.delenv("HF_TOKEN", raising=False)
        revision.forget()
        yield server
        revision.forget()
