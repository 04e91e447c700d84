"""A hub that refuses or is none, and a disk that is full: every failure is one paragraph that says what to do."""

from __future__ import annotations

import io
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from huggingface_hub import constants
from transformers.utils import logging as transformers_logging

from rag_core.model.reader import load_generator
from rag_core.pretrained.hub import revision
from rag_core.pretrained.model_source import resolve_model_source
from tests.pretrained.hub_messages import fill_cache, notices_of, refusal
from tests.support.models.hub_models import BART, CONTEXT_ENCODER, QUESTION_ENCODER, Files
from tests.support.servers.hub_server import HubServer

pytest_plugins = ["tests.support.hub_fixtures"]


# Refusals


def test_a_gated_model_names_the_page_to_ask_for_access(hub: HubServer, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.repositories[BART].gate = {"good-token"}
    message = refusal()
    assert f"{BART} is gated, and no token is set. Ask for access on its page, {hub.url}/{BART}," in message
    hub.tokens.add("other-token")
    monkeypatch.setenv("HF_TOKEN", "other-token")
    assert "the token belongs to an account without access" in refusal()
    monkeypatch.setenv("HF_TOKEN", "good-token")
    load_generator(BART)


def test_a_private_model_without_a_token_may_also_be_missing(hub: HubServer, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.repositories[BART].readers = {"good-token"}
    message = refusal()
    assert f"has no model {BART}, or it is private" in message
    assert "HF_TOKEN" in message
    monkeypatch.setenv("HF_TOKEN", "good-token")
    resolve_model_source(BART)
    assert {request.token for request in hub.requests[-5:]} == {"good-token"}


def test_a_wrong_token_is_reported_for_public_models_too(hub: HubServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "expired-token")
    message = refusal()
    assert "does not accept the token" in message
    assert f"{hub.url}/settings/tokens" in message
    assert "expired-token" not in message


@pytest.mark.parametrize("token", [None, "good-token"])
def test_a_misspelt_name_suggests_the_nearest_one_in_the_cache(
    hub: HubServer, token: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    fill_cache(BART, CONTEXT_ENCODER, QUESTION_ENCODER)
    if token:
        monkeypatch.setenv("HF_TOKEN", token)
    for name in ("facebok/bart-large", "facebook/bart_large", "bart-large", "Facebook/BART-large"):
        message = refusal(name)
        assert f"has no model {name}" in message
        assert f"The cache has {BART}." in message
        assert f"There is no folder {name} in " in message
    assert "The cache has" not in refusal("org/quite-another")


def test_a_missing_revision_is_named(hub: HubServer) -> None:
    message = refusal(f"{BART}@v9")
    assert f"{BART} has no revision 'v9'" in message
    assert f"{hub.url}/{BART}/commits/main" in message
    assert "has no revision" in refusal(f"{BART}@{'0' * 40}")


@pytest.mark.parametrize("mood", ["html", 404])
def test_an_address_without_a_hub_is_reported(hub: HubServer, mood: str | int) -> None:
    hub.mood = mood
    message = refusal()
    assert message.startswith(f"{hub.url} does not answer as a model hub")
    assert "Correct HF_ENDPOINT" in message


@pytest.mark.parametrize(
    "address", ["huggingface.co", "ftp://hub.example", "http://", "not a hub", "http:///models", "http://["]
)
def test_an_invalid_address_is_reported(hub: HubServer, address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_ENDPOINT", address)
    message = refusal()
    assert message.startswith("HF_ENDPOINT is ")
    assert message.endswith("Give an address such as https://huggingface.co, or unset HF_ENDPOINT.")


def test_a_password_in_the_address_is_not_shown(hub: HubServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_ENDPOINT", hub.url.replace("http://", "http://me:canary-7c1b@"))
    assert "canary-7c1b" not in refusal("org/nothing")
    resolve_model_source(BART)
    hub.stop()
    revision.forget()
    assert "canary-7c1b" not in notices_of(BART)[0] + refusal("org/nothing")


def test_a_model_without_weights_for_pytorch_says_what_it_has(hub: HubServer, paper_models: Files) -> None:
    files = {name: content for name, content in paper_models[BART].items() if name != "pytorch_model.bin"}
    hub.publish("org/others", files)
    assert "has no weights in a supported format (model.safetensors or pytorch_model.bin" in refusal("org/others")
    hub.publish("org/quantised", {"config.json": files["config.json"], "model.Q4_K_M.gguf": b"GGUF"})
    message = refusal("org/quantised")
    assert (
        "; it has model.Q4_K_M.gguf. Download one of its .gguf files (`hf download`) and give that file's path"
        in message
    )
    assert "it has flax_model.msgpack" in refusal("org/others")
    assert "tf_model.h5" not in hub.files()


def test_a_forbidden_download_is_reported(hub: HubServer) -> None:
    hub.download_mood = 403
    assert "does not let this token read facebook/bart-large (HTTP status 403)" in refusal()


# Disks


@pytest.fixture
def small_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    folder = tmp_path / "disk"
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=64k", "none", str(folder)]
    if subprocess.run(command, capture_output=True).returncode:
        pytest.skip("a file system cannot be mounted here")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(folder / "hub"))
    try:
        yield folder
    finally:
        subprocess.run(["umount", str(folder)], check=True)


def test_a_model_that_is_larger_than_the_disk_is_not_begun(
    hub: HubServer, small_disk: Path, paper_models: Files
) -> None:
    hub.publish("org/large", paper_models[BART] | {"pytorch_model.bin": bytes(100_000)})
    message = refusal("org/large")
    assert f"The disk of the hub's cache {small_disk / 'hub'} is full: the model org/large" in message
    assert "HF_HOME" in message
    assert hub.files() == []


@pytest.mark.filterwarnings("ignore:Not enough free disk space")
def test_a_disk_that_gets_full_during_the_download_is_reported(
    hub: HubServer, small_disk: Path, paper_models: Files, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.publish("org/large", paper_models[BART] | {"pytorch_model.bin": bytes(100_000)})
    monkeypatch.setattr(
        "rag_core.pretrained.hub.snapshot._check_room", lambda *_: None
    )  # as if another program had filled it since
    message = refusal("org/large")
    assert f"The disk of the hub's cache {small_disk / 'hub'} got full while" in message


def test_a_cache_that_cannot_be_written_is_reported(
    hub: HubServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "file"))
    message = refusal()
    assert f"The hub's cache {tmp_path / 'file'} cannot be written" in message
    assert "HF_HOME" in message


# Progress


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture
def bars() -> Iterator[None]:
    """Progress bars as users have them; conftest.py switches them off."""
    transformers_logging.enable_progress_bar()
    yield
    transformers_logging.disable_progress_bar()


def test_a_download_shows_one_bar_on_a_terminal_and_nothing_elsewhere(
    hub: HubServer, bars: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    for screen, name in ((Terminal(), BART), (io.StringIO(), CONTEXT_ENCODER)):
        monkeypatch.setattr(sys, "stderr", screen)
        resolve_model_source(name)
        lines = screen.getvalue().replace("\r", "\n").splitlines()
        words = {line.partition(":")[0].strip(" \x1b[A") for line in lines} - {""}
        assert words == ({f"Downloading {BART}"} if isinstance(screen, Terminal) else set())
