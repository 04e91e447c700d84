"""A DPR encoder reads its text in the case in which it was trained, whatever Transformers' DPR tokenizers do."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from transformers import (
    AutoTokenizer,
    BertTokenizer,
    DPRConfig,
    DPRContextEncoder,
    DPRQuestionEncoder,
    DPRQuestionEncoderTokenizer,
)

from rag_core.embeddings.text_encoder import TextEncoder
from tests.support.models.hf_checkpoints import make_model

WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "Lyon", "lyon", "Is", "is", "é", "e"]
KEPT, LOWERED = [[2, 5, 7, 9, 3]], [[2, 6, 8, 10, 3]]
TEXT = ["Lyon Is é"]


def dpr(folder: Path, model_class: Any = DPRQuestionEncoder, **files: Any) -> Path:
    """A DPR folder with these files (JSON, or text) beside its weights."""
    shape = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1, "intermediate_size": 8}
    model_class(DPRConfig(vocab_size=len(WORDS), max_position_embeddings=32, **shape)).save_pretrained(folder)
    for name, content in files.items():
        suffix = "txt" if name == "vocab" else "json"
        text = content if isinstance(content, str) else json.dumps(content)
        (folder / f"{name}.{suffix}").write_text(text)
    return folder


def tokenizer_json(folder: Path, lowercase: bool) -> str:
    """What a tokenizer that does or does not lower-case writes."""
    vocab = {word: number for number, word in enumerate(WORDS)}
    BertTokenizer(vocab=vocab, do_lower_case=lowercase).save_pretrained(folder)
    return (folder / "tokenizer.json").read_text()


@pytest.mark.parametrize("model_class", [DPRQuestionEncoder, DPRContextEncoder])
@pytest.mark.parametrize("tokenizer_class", [None, "DPRQuestionEncoderTokenizer", "DPRContextEncoderTokenizer"])
def test_do_lower_case_false_is_followed(tmp_path: Path, model_class: Any, tokenizer_class: str | None) -> None:
    config = {"do_lower_case": False} | ({"tokenizer_class": tokenizer_class} if tokenizer_class else {})
    folder = dpr(tmp_path / "dpr", model_class, vocab="\n".join(WORDS), tokenizer_config=config)
    encoder = TextEncoder.from_pretrained(folder)
    assert encoder.tokenize(TEXT) == KEPT
    encoder.save_pretrained(tmp_path / "saved")
    assert TextEncoder.from_pretrained(tmp_path / "saved").tokenize(TEXT) == KEPT
    assert encoder.tokenize(TEXT) == BertTokenizer.from_pretrained(folder)(TEXT)["input_ids"]


@pytest.mark.parametrize("config", [None, {}, {"do_lower_case": True}])
def test_an_uncased_tokenizer_still_lower_cases(tmp_path: Path, config: dict[str, Any] | None) -> None:
    files = {} if config is None else {"tokenizer_config": config}
    folder = dpr(tmp_path / "dpr", vocab="\n".join(WORDS), **files)
    assert TextEncoder.from_pretrained(folder).tokenize(TEXT) == LOWERED


def test_an_uncased_tokenizer_saved_by_transformers_lower_cases_although_its_config_says_false(tmp_path: Path) -> None:
    folder = dpr(tmp_path / "dpr", vocab="\n".join(WORDS))
    AutoTokenizer.from_pretrained(folder).save_pretrained(folder)
    (folder / "vocab.txt").unlink()
    assert json.loads((folder / "tokenizer_config.json").read_text())["do_lower_case"] is False
    assert TextEncoder.from_pretrained(folder).tokenize(TEXT) == LOWERED


@pytest.mark.parametrize("config", [None, {}, {"tokenizer_class": "DPRQuestionEncoderTokenizer"}])
def test_the_normalizer_of_tokenizer_json_is_followed(tmp_path: Path, config: dict[str, Any] | None) -> None:
    files = {} if config is None else {"tokenizer_config": config}
    cased = dpr(tmp_path / "cased", tokenizer=tokenizer_json(tmp_path / "one", lowercase=False), **files)
    uncased = dpr(tmp_path / "uncased", tokenizer=tokenizer_json(tmp_path / "two", lowercase=True), **files)
    assert TextEncoder.from_pretrained(cased).tokenize(TEXT) == KEPT
    assert TextEncoder.from_pretrained(uncased).tokenize(TEXT) == LOWERED


def test_a_cased_question_encoder_stays_so_in_a_hugging_face_checkpoint(tmp_path: Path) -> None:
    from rag_core.model.rag_model import RagModel

    model = make_model()
    words = {word: number for number, word in enumerate(model.question_encoder.tokenizer.get_vocab())}
    model.question_encoder.tokenizer = DPRQuestionEncoderTokenizer(vocab=words)
    model.to_hf_rag(tmp_path / "hf")
    tokenizer = tmp_path / "hf" / "question_encoder_tokenizer"
    (tokenizer / "tokenizer.json").unlink()
    (tokenizer / "vocab.txt").write_text("\n".join(words))
    for lowercase in (True, False):
        (tokenizer / "tokenizer_config.json").write_text(json.dumps({"do_lower_case": lowercase}))
        encoder = RagModel.from_hf_rag(tmp_path / "hf").question_encoder
        assert (encoder.tokenize(["Lyon"]) == encoder.tokenize(["lyon"])) is lowercase
