"""Fixtures: folders of tiny models with random weights, plain and as sentence-transformers saves them."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from tests.embeddings.sentence_transformers_models import FAMILIES, make_transformer, save


@pytest.fixture(scope="module")
def transformers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Plain model folders of three architectures with random weights."""
    return {family: make_transformer(tmp_path_factory.mktemp("plain") / family, family) for family in FAMILIES}


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory, transformers: dict[str, Path]) -> Path:
    """A mean-pooled, normalised BERT as sentence-transformers 6 saves it. Copy before you change it."""
    folder = tmp_path_factory.mktemp("saved") / "st-folder"
    save(folder, transformers["bert"], "mean", normalize=True)
    return folder


@pytest.fixture
def copy(tmp_path: Path, saved: Path) -> Path:
    """A copy of `saved` to change."""
    return Path(shutil.copytree(saved, tmp_path / "st-folder"))
