"""A hub that cannot be reached or goes silent: a full cache is used at once; otherwise the error comes in time."""

from __future__ import annotations

import shutil
import socket
import threading
import time
from pathlib import Path

import pytest
from huggingface_hub import _tree_cache, constants, snapshot_download

from rag_core.embeddings.text_encoder import TextEncoder
from rag_core.errors import ModelNotice
from rag_core.pretrained.hub import revision, snapshot
from rag_core.pretrained.hub.name import HubName
from rag_core.pretrained.model_source import pin_source, resolve_model_source
from tests.pretrained.hub_messages import fill_cache, notices_of, refusal
from tests.support.models.hub_models import BART, CONTEXT_ENCODER, MINILM, RAG_TOKEN, Files
from tests.support.servers.hub_server import HubServer

pytest_plugins = ["tests.support.hub_fixtures"]

# Seconds: far more than the limits of one second that `quick` sets, for a busy machine; less than the client's own attempts.
IN_TIME = 15


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Wait for a hub's answer for one second, not ten."""
    monkeypatch.setattr(constants, "HF_HUB_ETAG_TIMEOUT", 1)
    monkeypatch.setattr(constants, "HF_HUB_DOWNLOAD_TIMEOUT", 1)


# Without a network


def test_with_refused_connections_a_full_cache_is_used_at_once_and_the_commit_is_shown(hub: HubServer) -> None:
    fill_cache(BART, CONTEXT_ENCODER)
    hub.stop()
    started = time.monotonic()
    commit = hub.repositories[BART].references["main"]
    (notice,) = notices_of(BART)
    assert notice.startswith(f"The hub {hub.url} does not answer (")
    assert notice.endswith(f"); {BART} is taken from the cache, commit {commit}.")
    assert TextEncoder.from_pretrained(CONTEXT_ENCODER).dim == 32
    assert time.monotonic() - started < IN_TIME


def test_a_hub_that_never_answers_is_asked_once_a_process(hub: HubServer, quick: None) -> None:
    fill_cache(BART, CONTEXT_ENCODER, MINILM)
    hub.mood = "silent"
    hub.requests.clear()
    started = time.monotonic()
    for name in (BART, CONTEXT_ENCODER, MINILM):
        (notice,) = notices_of(name)
        assert "does not answer (no answer in time)" in notice
    assert 1 <= time.monotonic() - started < IN_TIME
    assert len(hub.requests) == 1
    assert constants.DEFAULT_ETAG_TIMEOUT + revision.MORE_SECONDS < 15, "the wait without the fixture"


def test_a_name_server_that_never_answers_holds_up_no_longer(
    hub: HubServer, quick: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    fill_cache(BART)
    monkeypatch.setenv("HF_ENDPOINT", "http://hub.invalid")
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: time.sleep(30))
    started = time.monotonic()
    assert "no answer in time" in notices_of(BART)[0]
    assert time.monotonic() - started < IN_TIME


def test_a_hub_with_an_unknown_host_name_is_an_error_only_without_a_full_cache(
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


def test_a_cache_that_another_tool_filled_is_used_with_a_warning(
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
def test_a_hub_that_is_out_of_order_is_told_apart_from_no_network(hub: HubServer, status: int) -> None:
    fill_cache(BART)
    hub.mood = status
    assert f"does not answer (HTTP status {status})" in notices_of(BART)[0]
    message = refusal(CONTEXT_ENCODER)
    assert ("too many requests" if status == 429 else "is out of order") in message
    assert str(status) in message


def test_the_whole_rag_checkpoint_comes_from_the_cache_without_a_network(hub: HubServer) -> None:
    pinned = pin_source(RAG_TOKEN)
    fill_cache(RAG_TOKEN)
    hub.stop()
    assert notices_of(pinned) == []


# A hub that goes silent once it has listed the files


@pytest.mark.parametrize("stage", ["tree", "files"])
def test_a_hub_that_goes_silent_after_its_listing_is_an_error_in_time(hub: HubServer, quick: None, stage: str) -> None:
    hub.tree_mood, hub.download_mood = ("silent", "") if stage == "tree" else ("", "silent")
    started = time.monotonic()
    assert f"The hub {hub.url} cannot be reached (no answer in time)" in refusal()
    hub.requests.clear()
    assert "(no answer in time)" in refusal(CONTEXT_ENCODER)
    assert time.monotonic() - started < IN_TIME
    assert hub.requests == [], "the hub was asked again for another model"


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
    assert time.monotonic() - started < IN_TIME


def test_files_of_another_tool_are_used_if_the_hub_goes_silent_after_its_listing(
    hub: HubServer, quick: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = Path(resolve_model_source(BART))
    revision.forget()
    shutil.rmtree(folder.parents[1] / "trees")
    monkeypatch.setattr(_tree_cache, "_IN_MEMORY_TREE_CACHE", {})
    hub.tree_mood = "silent"
    started = time.monotonic()
    with pytest.warns(ModelNotice, match="does not say whether it has all files"):
        assert resolve_model_source(BART) == str(folder)
    assert time.monotonic() - started < IN_TIME


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
