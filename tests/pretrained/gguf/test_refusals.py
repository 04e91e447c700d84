"""GGUF files that cannot be used: each is refused in one paragraph that says what to do. And two processes at once."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from rag_core.errors import ConfigError
from rag_core.pretrained.model_source import resolve_model_source
from tests.storage.test_disk_refusals import mounted
from tests.support.models.tiny_gguf import tiny_llama, write_gguf

ROOT = Path(__file__).resolve().parents[3]
WAIT_SECONDS = 240
EMBEDDINGS = "model.embed_tokens.weight"


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAG_CACHE", str(tmp_path / "cache"))


def refusal_of(source: str | Path) -> str:
    """The message, which must be one paragraph; nothing may stay in the cache."""
    with pytest.raises(ConfigError) as caught:
        resolve_model_source(source)
    message = str(caught.value)
    assert "\n" not in message
    assert not list((Path(os.environ["RAG_CACHE"]) / "gguf").glob("*"))
    return message


@pytest.mark.parametrize(
    ("content", "found"),
    [(b"", "begins with b''"), (b"PK\x03\x04rest", r"begins with b'PK\x03\x04' and not with b'GGUF'")],
    ids=["empty", "zip"],
)
def test_another_file_with_that_ending(tmp_path: Path, content: bytes, found: str) -> None:
    file = tmp_path / "other.gguf"
    file.write_bytes(content)
    message = refusal_of(file)
    assert message.startswith(f"{file} is no GGUF file: it begins with ")
    assert found in message


@pytest.mark.parametrize("share", [0.001, 0.01, 0.1, 0.3, 0.6, 0.999])
def test_a_file_that_was_cut_off(tmp_path: Path, share: float) -> None:
    file = write_gguf(tmp_path / "model.gguf")
    content = file.read_bytes()
    file.write_bytes(content[: max(5, int(share * len(content)))])
    assert refusal_of(file).startswith(f"{file} is damaged or was cut off, or is of a version that cannot be read: ")


def test_a_header_that_says_it_goes_on_for_ever(tmp_path: Path) -> None:
    file = write_gguf(tmp_path / "model.gguf")
    content = bytearray(file.read_bytes())
    content[8:16] = (2**62).to_bytes(8, "little")  # the number of tensors
    file.write_bytes(content)
    assert "is damaged or was cut off" in refusal_of(file)


def _drop(name: str) -> Callable[[dict[str, np.ndarray]], None]:
    return lambda tensors: tensors.__delitem__(name)


def _add(name: str) -> Callable[[dict[str, np.ndarray]], None]:
    return lambda tensors: tensors.update({name: np.arange(1, 5, dtype=np.float32)})


def _not_finite(tensors: dict[str, np.ndarray]) -> None:
    name = "blk.1.ffn_up.weight"
    tensors[name] = tensors[name].copy()
    tensors[name][3, 5] = np.nan


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"architecture": "bert"}, "is an encoder (bert), but a generator was expected"),
        ({"architecture": "t5encoder"}, "is an encoder (t5encoder), but a generator was expected"),
        ({"architecture": "rwkv7"}, "Transformers cannot read the rwkv7 model"),
        ({"metadata": {"split.count": 3}}, "is one of 3 parts of a model. Join them first"),
        ({"metadata": {"llama.attention.sliding_window": 64}}, "limits attention to 64 tokens, which cannot be read"),
        ({"metadata": {"llama.rope.scaling.type": "yarn"}}, "stretches its rotary positions (yarn)"),
        ({"change": _add("rope_freqs.weight")}, "stretches its rotary positions in an unknown way (rope_freqs.weight)"),
        ({"change": _add("blk.0.attn_v.bias")}, "weights, but Transformers reads"),
        ({"change": _add("blk.2.attn_norm.weight")}, "weights, but Transformers reads"),
        (
            {"change": _drop("blk.1.ffn_up.weight")},
            "lacks 1 parameters of a LlamaForCausalLM (model.layers.1.mlp.up_pr",
        ),
        ({"change": _not_finite}, "its weights model.layers.1.mlp.up_proj.weight are not finite"),
    ],
    ids=[
        "bert",
        "t5encoder",
        "rwkv7",
        "part",
        "window",
        "yarn",
        "rope_freqs",
        "left over",
        "layer left over",
        "lacking",
        "nan",
    ],
)
def test_a_file_that_would_not_be_the_model_it_claims_to_be(
    tmp_path: Path, options: dict[str, object], words: str
) -> None:
    file = write_gguf(tmp_path / "model.gguf", **options)  # type: ignore[arg-type]
    message = refusal_of(file)
    assert words in message
    assert str(file) in message


def test_a_model_that_transformers_would_read_with_code_from_a_hub(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "kernels.py").write_text("raise SystemExit('imported')")
    monkeypatch.syspath_prepend(str(tmp_path))
    message = refusal_of(write_gguf(tmp_path / "model.gguf", architecture="lfm2"))
    assert "would download and run code with the installed package `kernels`" in message
    assert resolve_model_source(write_gguf(tmp_path / "llama.gguf")), "others are read without such code"


def test_a_file_that_is_not_there_is_no_hub_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert refusal_of("models/tiny.gguf").startswith("There is no model file models/tiny.gguf. Correct the path")
    assert "cannot be read from an object store" in refusal_of("s3://bucket/models/tiny.gguf")


def test_a_folder_that_holds_only_a_gguf_file_says_to_name_it(tmp_path: Path) -> None:
    file = write_gguf(tmp_path / "folder" / "tiny.gguf")
    assert refusal_of(file.parent).endswith(f"is not a model folder. To use its GGUF file, give {file}.")


def test_a_cache_without_room_or_access_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = write_gguf(tmp_path / "model.gguf", tiny_llama())
    with mounted(tmp_path / "small") as small:
        monkeypatch.setenv("RAG_CACHE", str(small))
        (small / "filling").write_bytes(bytes(980_000))
        message = refusal_of(file)
        assert f"The disk of the cache {small / 'gguf'} is full: {file} needs 0.1 MB there in float32" in message
        assert "set RAG_CACHE to a folder on a larger disk" in message
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("RAG_CACHE", str(tmp_path / "file"))
    assert f"{file} cannot be dequantised into the cache {tmp_path / 'file' / 'gguf'} (" in refusal_of(file)


# A process that stops in the middle of writing.
STOPS = """
import sys, time
from rag_core.pretrained.gguf import cache
from rag_core.pretrained.model_source import resolve_model_source

def stop_half_way(source, out):
    (out / "model.safetensors").write_text("half")
    print("half", flush=True)
    time.sleep(600)

cache.write_plain_folder = stop_half_way
resolve_model_source(sys.argv[1])
"""


def test_of_two_processes_one_waits_and_takes_over_when_the_other_is_killed(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    file = write_gguf(tmp_path / "model.gguf")
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    other = subprocess.Popen(
        [sys.executable, "-c", STOPS, str(file)], env=environment, stdout=subprocess.PIPE, text=True
    )
    try:
        assert other.stdout
        assert other.stdout.readline() == "half\n"
        with ThreadPoolExecutor(1) as threads:
            waiting = threads.submit(resolve_model_source, file)
            said, until = "", time.monotonic() + WAIT_SECONDS
            while f"is being written by another run (process {other.pid}" not in said:
                assert time.monotonic() < until
                assert not waiting.done()
                time.sleep(0.02)
                said += capfd.readouterr().err
            assert not list((tmp_path / "cache" / "gguf").glob("[!.]*")), "half a folder counts for nothing"
            other.kill()
            folder = Path(waiting.result(WAIT_SECONDS))
    finally:
        other.kill()
        other.communicate()
    assert [path.name for path in folder.parent.iterdir()] == [folder.name], "leftovers of the killed process"
    assert torch.equal(load_file(folder / "model.safetensors")[EMBEDDINGS], tiny_llama().state_dict()[EMBEDDINGS])
