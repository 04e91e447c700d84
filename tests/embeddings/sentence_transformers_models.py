"""Tiny models, and folders of them as sentence-transformers writes them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.modules import Normalize, Pooling, Transformer
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import (
    BertConfig,
    BertModel,
    BertTokenizer,
    MPNetConfig,
    MPNetModel,
    PreTrainedTokenizerFast,
    XLMRobertaConfig,
    XLMRobertaModel,
)

FAMILIES = ("bert", "xlm-roberta", "mpnet")
SENTENCE = "Zürich lies on the Limmat, 408 metres above the SEA; 東京 does not. 🚣 1,000 boats lie in its harbour!"
DEEP = 64  # tokens that the tiny models have positions for


def make_transformer(folder: Path, family: str) -> Path:
    torch.manual_seed(FAMILIES.index(family))
    shape: dict[str, Any] = {
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "intermediate_size": 48,
    }
    if family == "bert":
        letters = sorted(set(SENTENCE.lower()) - {" "} | {"u"})  # u without its dots: accents are stripped
        words = [
            "[PAD]",
            "[UNK]",
            "[CLS]",
            "[SEP]",
            "[MASK]",
            *letters,
            *(f"##{letter}" for letter in letters),
            "the",
            "##ies",
        ]
        tokenizer: Any = BertTokenizer(vocab={word: number for number, word in enumerate(words)})
        model: Any = BertModel(BertConfig(vocab_size=len(tokenizer), max_position_embeddings=DEEP, **shape))
    else:
        # Padding is token 1, and positions count from 2.
        tokenizer = byte_tokenizer()
        config_class, model_class = {
            "xlm-roberta": (XLMRobertaConfig, XLMRobertaModel),
            "mpnet": (MPNetConfig, MPNetModel),
        }[family]
        model = model_class(
            config_class(vocab_size=len(tokenizer), max_position_embeddings=DEEP + 2, pad_token_id=1, **shape)
        )
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """Byte-level BPE with case, trained on one sentence; no length limit of its own."""
    special = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(), decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=330,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([SENTENCE], trainer)
    tokenizer.post_processor = processors.RobertaProcessing(("</s>", 2), ("<s>", 0))
    names = ("bos_token", "pad_token", "eos_token", "unk_token", "mask_token")
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, cls_token="<s>", sep_token="</s>", **dict(zip(names, special, strict=True))
    )


def save(
    folder: Path,
    transformer: Path | str,
    pooling: str | tuple[str, ...] = "mean",
    *,
    normalize: bool = False,
    max_seq_length: int | None = DEEP,
    more: tuple[Any, ...] = (),
    **options: Any,
) -> SentenceTransformer:
    """Save a model made of sentence-transformers' modules, and return it."""
    first: Any = Transformer(str(transformer), max_seq_length=max_seq_length)
    modules = [first, Pooling(first.get_embedding_dimension(), pooling), *more, *([Normalize()] if normalize else [])]
    model = SentenceTransformer(modules=modules, device="cpu", **options)
    model.save(str(folder), create_model_card=False)
    return model


def edit(file: Path, change: Callable[[Any], Any]) -> None:
    """Rewrite a JSON file with `change`, which changes the content in place or returns new content."""
    content = json.loads(file.read_text())
    returned = change(content)
    file.write_text(json.dumps(content if returned is None else returned))
