"""A hub that cannot be reached, refuses, or is none: a full cache is used at once, and every other case is a paragraph."""

from __future__ import annotations

import io
import shutil
import socket
import subprocess
import sys
import threading
import time
import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest
from huggingface_hub import _tree_cache, constants, snapshot_download

from rag_core.embeddings.text_encoder import TextEncoder
from rag_core.errors import ConfigError, ModelNotice
from rag_core.model.reader import load_generator
from rag_core.pretrained.hub import revision, snapshot
from rag_core.pretrained.hub.name import HubName
from rag_core.pretrained.model_source import pin_source, resolve_model_source
from tests.support.models.hub_models import BART, CONTEXT_ENCODER, MINILM, QUESTION_ENCODER, RAG_TOKEN, Files
from tests.support.servers.hub_server import HubServer

pytest_plugins = ["tests.support.hub_fixtures"]


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """A hub's answer is waited for for a second, not ten."""
    monkeypatch.setattr(constants, "HF_HUB_ETAG_TIMEOUT", 1)
    monkeypatch.setattr(constants, "HF_HUB_DOWNLOAD_TIMEOUT", 1)


def fill_cache(*names: str) -> None:
    for name in names:
        resolve_model_source(name)
    revision.forget()


def notices_of(name: str) -> list[str]:
    """What is told while the model of that name is fetched."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        resolve_model_source(name)
    return [str(one.message) for one in caught if issubclass(one.category, ModelNotice)]


def refusal(name: str = BART) -> str:
    with pytest.raises(ConfigError) as caught:
        resolve_model_source(name)
    message = str(caught.value)
    assert "\n" not in message, "more than a paragraph"
    return message


# Without a network


def test_with_refused_connections_a_full_cache_is_used_at_once_and_the_commit_told(hub: HubServer) -> None:
    fill_cache(BART, CONTEXT_ENCODER)
    hub.stop()
    started = time.monotonic()
    commit = hub.repositories[BART].references["main"]
    (notice,) = notices_of(BART)
    assert notice.startswith(f"The hub {hub.url} does not answer (")
    assert notice.endswith(f"); {BART} is taken from the cache, commit {commit}.")
    assert TextEncoder.from_pretrained(CONTEXT_ENCODER).dim == 32
    assert time.monotonic() - started < 5


def test_a_hub_that_never_answers_is_asked_once_a_process(hub: HubServer, quick: None) -> None:
    fill_cache(BART, CONTEXT_ENCODER, MINILM)
    hub.mood = "silent"
    hub.requests.clear()
    started = time.monotonic()
    for name in (BART, CONTEXT_ENCODER, MINILM):
        (notice,) = notices_of(name)
        assert "does not answer (no answer in time)" in notice
    assert 1 <= time.monotonic() - started < 5
    assert len(hub.requests) == 1
    assert constants.DEFAULT_ETAG_TIMEOUT + revision.MORE_SECONDS < 15, "what is waited for without the fixture"


def test_a_name_server_that_never_answers_holds_up_no_longer(
    hub: HubServer, quick: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    fill_cache(BART)
    monkeypatch.setenv("HF_ENDPOINT", "http://hub.invalid")
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: time.sleep(30))
    started = time.monotonic()
    assert "no answer in time" in notices_of(BART)[0]
    assert time.monotonic() - started < 5


def test_a_hub_whose_name_is_unknown_is_an_error_without_and_none_with_a_full_cache(
    hub: HubServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    fill_cache(BART)
    monkeypatch.setenv("HF_ENDPOINT", "http://hub.invalid")
    assert "does not answer" in notices_of(BART)[0]
    assert "The hub http://hub.invalid cannot be reached" in refusal(CONTEXT_ENCODER)


def test_without_a_network_and_cache_the_paragraph_says_what_to_check_and_which_models_are_there(
    hub: HubServer,
) -> None:
    fill_cache(CONTEXT_ENCODER)
    hub.stop()
    message = refusal("facebook/dpr-ctx-encoder-single-nq-base")
    assert message.startswith(f"The hub {hub.url} cannot be reached (")
    assert "HTTPS_PROXY" in message
    assert f"The cache has {CONTEXT_ENCODER}." in message


def test_hf_hub_offline_makes_no_request_and_says_nothing(hub: HubServer, monkeypatch: pytest.MonkeyPatch) -> None:
    fill_cache(BART)
    hub.requests.clear()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert notices_of(BART) == []
    message = refusal(CONTEXT_ENCODER)
    assert message.startswith("HF_HUB_OFFLINE is set, so no hub is asked, and the cache")
    assert hub.requests == []


def test_an_incomplete_cache_is_not_used(hub: HubServer) -> None:
    folder = Path(resolve_model_source(MINILM))
    revision.forget()
    (folder / "1_Pooling" / "config.json").unlink()
    hub.stop()
    with pytest.warns(ModelNotice):
        assert "does not hold the whole model" in refusal(MINILM)


def test_an_interrupted_download_leaves_the_older_commit_in_use(hub: HubServer, paper_models: Files) -> None:
    fill_cache(BART)
    first = hub.repositories[BART].references["main"]
    hub.publish(BART, paper_models[BART] | {"config.json": b'{"model_type": "bart", "vocab_size": 9}'})
    hub.download_mood = 403
    refusal()
    hub.stop()
    revision.forget()
    assert first in notices_of(BART)[0]


def test_a_cache_that_another_tool_has_filled_serves_and_doubts_are_told(
    hub: HubServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = Path(resolve_model_source(MINILM))
    revision.forget()
    shutil.rmtree(folder.parents[1] / "trees")
    monkeypatch.setattr(_tree_cache, "_IN_MEMORY_TREE_CACHE", {})
    hub.stop()
    assert len(notices_of(MINILM)) == 1
    (folder / "modules.json").unlink()
    revision.forget()
    assert any("modules.json, which says how to pool, is missing" in notice for notice in notices_of(MINILM))
    (folder / "model.safetensors").unlink()
    revision.forget()
    with pytest.warns(ModelNotice):
        assert "does not hold the whole model" in refusal(MINILM)


@pytest.mark.parametrize("status", [429, 500, 503])
def test_a_hub_on_a_bad_day_is_told_from_no_network(hub: HubServer, status: int) -> None:
    fill_cache(BART)
    hub.mood = status
    assert f"does not answer (HTTP status {status})" in notices_of(BART)[0]
    message = refusal(CONTEXT_ENCODER)
    assert ("too many requests" if status == 429 else "is out of order") in message
    assert str(status) in message


# A hub that goes silent once it has listed the files


@pytest.mark.parametrize("stage", ["tree", "files"])
def test_a_hub_that_goes_silent_after_its_listing_is_an_error_in_time(hub: HubServer, quick: None, stage: str) -> None:
    hub.tree_mood, hub.download_mood = ("silent", "") if stage == "tree" else ("", "silent")
    started = time.monotonic()
    assert f"The hub {hub.url} cannot be reached (no answer in time)" in refusal()
    hub.requests.clear()
    assert "(no answer in time)" in refusal(CONTEXT_ENCODER)
    assert time.monotonic() - started < 5
    assert hub.requests == [], "it is asked once more for another model"


@pytest.mark.parametrize("stage", ["tree", "files"])
def test_a_network_that_goes_away_after_the_listing_is_an_error_in_time(
    hub: HubServer, quick: None, monkeypatch: pytest.MonkeyPatch, stage: str
) -> None:
    fetch = snapshot._fetch

    def fetch_without_network(pinned: HubName, files: list[str]) -> None:
        if stage == "files":
            cache, nothing = constants.HF_HUB_CACHE, ["no file of this name"]
            snapshot_download(
                pinned.repo, revision=pinned.commit, endpoint=hub.url, cache_dir=cache, allow_patterns=nothing
            )
        hub.stop()
        fetch(pinned, files)

    monkeypatch.setattr(snapshot, "_fetch", fetch_without_network)
    started = time.monotonic()
    assert f"The hub {hub.url} cannot be reached (" in refusal()
    assert time.monotonic() - started < 5


def test_what_another_tool_has_downloaded_serves_if_the_hub_goes_silent_after_its_listing(
    hub: HubServer, quick: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = Path(resolve_model_source(BART))
    revision.forget()
    shutil.rmtree(folder.parents[1] / "trees")
    monkeypatch.setattr(_tree_cache, "_IN_MEMORY_TREE_CACHE", {})
    hub.tree_mood = "silent"
    started = time.monotonic()
    with pytest.warns(ModelNotice, match="does not say whether its files"):
        assert resolve_model_source(BART) == str(folder)
    assert time.monotonic() - started < 5


def test_a_slow_download_goes_on_also_after_a_lost_connection(hub: HubServer, monkeypatch: pytest.MonkeyPatch) -> None:
    for limit in ("HF_HUB_ETAG_TIMEOUT", "HF_HUB_DOWNLOAD_TIMEOUT"):
        monkeypatch.setattr(constants, limit, 2)
    hub.download_mood = "slow"
    started = time.monotonic()
    folder = Path(resolve_model_source(BART))
    assert time.monotonic() - started > 2 * 2, "it was not slow"
    weights = hub.repositories[BART].commits[folder.name]["pytorch_model.bin"]
    assert (folder / "pytorch_model.bin").read_bytes() == weights
    assert hub.files().count("pytorch_model.bin") == 2


def test_a_hub_that_fails_for_a_moment_within_a_download_is_asked_again(hub: HubServer) -> None:
    hub.download_mood = 503
    calm = threading.Timer(0.5, setattr, (hub, "download_mood", ""))
    calm.start()
    try:
        assert (Path(resolve_model_source(BART)) / "config.json").is_file()
    finally:
        calm.join()


# Refusals


def test_a_gated_model_names_the_page_to_ask_for_access(hub: HubServer, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.repositories[BART].gate = {"good-token"}
    message = refusal()
    assert f"{BART} is gated, and no token is set. Ask for access on its page, {hub.url}/{BART}," in message
    hub.tokens.add("other-token")
    monkeypatch.setenv("HF_TOKEN", "other-token")
    assert "the token is of an account without access" in refusal()
    monkeypatch.setenv("HF_TOKEN", "good-token")
    load_generator(BART)


def test_a_private_model_without_a_token_may_also_be_missing(hub: HubServer, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.repositories[BART].readers = {"good-token"}
    message = refusal()
    assert f"has no model {BART}, or it is private" in message
    assert "HF_TOKEN" in message
    monkeypatch.setenv("HF_TOKEN", "good-token")
    resolve_model_source(BART)
    assert {one.token for one in hub.requests[-5:]} == {"good-token"}


def test_a_wrong_token_is_called_that_also_for_public_models(hub: HubServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "expired-token")
    message = refusal()
    assert "does not accept the token" in message
    assert f"{hub.url}/settings/tokens" in message
    assert "expired-token" not in message


@pytest.mark.parametrize("token", [None, "good-token"])
def test_a_misspelt_name_brings_the_nearest_of_the_cache(
    hub: HubServer, token: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    fill_cache(BART, CONTEXT_ENCODER, QUESTION_ENCODER)
    if token:
        monkeypatch.setenv("HF_TOKEN", token)
    for name in ("facebok/bart-large", "facebook/bart_large", "bart-large", "Facebook/BART-large"):
        message = refusal(name)
        assert f"has no model {name}" in message
        assert f"The cache has {BART}." in message
        assert f"A folder {name} is not here either" in message
    assert "The cache has" not in refusal("org/quite-another")


def test_a_missing_revision_is_named(hub: HubServer) -> None:
    message = refusal(f"{BART}@v9")
    assert f"{BART} has no revision 'v9'" in message
    assert f"{hub.url}/{BART}/commits/main" in message
    assert "has no revision" in refusal(f"{BART}@{'0' * 40}")


@pytest.mark.parametrize("mood", ["html", 404])
def test_an_address_that_is_no_hub_is_called_that(hub: HubServer, mood: str | int) -> None:
    hub.mood = mood
    message = refusal()
    assert message.startswith(f"{hub.url} does not answer as a model hub")
    assert "Correct HF_ENDPOINT" in message


@pytest.mark.parametrize(
    "address", ["huggingface.co", "ftp://hub.example", "http://", "not a hub", "http:///models", "http://["]
)
def test_an_address_that_can_be_none_is_called_that(
    hub: HubServer, address: str, monkeypatch: pytest.MonkeyPatch
) -> None:
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
    assert "has no weights that are read here (model.safetensors or pytorch_model.bin" in refusal("org/others")
    assert "it has flax_model.msgpack" in refusal("org/others")
    assert "tf_model.h5" not in hub.files()


def test_a_forbidden_download_is_told(hub: HubServer) -> None:
    hub.download_mood = 403
    assert "refuses facebook/bart-large to this token (HTTP status 403)" in refusal()


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


def test_a_disk_that_gets_full_meanwhile_is_told(
    hub: HubServer, small_disk: Path, paper_models: Files, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.publish("org/large", paper_models[BART] | {"pytorch_model.bin": bytes(100_000)})
    monkeypatch.setattr(
        "rag_core.pretrained.hub.snapshot._check_room", lambda *_: None
    )  # as if another program had filled it since
    message = refusal("org/large")
    assert f"The disk of the hub's cache {small_disk / 'hub'} got full while" in message


def test_a_cache_that_may_not_be_written_is_told(
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


def test_a_download_shows_one_bar_on_a_terminal_and_nothing_elsewhere(
    hub: HubServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    for screen, name in ((Terminal(), BART), (io.StringIO(), CONTEXT_ENCODER)):
        monkeypatch.setattr(sys, "stderr", screen)
        resolve_model_source(name)
        lines = screen.getvalue().replace("\r", "\n").splitlines()
        words = {line.partition(":")[0].strip(" \x1b[A") for line in lines} - {""}
        assert words == ({f"Downloading {BART}"} if isinstance(screen, Terminal) else set())


def test_the_whole_rag_checkpoint_comes_from_the_cache_without_a_network(hub: HubServer) -> None:
    pinned = pin_source(RAG_TOKEN)
    fill_cache(RAG_TOKEN)
    hub.stop()
    assert notices_of(pinned) == []
