"""Tiny random models with the same files as the paper's models on the hub, and one as sentence-transformers saves it.

`facebook/bart-large`, DPR's encoders and `facebook/rag-token-nq` have their weights as `pytorch_model.bin` only, DPR in
PyTorch's format from before version 1.6, as many models of 2020. Each also has files that must not be downloaded.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from transformers import (
    BartConfig,
    BartForConditionalGeneration,
    BartTokenizer,
    DPRConfig,
    DPRContextEncoder,
    DPRQuestionEncoder,
    RagTokenForGeneration,
)

from tests.support.small_corpus import make_encoder

BART = "facebook/bart-large"
CONTEXT_ENCODER, QUESTION_ENCODER = (
    "facebook/dpr-ctx_encoder-single-nq-base",
    "facebook/dpr-question_encoder-single-nq-base",
)
RAG_TOKEN = "facebook/rag-token-nq"
MINILM = "sentence-transformers/all-MiniLM-L6-v2"
Files = dict[str, dict[str, bytes]]
# Files that must not be downloaded: other formats of the same weights, documentation, code.
NOT_NEEDED = {
    "README.md": b"# A model",
    ".gitattributes": b"*.bin filter=lfs",
    "tf_model.h5": b"tensorflow",
    "flax_model.msgpack": b"flax",
    "rust_model.ot": b"rust",
    "onnx/model.onnx": b"onnx",
    "onnx/config.json": b"{}",
    "openvino/openvino_model.bin": b"openvino",
    "checkpoint-500/pytorch_model.bin": b"an old one",
    "modeling_own.py": b"raise SystemExit('code of the model was run')",
}


def as_on_the_hub(folder: Path, *, legacy: bool = False) -> dict[str, bytes]:
    """The files of a model folder, its weights converted to `pytorch_model.bin`, with `NOT_NEEDED` added."""
    weights = load_file(folder / "model.safetensors")
    torch.save(weights, folder / "pytorch_model.bin", _use_new_zipfile_serialization=not legacy)
    (folder / "model.safetensors").unlink()
    return files_of(folder) | NOT_NEEDED


def files_of(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def dpr_files(folder: Path, kind: Any = DPRContextEncoder, seed: int = 0) -> dict[str, bytes]:
    """A DPR encoder over the words of the small corpus."""
    make_encoder(folder)
    for file in ("model.safetensors", "text_encoder.json", "config.json"):
        (folder / file).unlink()
    torch.manual_seed(seed)
    words = len((folder / "vocab.txt").read_text().splitlines())
    config = DPRConfig(
        vocab_size=words,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=64,
        max_position_embeddings=64,
        initializer_range=0.3,
    )
    kind(config).save_pretrained(folder)
    return as_on_the_hub(folder, legacy=True)


def bart_files(folder: Path) -> dict[str, bytes]:
    """A BART whose tokens are single characters."""
    letters = [chr(code) for code in range(33, 127)] + ["Ġ"]
    vocabulary = {token: at for at, token in enumerate(["<s>", "<pad>", "</s>", "<unk>", *letters, "<mask>"])}
    BartTokenizer(vocab=vocabulary, merges=[]).save_pretrained(folder)
    (folder / "vocab.json").write_text(json.dumps(vocabulary))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    torch.manual_seed(1)
    config = BartConfig(
        vocab_size=len(vocabulary),
        d_model=16,
        encoder_layers=1,
        decoder_layers=1,
        encoder_attention_heads=2,
        decoder_attention_heads=2,
        encoder_ffn_dim=32,
        decoder_ffn_dim=32,
        max_position_embeddings=512,
        forced_bos_token_id=0,
        dropout=0.0,
    )
    BartForConditionalGeneration(config).save_pretrained(folder)
    (folder / "generation_config.json").unlink()
    return as_on_the_hub(folder)


def rag_files(folder: Path) -> dict[str, bytes]:
    """A RAG-Token checkpoint. Its tokenizers have their vocabularies, but no file that names their classes."""
    parts = folder.parent / f"{folder.name}-parts"
    for name, content in dpr_files(parts / "question_encoder", DPRQuestionEncoder, seed=1).items():
        _write(folder / "question_encoder_tokenizer" / name, content) if name == "vocab.txt" else None
    for name, content in bart_files(parts / "generator").items():
        _write(folder / "generator_tokenizer" / name, content) if name in ("vocab.json", "merges.txt") else None
    _write(folder / "question_encoder_tokenizer" / "tokenizer_config.json", b'{"do_lower_case": true}')
    _write(folder / "generator_tokenizer" / "tokenizer_config.json", b'{"add_prefix_space": false}')
    model = RagTokenForGeneration.from_pretrained_question_encoder_generator(
        str(parts / "question_encoder"), str(parts / "generator"), n_docs=3, max_combined_length=64
    )
    model.save_pretrained(folder)
    (folder / "generation_config.json").unlink(missing_ok=True)
    return as_on_the_hub(folder)


def _write(file: Path, content: bytes) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_bytes(content)


def sentence_transformers_files(folder: Path) -> dict[str, bytes]:
    """A BERT with mean pooling and unit vectors; its weights are in safetensors and in other formats."""
    make_encoder(folder)
    (folder / "text_encoder.json").unlink()
    kinds = {"": "Transformer", "1_Pooling": "Pooling", "2_Normalize": "Normalize"}
    modules = [
        {"idx": at, "name": str(at), "path": path, "type": f"sentence_transformers.models.{kind}"}
        for at, (path, kind) in enumerate(kinds.items())
    ]
    (folder / "modules.json").write_text(json.dumps(modules))
    (folder / "sentence_bert_config.json").write_text('{"max_seq_length": 32, "do_lower_case": false}')
    (folder / "1_Pooling").mkdir()
    (folder / "1_Pooling" / "config.json").write_text(
        '{"word_embedding_dimension": 32, "pooling_mode_mean_tokens": true}'
    )
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    return files_of(folder) | NOT_NEEDED


def poisoned(files: dict[str, bytes], folder: Path) -> bytes:
    """A safetensors file with the same names and shapes as the weights in `files`, every value changed to 66."""
    from safetensors.torch import save_file

    folder.mkdir(parents=True, exist_ok=True)
    (folder / "weights.bin").write_bytes(files["pytorch_model.bin"])
    weights = torch.load(folder / "weights.bin", weights_only=True)
    save_file({name: torch.full_like(value, 66) for name, value in weights.items()}, folder / "poisoned.safetensors")
    content = (folder / "poisoned.safetensors").read_bytes()
    shutil.rmtree(folder)
    return content
