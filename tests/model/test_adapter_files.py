"""Folders of adapters: written, read back, found by PEFT and Transformers, and refused where they do not fit."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM, LlamaConfig, LlamaForCausalLM

from rag_core.embeddings.text_encoder import fingerprint_of_weights
from rag_core.errors import ConfigError
from rag_core.model.adapters.adapter_files import load_adapted, write_adapters
from rag_core.model.adapters.lora import base_of
from rag_core.model.adapters.merging import write_merged
from rag_core.model.rag_model import RagModel
from rag_core.model.reader import DecodingConfig, load_generator
from tests.support.models.adapters import make_adapters, with_adapters
from tests.support.small_corpus import make_encoder, make_generator, make_index, model_config

IDS_BS = torch.tensor([[8, 9, 10, 11]])


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with an encoder, a generator, and adapters for it."""
    folder = tmp_path_factory.mktemp("adapters")
    make_adapters(folder / "adapters", make_generator(folder / "generator", make_encoder(folder / "encoder")))
    return folder


@pytest.fixture
def own(parts: Path, tmp_path: Path) -> Path:
    """A copy of the adapters that a test may change."""
    return Path(shutil.copytree(parts / "adapters", tmp_path / "model" / "generator"))


def logits(generator: Any) -> torch.Tensor:
    with torch.inference_mode():
        result: torch.Tensor = generator(input_ids=IDS_BS, decoder_input_ids=IDS_BS).logits
    return result


def change(file: Path, **values: Any) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | values))


def test_adapters_are_read_back_as_they_were_written(parts: Path, tmp_path: Path) -> None:
    generator, tokenizer = load_generator(parts / "adapters")
    assert type(generator) is type(load_generator(parts / "generator")[0])
    base = base_of(generator)
    assert base is not None
    assert base.source == str(parts / "generator")
    assert base.fingerprint == fingerprint_of_weights(load_generator(parts / "generator")[0])
    expected = with_adapters(load_generator(parts / "generator")[0])
    assert torch.equal(logits(generator), logits(expected))
    assert not torch.allclose(logits(generator), logits(load_generator(parts / "generator")[0]), rtol=1e-2)
    write_adapters(generator, tmp_path / "again")
    for name in ("adapter_model.safetensors", "adapter_config.json", "base_model.json"):
        assert (tmp_path / "again" / name).read_bytes() == (parts / "adapters" / name).read_bytes()
    assert tokenizer.tokenize("cork") == ["cork"]


def test_a_folder_of_adapters_holds_no_weights_of_the_base(parts: Path) -> None:
    names = {file.name for file in (parts / "adapters").iterdir()}
    assert names >= {"adapter_model.safetensors", "adapter_config.json", "base_model.json"}
    assert not names & {"model.safetensors", "config.json"}
    assert all("lora_" in name for name in load_file(parts / "adapters" / "adapter_model.safetensors"))


# Transformers gives the encoder a pooler, which nothing reads and we leave out, so PEFT finds no adapter for it.
@pytest.mark.filterwarnings("ignore:Found missing adapter keys", "ignore:`is_gradient_checkpointing` is deprecated")
def test_peft_and_transformers_read_our_adapters(parts: Path) -> None:
    from peft import PeftModel

    expected = logits(load_generator(parts / "adapters")[0])
    base = AutoModelForSeq2SeqLM.from_pretrained(parts / "generator").eval()
    torch.testing.assert_close(logits(PeftModel.from_pretrained(base, str(parts / "adapters")).eval()), expected)


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated")
def test_adapters_that_peft_wrote_are_read(parts: Path, tmp_path: Path) -> None:
    from peft import LoraConfig, get_peft_model

    base = AutoModelForSeq2SeqLM.from_pretrained(parts / "generator").eval()
    settings = LoraConfig(r=2, lora_alpha=3, target_modules=["query", "intermediate.dense"], use_rslora=True)
    theirs: Any = get_peft_model(base, settings).eval()
    for name, weight in theirs.named_parameters():
        if "lora_B" in name:
            weight.data.normal_(std=0.3)
    theirs.save_pretrained(tmp_path / "theirs")
    generator, tokenizer = load_generator(tmp_path / "theirs")
    torch.testing.assert_close(logits(generator), logits(theirs))
    assert tokenizer.tokenize("cork") == ["cork"], "the base's tokenizer, as the folder has none"


@pytest.mark.parametrize("tied", [False, True])
def test_adapters_of_a_decoder_only_model_are_read_by_us_and_by_transformers_and_merged(
    tmp_path: Path, tied: bool
) -> None:
    sizes = {"vocab_size": 40, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "bos_token_id": 1, "eos_token_id": 2}
    LlamaForCausalLM(LlamaConfig(**sizes, **heads, tie_word_embeddings=tied)).save_pretrained(tmp_path / "base")

    def load(source: str, dtype: str = "float32") -> Any:
        return AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32).eval()

    with torch.inference_mode():
        adapted = with_adapters(load(str(tmp_path / "base")), source=str(tmp_path / "base"))
        expected = adapted(IDS_BS).logits
        write_adapters(adapted, tmp_path / "adapters")
        ours, tokenizer_at = load_adapted(tmp_path / "adapters", load)
        assert torch.equal(ours(IDS_BS).logits, expected)
        assert tokenizer_at == str(tmp_path / "base")
        torch.testing.assert_close(load(str(tmp_path / "adapters"))(IDS_BS).logits, expected)
        write_merged(ours, tmp_path / "merged", torch.float32)
        merged = load(str(tmp_path / "merged"))
        assert not hasattr(merged, "peft_config")
        torch.testing.assert_close(merged(IDS_BS).logits, expected, rtol=1e-4, atol=1e-4)
    assert ("lm_head.weight" in load_file(tmp_path / "merged" / "model.safetensors")) is not tied


def test_a_rag_model_saves_adapters_and_answers_as_before(parts: Path, tmp_path: Path) -> None:
    model = RagModel.from_parts(model_config(parts / "encoder", parts / "adapters")).eval()
    model.save_pretrained(tmp_path / "model")
    again = RagModel.from_pretrained(tmp_path / "model")
    assert again.fingerprint() == model.fingerprint()
    assert not (tmp_path / "model" / "generator" / "model.safetensors").exists()
    index = make_index(tmp_path / "index", parts / "encoder")
    decoding = DecodingConfig(num_beams=2, max_new_tokens=5, precision="float32")
    options: dict[str, Any] = {"variant": "token", "decoding": decoding}
    questions = ["which country is Oslo in?"]
    assert again.answer(questions, index, **options) == model.answer(questions, index, **options)
    bare = RagModel.from_parts(model_config(parts / "encoder", parts / "generator")).eval()
    assert bare.answer(questions, index, **options)[0].log_prob != model.answer(questions, index, **options)[0].log_prob


def test_a_base_that_moved_with_its_neighbours_is_found(parts: Path, tmp_path: Path) -> None:
    shutil.copytree(parts / "generator", tmp_path / "old" / "generator")
    make_adapters(tmp_path / "old" / "rag-token" / "generator", tmp_path / "old" / "generator")
    (tmp_path / "old").rename(tmp_path / "new")
    generator, _ = load_generator(tmp_path / "new" / "rag-token" / "generator")
    assert torch.equal(logits(generator), logits(load_generator(parts / "adapters")[0]))


def test_a_missing_base_is_named_with_what_to_do(own: Path) -> None:
    change(own / "base_model.json", source="/nowhere/base")
    with pytest.raises(ConfigError, match=r"holds LoRA adapters only, and their base /nowhere/base.*`rag export`"):
        load_generator(own)


def test_another_base_is_refused(parts: Path, own: Path, tmp_path: Path) -> None:
    other = Path(shutil.copytree(parts / "generator", tmp_path / "other"))
    weights = load_file(other / "model.safetensors")
    name = next(name for name in weights if name.endswith("LayerNorm.bias"))
    save_file(weights | {name: weights[name] + 1e-3}, other / "model.safetensors", metadata={"format": "pt"})
    change(own / "base_model.json", source=str(other))
    with pytest.raises(ConfigError, match=r"adapters of another model than .*other: its weights have the fingerprint"):
        load_generator(own)


def test_a_base_of_another_shape_is_refused_though_no_fingerprint_is_known(own: Path, tmp_path: Path) -> None:
    (own / "base_model.json").unlink()
    encoder = make_encoder(tmp_path / "wide", hidden_size=64)
    change(own / "adapter_config.json", base_model_name_or_path=str(make_generator(tmp_path / "other", encoder)))
    with pytest.raises(ConfigError, match=r"The adapters do not fit their base .*other: \d+ of their weights"):
        load_generator(own)


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"peft_type": "LOHA"}, "adapters of the type LOHA, but only LoRA"),
        ({"use_dora": True}, "a special kind: adapter_config.json sets use_dora=True"),
        ({"modules_to_save": ["lm_head"]}, r"sets modules_to_save=\['lm_head'\]"),
        ({"bias": "all"}, "sets bias='all'"),
        ({"init_lora_weights": "pissa"}, "sets init_lora_weights='pissa'"),
        ({"an_invention": 3}, "sets an_invention=3"),
        ({"r": None}, r"damaged"),
    ],
)
def test_adapters_other_than_plain_lora_are_refused_by_name(own: Path, values: dict[str, Any], words: str) -> None:
    change(own / "adapter_config.json", **values)
    with pytest.raises(ConfigError, match=words):
        load_generator(own)


def test_damaged_or_missing_files_are_named(own: Path) -> None:
    content = (own / "adapter_model.safetensors").read_bytes()
    (own / "adapter_model.safetensors").write_bytes(content[:-8])
    with pytest.raises(ConfigError, match=r"adapter_model\.safetensors is damaged"):
        load_generator(own)
    (own / "adapter_model.safetensors").unlink()
    with pytest.raises(ConfigError, match=r"has no adapter_model\.safetensors"):
        load_generator(own)
    change(own / "base_model.json", fingerprint=None)
    with pytest.raises(ConfigError, match=r"base_model\.json is damaged"):
        load_generator(own)


def test_adapters_of_adapters_are_refused(parts: Path, own: Path) -> None:
    change(own / "base_model.json", source=str(parts / "adapters"))
    with pytest.raises(ConfigError, match="adapters of adapters cannot be loaded"):
        load_generator(own)
