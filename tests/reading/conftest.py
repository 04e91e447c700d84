"""Tokenizers of encoder-decoders, trained on a few lines."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import sentencepiece
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import AutoTokenizer, BartTokenizer, MarianTokenizer, T5Tokenizer

from rag_core.pretrained.model_source import resolve_model_source
from tests.conftest import MINILM

READ = [
    "which country is Lyon in?",
    "what water flows through Oslo, please?",
    "Lyon is a city in France.",
    "The Rhone flows through it, and the Saone.",
    "Short.",
    "About 224,000 people live in Cork.",
    "/ // question: context:",
] * 9
WRITTEN = ["Frankreich", "Norwegen", "der Fluss von Lyon ist die Rhone", "etwa 522,000 Menschen"] * 20


@pytest.fixture(scope="session")
def tokenizer():
    return AutoTokenizer.from_pretrained(resolve_model_source(MINILM))


@pytest.fixture(scope="session")
def bart() -> BartTokenizer:
    """Byte-level BPE: decoding loses nothing."""
    inner = Tokenizer(models.BPE())
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    special = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    inner.train_from_iterator(READ, trainer)
    model = json.loads(inner.to_str())["model"]
    return BartTokenizer(vocab=model["vocab"], merges=[tuple(pair) for pair in model["merges"]])


@pytest.fixture(scope="session")
def t5() -> T5Tokenizer:
    inner = Tokenizer(models.Unigram())
    inner.pre_tokenizer = pre_tokenizers.Metaspace()
    special = ["<pad>", "</s>", "<unk>"]
    trainer = trainers.UnigramTrainer(vocab_size=150, special_tokens=special, unk_token="<unk>", show_progress=False)
    inner.train_from_iterator(READ, trainer)
    pieces = json.loads(inner.to_str())["model"]["vocab"]
    return T5Tokenizer(vocab=[tuple(piece) for piece in pieces], extra_ids=0)


@pytest.fixture(scope="session")
def marian(tmp_path_factory: pytest.TempPathFactory) -> MarianTokenizer:
    """A slow tokenizer without offsets. It reads English and writes German, with other pieces of one vocabulary."""
    folder = tmp_path_factory.mktemp("marian")
    vocabulary = {"</s>": 0, "<unk>": 1}
    for side, texts in (("source", READ), ("target", WRITTEN)):
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(texts),
            model_prefix=str(folder / side),
            vocab_size=90,
            hard_vocab_limit=False,
            num_threads=1,
            minloglevel=2,
        )
        for piece in _pieces(folder / f"{side}.model"):
            vocabulary.setdefault(piece, len(vocabulary))
    (folder / "vocab.json").write_text(json.dumps(vocabulary | {"<pad>": len(vocabulary)}))
    return MarianTokenizer(
        source_spm=str(folder / "source.model"),
        target_spm=str(folder / "target.model"),
        vocab=str(folder / "vocab.json"),
    )


def _pieces(model: Path) -> list[str]:
    processor = sentencepiece.SentencePieceProcessor(model_file=str(model))
    return [processor.id_to_piece(number) for number in range(processor.get_piece_size())]
