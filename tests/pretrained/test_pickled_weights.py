"""Weights in pickles: tensors are read from them, everything else is refused, and nothing in them is ever run."""

from __future__ import annotations

import json
import os
import pickle
import shutil
import tarfile
from collections import OrderedDict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModel

from rag_core.embeddings.text_encoder import TextEncoder
from rag_core.errors import ConfigError, ModelNotice
from rag_core.pretrained.model_source import load_from_source, load_weights
from tests.support.small_corpus import FACTS, make_encoder

TEXTS = [text for _, _, text in FACTS]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_encoder(tmp_path_factory.mktemp("whole") / "bert")


@pytest.fixture
def folder(tmp_path: Path, whole: Path) -> Path:
    """A model folder whose weights are to be put into pickles; those in safetensors are at `whole`."""
    folder = Path(shutil.copytree(whole, tmp_path / "changed-model"))
    (folder / "model.safetensors").unlink()
    return folder


def weights_of(whole: Path) -> dict[str, Any]:
    return dict(load_file(whole / "model.safetensors"))


class MakesAFolder:
    """Makes a folder when it is unpickled without care."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.marker),)


@pytest.mark.parametrize("new_format", [True, False], ids=["zip", "before PyTorch 1.6"])
def test_pickled_tensors_are_read_and_give_the_same_vectors_as_safetensors(
    folder: Path, whole: Path, new_format: bool
) -> None:
    weights = OrderedDict(weights_of(whole))
    torch.save(weights, folder / "pytorch_model.bin", _use_new_zipfile_serialization=new_format)
    with pytest.warns(ModelNotice, match=r"changed-model has pickled weights \(pytorch_model\.bin\); only tensors"):
        pickled = TextEncoder.from_pretrained(folder)
    safe = TextEncoder.from_pretrained(whole)
    np.testing.assert_array_equal(pickled.encode(TEXTS), safe.encode(TEXTS))
    assert pickled.fingerprint() == safe.fingerprint()


def test_pickles_in_shards_are_read(folder: Path, whole: Path) -> None:
    weights = weights_of(whole)
    names = sorted(weights)
    shards = {f"pytorch_model-{at + 1:05d}-of-00002.bin": names[at::2] for at in range(2)}
    for shard, part in shards.items():
        torch.save({name: weights[name] for name in part}, folder / shard)
    weight_map = {name: shard for shard, part in shards.items() for name in part}
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    with pytest.warns(ModelNotice, match="00001-of-00002.bin and 1 more"):
        assert TextEncoder.from_pretrained(folder).fingerprint() == TextEncoder.from_pretrained(whole).fingerprint()
    torch.save({"weights": [1, 2]}, folder / "pytorch_model-00002-of-00002.bin")
    with pytest.raises(
        ConfigError, match=r"00002-of-00002\.bin is not a state dict of tensors: its entry 'weights' is a list"
    ):
        TextEncoder.from_pretrained(folder)


def test_safetensors_are_preferred_and_the_pickle_beside_them_is_not_opened(folder: Path, whole: Path) -> None:
    shutil.copy(whole / "model.safetensors", folder)
    (folder / "pytorch_model.bin").write_bytes(b"no pickle at all")
    assert TextEncoder.from_pretrained(folder).fingerprint() == TextEncoder.from_pretrained(whole).fingerprint()


@pytest.mark.parametrize("trust", [False, True])
@pytest.mark.parametrize("new_format", [True, False], ids=["zip", "before PyTorch 1.6"])
def test_a_pickle_that_would_run_code_is_refused_and_runs_none(
    folder: Path, whole: Path, tmp_path: Path, trust: bool, new_format: bool
) -> None:
    marker, file = tmp_path / "code-was-run", folder / "pytorch_model.bin"
    hostile = weights_of(whole) | {"surplus": MakesAFolder(marker)}
    torch.save(hostile, file, _use_new_zipfile_serialization=new_format)
    with pytest.raises(ConfigError, match=r"pytorch_model\.bin .*more than tensors .*mkdir.*any code.*safetensors"):
        TextEncoder.from_pretrained(folder, trust_remote_code=trust)
    # Other parts are loaded without the check, by Transformers' default.
    with pytest.raises(ConfigError, match="changed-model"):
        load_from_source(AutoModel.from_pretrained, str(folder))
    assert not marker.exists()
    # The pickle really is hostile: loading it without care runs its code.
    torch.load(file, weights_only=False)
    assert marker.exists()


def test_a_hostile_pickle_that_an_index_of_safetensors_names_is_refused(
    folder: Path, whole: Path, tmp_path: Path
) -> None:
    marker = tmp_path / "code-was-run"
    torch.save(weights_of(whole) | {"surplus": MakesAFolder(marker)}, folder / "other.bin")
    index: dict[str, Any] = {"metadata": {}, "weight_map": {"embeddings.LayerNorm.bias": "other.bin"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ConfigError, match=r"other\.bin .*more than tensors"):
        TextEncoder.from_pretrained(folder)
    assert not marker.exists()
    index["weight_map"]["embeddings.LayerNorm.bias"] = "../other.bin"
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ConfigError, match=r"names weights outside its folder \(\.\./other\.bin\)"):
        TextEncoder.from_pretrained(folder)


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ([torch.zeros(2)], "holds a list, where a state dict was expected"),
        ({}, "holds a dict, where a state dict was expected"),
        (torch.zeros(2), "holds a Tensor, where a state dict was expected"),
        ({"state_dict": {"a": torch.zeros(2)}}, "not a state dict of tensors: its entry 'state_dict' is a dict"),
        ({"a": torch.zeros(2), "epoch": 3}, "not a state dict of tensors: its entry 'epoch' is a int"),
        ({1: torch.zeros(2)}, "not a state dict of tensors: its entry 1 is a Tensor"),
    ],
)
def test_content_other_than_a_state_dict_is_refused_by_name_with_a_remedy(
    folder: Path, content: object, reason: str
) -> None:
    torch.save(content, folder / "pytorch_model.bin")
    with pytest.raises(
        ConfigError, match=rf"changed-model/pytorch_model\.bin .*{reason}.*torch\.save\(model\.state_dict"
    ):
        TextEncoder.from_pretrained(folder)


@pytest.mark.filterwarnings("ignore:.*torch.jit.*:DeprecationWarning")
def test_torchscript_and_tar_archives_are_refused(folder: Path, tmp_path: Path) -> None:
    file = folder / "pytorch_model.bin"
    torch.jit.save(torch.jit.trace(torch.nn.Linear(2, 2), torch.zeros(1, 2)), str(file))
    with pytest.raises(ConfigError, match=r"pytorch_model\.bin is a TorchScript archive, which is a program"):
        TextEncoder.from_pretrained(folder)
    (tmp_path / "pickle").write_bytes(pickle.dumps({"a": 1}))
    with tarfile.open(file, "w") as archive:
        archive.add(tmp_path / "pickle", "pickle")
    with pytest.raises(ConfigError, match=r"pytorch_model\.bin is in PyTorch's oldest format \(tar\)"):
        TextEncoder.from_pretrained(folder)


@pytest.mark.parametrize("kept", [0, 1, 100, 5000, -30])
def test_damaged_pickles_are_refused_by_name(folder: Path, whole: Path, kept: int) -> None:
    file = folder / "pytorch_model.bin"
    torch.save(weights_of(whole), file)
    content = file.read_bytes()
    for damaged in (content[:kept], b"garbage" * 100, content[: len(content) // 2] + b"x" * 99):
        file.write_bytes(damaged)
        with pytest.raises(ConfigError, match=r"pytorch_model\.bin is damaged"):
            TextEncoder.from_pretrained(folder)


def test_transformers_and_torch_are_told_to_read_only_tensors(
    folder: Path, whole: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.save(weights_of(whole), folder / "pytorch_model.bin")
    calls: list[tuple[str, bool]] = []
    torch_load = torch.load

    def spy_on_torch(*args: Any, **options: Any) -> Any:
        calls.append(("torch", options["weights_only"]))
        return torch_load(*args, **options)

    def spy_on_transformers(source: str, **options: Any) -> Any:
        calls.append(("transformers", options["weights_only"]))
        return AutoModel.from_pretrained(source, **options)

    monkeypatch.setattr(torch, "load", spy_on_torch)
    load_weights(spy_on_transformers, str(folder), may_lack=(), trust_remote_code=True)
    assert calls == [("torch", True), ("transformers", True), ("torch", True)]
