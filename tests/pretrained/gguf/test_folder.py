"""GGUF files as model sources: the folder made of one equals the model it was written from, and is made once."""

from __future__ import annotations

import shutil
import sys
import warnings
from pathlib import Path

import gguf
import pytest
import torch
from transformers import AutoModelForCausalLM, GenerationConfig, GgufConfig

from rag_core.errors import ConfigError, ModelNotice
from rag_core.pretrained.gguf import cache, conversion
from rag_core.pretrained.model_source import (
    absolute_source,
    load_tokenizer,
    pin_source,
    recorded_source,
    resolve_model_source,
)
from rag_core.verification.verification import verify
from tests.support.models.tiny_gguf import CHAT, END, END_OF_TURN, START, TOKENS, tiny_llama, write_gguf

Q8_0 = gguf.GGMLQuantizationType.Q8_0


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each test has its own cache, and nothing was checked before."""
    monkeypatch.setenv("RAG_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(cache, "_checked", set())


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return write_gguf(tmp_path / "tiny.gguf")


def notices_of(source: str | Path) -> tuple[str, list[str]]:
    """The folder of a source, and the notices that resolving it gives."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        folder = resolve_model_source(source)
    return folder, [str(warning.message) for warning in caught if issubclass(warning.category, ModelNotice)]


def weights_of(folder: str | Path, **options: object) -> dict[str, torch.Tensor]:
    model, report = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True, **options)
    assert not any(report.values())
    return dict(model.state_dict())


def assert_equal(weights: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert weights.keys() == expected.keys()
    for name, tensor in weights.items():
        assert tensor.dtype == torch.float32
        assert torch.equal(tensor, expected[name]), name


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_the_folder_is_the_model_that_the_file_was_written_from(tmp_path: Path, tied: bool) -> None:
    original = tiny_llama(tied=tied)
    folder = resolve_model_source(write_gguf(tmp_path / "model.gguf", original))
    assert_equal(weights_of(folder), original.state_dict())
    model = AutoModelForCausalLM.from_pretrained(folder)
    tokens = torch.arange(20)[None]
    assert torch.equal(model(tokens).logits, original(tokens).logits)
    assert (model.lm_head.weight.data_ptr() == model.model.embed_tokens.weight.data_ptr()) == tied


def test_quantised_weights_are_what_gguf_and_transformers_unpack_to_the_bit(tmp_path: Path) -> None:
    original = tiny_llama()
    file = write_gguf(tmp_path / "model.gguf", original, kind=Q8_0)
    weights = weights_of(resolve_model_source(file))
    direct = weights_of(tmp_path, gguf_file=file.name, quantization_config=GgufConfig(dequantize=True))
    assert_equal(weights, direct)
    # A row that llama.cpp does not reorder, by gguf's own rules.
    value = "model.layers.1.self_attn.v_proj.weight"
    packed = gguf.quantize(original.state_dict()[value].numpy(), Q8_0)
    assert torch.equal(weights[value], torch.from_numpy(gguf.dequantize(packed, Q8_0)))
    assert not torch.equal(weights[value], original.state_dict()[value])


def test_tokens_chat_template_and_ends_are_those_of_the_file(file: Path) -> None:
    folder = resolve_model_source(file)
    tokenizer = load_tokenizer(folder)
    assert tokenizer.convert_ids_to_tokens(range(len(TOKENS))) == list(TOKENS)
    assert len(tokenizer) == len(TOKENS)
    assert (tokenizer.eos_token, tokenizer.pad_token, tokenizer.bos_token) == (END, END, START)
    assert tokenizer.chat_template == CHAT
    text = tokenizer.apply_chat_template([{"role": "user", "content": "the café"}], tokenize=False)
    tokens = tokenizer(text)["input_ids"]
    assert tokens[0] == TOKENS.index(START)
    assert tokens[-2] == TOKENS.index(END_OF_TURN)
    assert tokenizer.decode(tokens) == text
    generation = GenerationConfig.from_pretrained(folder)
    assert generation.eos_token_id == [TOKENS.index(END), TOKENS.index(END_OF_TURN)]
    assert generation.pad_token_id == TOKENS.index(END)


def test_text_is_split_as_the_file_says(tmp_path: Path) -> None:
    def pieces(split: str) -> list[str]:
        folder, notices = notices_of(write_gguf(tmp_path / split / "model.gguf", split=split))
        assert ("splits text in a way" in " ".join(notices)) == (split == "viking")
        return load_tokenizer(folder).tokenize("the  1984")

    assert pieces("gpt-2") == ["the", "Ġ", "Ġ", "19", "8", "4"]
    # Single digits come first, so the two spaces stand alone and become one token.
    assert pieces("smollm") == ["the", "ĠĠ", "1", "9", "8", "4"]
    assert pieces("viking") == pieces("gpt-2")


def test_an_architecture_that_was_not_compared_says_so(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(conversion, "COMPARED", ("gemma3",))
    _, notices = notices_of(file)
    assert "of this architecture (llama) was not compared with original models" in notices[-1]


def test_files_beside_it_are_not_read(file: Path) -> None:
    for name in ("config.json", "tokenizer_config.json", "tokenizer.json", "generation_config.json"):
        (file.parent / name).write_text('{"auto_map": {"AutoTokenizer": ["own.Tokenizer", null]}, "eos_token_id": 7}')
    tokenizer = load_tokenizer(resolve_model_source(file))
    assert tokenizer.eos_token == END


def test_it_is_dequantised_once_and_says_so(file: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    folder, notices = notices_of(file)
    assert notices == [f"{file}: dequantising it into {folder} (once; 0.1 MB in float32) …"]
    assert Path(folder).parent == tmp_path / "cache" / "gguf"
    made = (Path(folder) / "model.safetensors").stat().st_mtime_ns
    copy = shutil.copy(file, tmp_path / "copy.gguf")
    assert notices_of(file) == notices_of(str(copy)) == (folder, [])
    assert (Path(folder) / "model.safetensors").stat().st_mtime_ns == made
    assert capfd.readouterr() == ("", ""), "progress bars"


def test_a_changed_file_is_another_model(file: Path) -> None:
    before = resolve_model_source(file)
    content = bytearray(file.read_bytes())
    content[-3] ^= 1
    file.write_bytes(content)
    after = resolve_model_source(file)
    assert before != after
    last = [next(reversed(weights_of(folder).items())) for folder in (before, after)]
    assert last[0][0] == last[1][0]


@pytest.mark.parametrize("fault", ["cut", "changed", "no manifest", "no weights"])
def test_a_damaged_folder_in_the_cache_is_made_again(file: Path, fault: str, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, _ = notices_of(file)
    weights = Path(folder) / "model.safetensors"
    whole = weights.read_bytes()
    match fault:
        case "cut":
            weights.write_bytes(whole[:-5])
        case "changed":
            weights.write_bytes(whole[:-5] + b"12345")
        case "no manifest":
            (Path(folder) / "manifest.json").unlink()
        case "no weights":
            weights.unlink()
    monkeypatch.setattr(cache, "_checked", set())  # as in another process
    again, notices = notices_of(file)
    assert again == folder
    assert [notice for notice in notices if "is damaged; dequantising it" in notice]
    assert weights.read_bytes() == whole


def test_rag_verify_knows_the_folder(file: Path) -> None:
    folder = Path(resolve_model_source(file))
    assert verify(folder).findings == []
    (folder / "config.json").write_text("{}")
    report = verify(folder)
    assert report.remedy(report.findings[0]) == (
        f"Make it again: delete the folder; the next command that names {file} makes it"
    )


def test_names_of_files_mean_the_same_in_every_folder(
    file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert recorded_source("tiny.gguf") == "tiny.gguf"
    assert pin_source("tiny.gguf") == absolute_source("tiny.gguf") == str(file)
    assert not (tmp_path / "cache").exists(), "a name is pinned without reading the weights"
    folder = resolve_model_source("tiny.gguf")
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert resolve_model_source(str(file)) == folder


def test_a_file_in_a_package_is_found_and_the_packages_code_is_not_imported(
    file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    package = tmp_path / "packages" / "weights_of_a_test"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("raise SystemExit('imported')")
    shutil.copy(file, package / "tiny.gguf")
    monkeypatch.syspath_prepend(str(package.parent))
    name = "package:weights_of_a_test/tiny.gguf"
    assert pin_source(name) == recorded_source(name) == absolute_source(name) == name
    folder, notices = notices_of(name)
    assert folder == resolve_model_source(file)
    assert notices[0].startswith(f"{name}: dequantising it")
    assert "weights_of_a_test" not in sys.modules
    with pytest.raises(ConfigError, match=r"weights_of_a_test' has no file 'other.gguf': it has tiny.gguf in "):
        resolve_model_source("package:weights_of_a_test/other.gguf")
    with pytest.raises(ConfigError, match=r"package 'no_such_package' .* is not installed"):
        resolve_model_source("package:no_such_package/tiny.gguf")
