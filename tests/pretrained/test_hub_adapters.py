"""LoRA adapters and bases on a hub: pinned by commit, downloaded once, and named in the files."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from rag_core.model.adapters.adapter_files import write_adapters
from rag_core.model.adapters.lora import LoraSettings, base_of
from rag_core.model.reader import load_generator
from rag_core.pretrained.hub import revision
from rag_core.pretrained.model_source import pin_source
from tests.support.models.adapters import with_adapters
from tests.support.models.hub_models import BART, NOT_NEEDED, files_of
from tests.support.servers.hub_server import HubServer

pytest_plugins = ["tests.support.hub_fixtures"]
pytestmark = pytest.mark.filterwarnings("ignore:.*has pickled weights")
IDS_BS = torch.tensor([[5, 6, 7, 2]])


def logits(name: str | Path) -> torch.Tensor:
    generator, _ = load_generator(name)
    with torch.inference_mode():
        result: torch.Tensor = generator(input_ids=IDS_BS, decoder_input_ids=IDS_BS).logits
    return result


def test_adapters_of_a_hub_model_name_its_commit_and_stay_with_it(hub: HubServer, tmp_path: Path) -> None:
    pinned = pin_source(BART)
    generator = with_adapters(load_generator(pinned)[0], LoraSettings(rank=2), pinned)
    write_adapters(generator, tmp_path / "adapters")
    config = json.loads((tmp_path / "adapters" / "adapter_config.json").read_text())
    assert (config["base_model_name_or_path"], config["revision"]) == (BART, pinned.partition("@")[2])
    assert json.loads((tmp_path / "adapters" / "base_model.json").read_text())["source"] == pinned
    expected = logits(tmp_path / "adapters")
    hub.publish(BART, {"config.json": b"{}", "pytorch_model.bin": b"another"})
    hub.requests.clear()
    revision.forget()
    assert torch.equal(logits(tmp_path / "adapters"), expected)
    assert hub.requests == [], "a pinned base is in the cache"


def test_adapters_on_a_hub_are_downloaded_with_their_base(hub: HubServer, tmp_path: Path) -> None:
    pinned = pin_source(BART)
    write_adapters(with_adapters(load_generator(pinned)[0], LoraSettings(rank=2), pinned), tmp_path / "adapters")
    expected = logits(tmp_path / "adapters")
    (tmp_path / "adapters" / "base_model.json").unlink()  # as PEFT writes them
    hub.publish("someone/bart-lora", files_of(tmp_path / "adapters") | NOT_NEEDED)
    hub.requests.clear()
    generator, _ = load_generator("someone/bart-lora")
    assert {"adapter_config.json", "adapter_model.safetensors"} <= set(hub.files())
    assert set(hub.files()).isdisjoint(NOT_NEEDED)
    base = base_of(generator)
    assert base is not None
    assert base.source == pinned
    assert torch.equal(logits("someone/bart-lora"), expected)
