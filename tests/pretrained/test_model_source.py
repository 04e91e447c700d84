"""Model folders: which are loaded, which are refused, and that code in them never runs unless trusted."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file
from transformers import AutoModel, dynamic_module_utils

from rag_core.embeddings.text_encoder import TextEncoder
from rag_core.errors import ConfigError
from rag_core.pretrained.model_source import load_config, load_tokenizer, load_weights, resolve_model_source
from tests.support.small_corpus import make_encoder


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_encoder(tmp_path_factory.mktemp("whole") / "bert")


@pytest.fixture
def folder(tmp_path: Path, whole: Path) -> Path:
    """A model folder to change."""
    return Path(shutil.copytree(whole, tmp_path / "changed-model"))


def _edit(file: Path, **entries: Any) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | entries))


def _code(marker: Path, *classes: str) -> str:
    """A module that makes a folder when it is imported, and has classes of these names."""
    return f"import os\nos.mkdir({str(marker)!r})\n" + "".join(f"class {name}: pass\n" for name in classes)


@pytest.mark.parametrize("file", ["config.json", "tokenizer_config.json"])
def test_code_beside_a_model_of_a_known_kind_is_refused_and_run_only_if_trusted(
    folder: Path, tmp_path: Path, file: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    marker = tmp_path / "code-was-run"
    code = _code(marker, "OwnModel(BertModel)", "OwnTokenizer(BertTokenizer)")
    (folder / "own_code.py").write_text(f"from transformers import BertModel, BertTokenizer\n{code}")
    monkeypatch.setattr(dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.syspath_prepend(str(tmp_path / "modules"))
    own: dict[str, Any] = {"AutoModel": "own_code.OwnModel"}
    own = own if file == "config.json" else {"AutoTokenizer": ["own_code.OwnTokenizer", None]}
    _edit(folder / file, auto_map=own)
    with pytest.raises(ConfigError, match=rf"changed-model needs code of its own \({file} .*--trust-remote-code"):
        TextEncoder.from_pretrained(folder)
    assert not marker.exists()
    TextEncoder.from_pretrained(folder, trust_remote_code=True)
    assert marker.exists()


def test_a_model_that_needs_code_of_its_own_is_refused_and_its_code_is_not_run(folder: Path, tmp_path: Path) -> None:
    marker = tmp_path / "code-was-run"
    (folder / "own_code.py").write_text(_code(marker, "OwnConfig", "OwnModel"))
    auto_map = {"AutoConfig": "own_code.OwnConfig", "AutoModel": "own_code.OwnModel"}
    _edit(folder / "config.json", auto_map=auto_map, model_type="own-kind", architectures=["OwnModel"])
    with pytest.raises(ConfigError, match=r"changed-model needs code of its own .*is not run unless you trust it"):
        TextEncoder.from_pretrained(folder)
    assert not marker.exists()


@pytest.mark.parametrize("file", ["config.json", "tokenizer_config.json"])
def test_code_in_another_repository_is_refused_also_if_trusted(folder: Path, file: str) -> None:
    other = "org/other-model--own_code.Own"
    _edit(folder / file, auto_map={"AutoModel": other} if file == "config.json" else {"AutoTokenizer": [None, other]})
    with pytest.raises(ConfigError, match=rf"code of another repository, org/other-model \({file} has '{other}'"):
        TextEncoder.from_pretrained(folder, trust_remote_code=True)


def test_a_module_class_of_a_sentence_transformers_folder_is_not_imported(folder: Path, tmp_path: Path) -> None:
    marker = tmp_path / "code-was-run"
    (folder / "text_encoder.json").unlink()
    (folder / "own_code.py").write_text(_code(marker, "Transformer"))
    (folder / "modules.json").write_text('[{"idx": 0, "name": "0", "path": "", "type": "own_code.Transformer"}]')
    with pytest.raises(ConfigError, match=r"changed-model: modules.json lists own_code.Transformer; "):
        TextEncoder.from_pretrained(folder)
    assert not marker.exists()


def test_parameters_that_are_missing_are_refused_and_not_filled_with_random_numbers(folder: Path) -> None:
    _edit(folder / "config.json", num_hidden_layers=3)
    with pytest.raises(ConfigError, match=r"changed-model lacks 16 parameters of a BertModel \(encoder.layer.2\."):
        TextEncoder.from_pretrained(folder)


def test_weights_of_another_architecture_are_refused(folder: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    renamed = {f"ctx_encoder.bert_model.{name}": tensor for name, tensor in weights.items()}
    save_file(renamed, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ConfigError, match=r"changed-model lacks \d+ parameters of a BertModel"):
        TextEncoder.from_pretrained(folder)


def test_only_parameters_that_do_not_matter_may_be_missing(folder: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    kept = {name: tensor for name, tensor in weights.items() if not name.startswith("pooler.")}
    save_file(kept, folder / "model.safetensors", metadata={"format": "pt"})
    load_weights(AutoModel.from_pretrained, str(folder), may_lack=("pooler.", "head."))
    with pytest.raises(ConfigError, match=r"changed-model lacks 2 parameters of a BertModel \(pooler.dense.bias"):
        load_weights(AutoModel.from_pretrained, str(folder), may_lack="head.")


def test_a_local_folder_is_a_model_if_it_holds_a_config_or_modules(folder: Path) -> None:
    assert resolve_model_source(folder) == str(folder)
    (folder / "config.json").rename(folder / "modules.json")
    assert resolve_model_source(str(folder)) == str(folder)
    (folder / "modules.json").unlink()
    with pytest.raises(ConfigError, match=r"changed-model has no config.json"):
        resolve_model_source(folder)


def test_a_name_that_cannot_be_a_hub_name_is_refused_as_a_path(folder: Path) -> None:
    with pytest.raises(ConfigError, match=r"config.json is a file; a model folder"):
        resolve_model_source(folder / "config.json")
    for path in (str(folder / "nowhere"), "./nowhere", "runs/one/model"):
        with pytest.raises(ConfigError, match="There is no model folder"):
            resolve_model_source(path)


def test_a_tokenizer_is_loaded_from_the_subfolder_that_is_asked_for(folder: Path) -> None:
    (folder / "inside").mkdir()
    for file in folder.glob("tokenizer*"):
        file.rename(folder / "inside" / file.name)
    (folder / "config.json").rename(folder / "inside" / "config.json")
    assert load_tokenizer(str(folder), subfolder="inside")("Lyon")["input_ids"][0] == 2


@pytest.mark.parametrize(
    "settings", [{"model_type": "bert", "num_hidden_layers": 10**400}, {"model_type": "gpt2", "n_layer": 501}]
)
def test_endless_layers_are_refused_before_any_is_made(settings: dict[str, object], tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(settings))
    with pytest.raises(ConfigError, match=r"config\.json has a \w+ of more than 500, which no model has"):
        load_config(str(tmp_path))
