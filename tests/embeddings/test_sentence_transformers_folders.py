"""Folders that sentence-transformers writes give the same vectors to 1e-5.

The reference is always `SentenceTransformer.encode`, of the modules that were saved or of the folder as it loads it.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.modules import Pooling

from rag_core.embeddings.text_encoder import TextEncoder, pool
from rag_core.pretrained.model_source import resolve_model_source
from tests.conftest import MINILM
from tests.embeddings.sentence_transformers_models import DEEP, FAMILIES, SENTENCE, edit, save

POOLINGS = ("mean", "cls", "max", "mean_sqrt_len_tokens", "weightedmean", "lasttoken")
# Out of order, empty, of one blank, of one token, and far beyond every limit.
TEXTS = [SENTENCE[: 1 + (number * 37) % 90] for number in range(15)] + ["", " ", "a", SENTENCE * 20]


def _assert_equal_vectors(folder: Path, reference: SentenceTransformer | None = None, **options: Any) -> TextEncoder:
    """Our vectors of `TEXTS` equal those of the reference, by default sentence-transformers' own of the folder."""
    encoder = TextEncoder.from_pretrained(folder, **options)
    expected_ND = (reference or SentenceTransformer(str(folder), device="cpu")).encode(TEXTS)
    for batch_tokens in (1, 8192):  # each text alone, and all in one batch or two
        vectors_ND = encoder.encode(TEXTS, batch_tokens=batch_tokens, precision="float32")
        np.testing.assert_allclose(vectors_ND, expected_ND, rtol=0, atol=1e-5)
    assert encoder.dim == expected_ND.shape[1]
    return encoder


@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("pooling", POOLINGS)
@pytest.mark.parametrize("family", FAMILIES)
def test_every_pooling_and_architecture_gives_the_vectors_of_sentence_transformers(
    tmp_path: Path, transformers: dict[str, Path], family: str, pooling: str, normalize: bool
) -> None:
    reference = save(tmp_path, transformers[family], pooling, normalize=normalize)
    encoder = _assert_equal_vectors(tmp_path, reference)
    assert (encoder.settings.pooling, encoder.settings.normalize) == (pooling, normalize)


@pytest.mark.parametrize(
    ("pooling", "normalize", "max_seq_length", "options"),
    [
        ("cls", False, 40, {}),
        ("mean", True, 20, {"prompts": {"query": "Find this place: "}, "default_prompt_name": "query"}),
    ],
)
def test_trained_weights_give_the_vectors_of_sentence_transformers(
    tmp_path: Path, pooling: str, normalize: bool, max_seq_length: int, options: dict[str, Any]
) -> None:
    source = resolve_model_source(MINILM)
    reference = save(tmp_path, source, pooling, normalize=normalize, max_seq_length=max_seq_length, **options)
    encoder = _assert_equal_vectors(tmp_path, reference)
    assert encoder.settings.max_tokens == max_seq_length


@pytest.mark.parametrize("pooling", POOLINGS)
def test_pooling_equals_the_pooling_module_even_of_a_text_without_tokens(pooling: Any) -> None:
    g = torch.Generator().manual_seed(0)
    states_BSD = torch.randn(5, 7, 4, generator=g, dtype=torch.float64)
    mask_BS = (torch.arange(7) < torch.tensor([7, 3, 1, 0, 6])[:, None]).long()
    features = {"token_embeddings": states_BSD, "attention_mask": mask_BS}
    expected_BD = Pooling(4, pooling)(features)["sentence_embedding"]
    torch.testing.assert_close(pool(states_BSD, mask_BS, pooling), expected_BD, rtol=0, atol=1e-12)


# Length limits


@pytest.mark.parametrize("family", FAMILIES)
def test_a_short_limit_cuts_texts_where_sentence_transformers_does(
    tmp_path: Path, transformers: dict[str, Path], family: str
) -> None:
    reference = save(tmp_path, transformers[family], max_seq_length=9)
    assert _assert_equal_vectors(tmp_path, reference).settings.max_tokens == 9


@pytest.mark.parametrize("name", ["sentence_bert_config.json", "sentence_xlm-roberta_config.json"])
def test_a_limit_in_an_older_file_beats_the_tokenizers(copy: Path, name: str) -> None:
    (copy / "sentence_bert_config.json").unlink()
    (copy / name).write_text('{"max_seq_length": 11, "do_lower_case": false}')
    assert _assert_equal_vectors(copy).settings.max_tokens == 11


def test_a_folder_without_a_limit_has_the_limit_of_its_model(copy: Path) -> None:
    edit(copy / "tokenizer_config.json", lambda config: config.pop("model_max_length") and None)
    (copy / "sentence_bert_config.json").unlink()
    assert _assert_equal_vectors(copy).settings.max_tokens == DEEP


@pytest.mark.parametrize("family", ["xlm-roberta", "mpnet"])
def test_positions_that_count_from_padding_are_not_overrun(
    tmp_path: Path, transformers: dict[str, Path], family: str
) -> None:
    save(tmp_path, transformers[family], max_seq_length=None)
    # 66 rows of positions, of which tokens can have 64: sentence-transformers itself takes 66, and fails.
    with pytest.raises((IndexError, RuntimeError)):
        SentenceTransformer(str(tmp_path), device="cpu").encode(TEXTS)
    reference = SentenceTransformer(str(tmp_path), device="cpu")
    reference.max_seq_length = DEEP
    assert _assert_equal_vectors(tmp_path, reference).settings.max_tokens == DEEP
    assert TextEncoder.from_pretrained(transformers[family]).settings.max_tokens == DEEP


# Older layouts


@pytest.mark.parametrize("pooling", POOLINGS)
def test_the_layout_of_older_versions_is_read(copy: Path, pooling: str) -> None:
    names = {"cls": "cls_token", "lasttoken": "lasttoken", "mean_sqrt_len_tokens": "mean_sqrt_len_tokens"}
    flags = {f"pooling_mode_{names.get(mode, f'{mode}_tokens')}": mode == pooling for mode in POOLINGS}
    (copy / "1_Pooling" / "config.json").write_text(json.dumps({"word_embedding_dimension": 32, **flags}))
    (copy / "sentence_bert_config.json").write_text('{"max_seq_length": 30, "do_lower_case": false}')
    (copy / "config_sentence_transformers.json").unlink()
    (copy / "2_Normalize" / "config.json").unlink()
    types = [f"sentence_transformers.models.{name}" for name in ("Transformer", "Pooling", "Normalize")]
    edit(
        copy / "modules.json",
        lambda modules: [module | {"type": kind} for module, kind in zip(modules, types, strict=True)],
    )
    encoder = _assert_equal_vectors(copy)
    assert (encoder.settings.pooling, encoder.settings.normalize, encoder.settings.max_tokens) == (pooling, True, 30)


def test_pooling_with_every_boolean_false_is_the_mean(copy: Path) -> None:
    content = {"word_embedding_dimension": 32, "pooling_mode_cls_token": False, "pooling_mode_mean_tokens": False}
    (copy / "1_Pooling" / "config.json").write_text(json.dumps(content))
    assert _assert_equal_vectors(copy).settings.pooling == "mean"


def test_a_transformer_in_a_subfolder_is_loaded_from_there(copy: Path) -> None:
    (copy / "0_Transformer").mkdir()
    for file in [file for file in copy.iterdir() if file.is_file() and "modules" not in file.name]:
        if file.name != "config_sentence_transformers.json":
            file.rename(copy / "0_Transformer" / file.name)
    (copy / "0_Transformer" / "sentence_bert_config.json").write_text('{"max_seq_length": 13}')
    edit(copy / "modules.json", lambda modules: modules[0].update(path="0_Transformer"))
    assert not (copy / "config.json").exists()
    assert _assert_equal_vectors(copy).settings.max_tokens == 13


@pytest.mark.parametrize("family", ["bert", "xlm-roberta"])
def test_lower_casing_is_done_whatever_the_tokenizer_does(
    tmp_path: Path, transformers: dict[str, Path], family: str
) -> None:
    save(tmp_path / "st", transformers[family])
    config = {"max_seq_length": DEEP, "do_lower_case": True}
    (tmp_path / "st" / "sentence_bert_config.json").write_text(json.dumps(config))
    encoder = _assert_equal_vectors(tmp_path / "st")
    assert encoder.tokenize(["THE SEA"]) == encoder.tokenize(["the sea"])
    encoder.save_pretrained(tmp_path / "ours")
    again = TextEncoder.from_pretrained(tmp_path / "ours")
    np.testing.assert_array_equal(again.encode(TEXTS), encoder.encode(TEXTS))
    assert again.settings == encoder.settings
    normalizers = [loaded.tokenizer.backend_tokenizer.normalizer for loaded in (encoder, again)]
    assert repr(normalizers[0]) == repr(normalizers[1])


def test_our_settings_win_over_those_of_sentence_transformers(copy: Path) -> None:
    (copy / "text_encoder.json").write_text('{"pooling": "cls", "max_tokens": 7}')
    settings = TextEncoder.from_pretrained(copy).settings
    assert (settings.pooling, settings.normalize, settings.max_tokens) == ("cls", False, 7)


# Prompts


@pytest.mark.parametrize(
    ("default", "prompt"),
    [("query", "a city: "), (None, ""), ("document", "")],  # the last one is not in the file; it is empty then
)
def test_the_default_prompt_alone_is_put_before_every_text(copy: Path, default: str | None, prompt: str) -> None:
    config = {"prompts": {"query": "a city: ", "other": "not this"}, "default_prompt_name": default}
    (copy / "config_sentence_transformers.json").write_text(json.dumps(config))
    assert _assert_equal_vectors(copy).settings.prompt == prompt


def test_a_prompt_that_is_given_replaces_the_default(copy: Path) -> None:
    config = {"prompts": {"query": "a city: "}, "default_prompt_name": "query"}
    (copy / "config_sentence_transformers.json").write_text(json.dumps(config))
    expected_ND = SentenceTransformer(str(copy), device="cpu").encode(TEXTS, prompt="a river: ")
    encoder = TextEncoder.from_pretrained(copy, prompt="a river: ")
    np.testing.assert_allclose(encoder.encode(TEXTS, precision="float32"), expected_ND, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    "prompts",
    [
        {"query": "a city: ", "document": "the sea: "},
        {"query": "a city: "},
        {"query": "a city: ", "passage": "the sea: "},  # encode_document does not read it: "document" is always there
        {"document": "the sea: ", "other": "not this"},
        {},
    ],
)
@pytest.mark.parametrize("default", [None, "query"])
def test_questions_and_passages_get_the_prompts_of_encode_query_and_encode_document(
    copy: Path, prompts: dict[str, str], default: str | None
) -> None:
    config = {"prompts": prompts, "default_prompt_name": default}
    (copy / "config_sentence_transformers.json").write_text(json.dumps(config))
    reference = SentenceTransformer(str(copy), device="cpu")
    for side, encode in (("question", reference.encode_query), ("passage", reference.encode_document)):
        vectors_ND = TextEncoder.from_pretrained(copy, side=side).encode(TEXTS, precision="float32")
        np.testing.assert_allclose(vectors_ND, encode(TEXTS), rtol=0, atol=1e-6)


@pytest.mark.parametrize("pooling", POOLINGS)
@pytest.mark.parametrize("family", ["bert", "xlm-roberta"])
def test_pooling_without_the_prompt_leaves_its_tokens_out(
    tmp_path: Path, transformers: dict[str, Path], family: str, pooling: str
) -> None:
    save(tmp_path / "st", transformers[family], pooling, prompts={"query": "a city: "})
    edit(tmp_path / "st" / "1_Pooling" / "config.json", lambda config: config.update(include_prompt=False))
    _assert_equal_vectors(tmp_path / "st")
    reference = SentenceTransformer(str(tmp_path / "st"), device="cpu")
    texts = [text for text in TEXTS if text.strip()]
    encoder = TextEncoder.from_pretrained(tmp_path / "st", side="question")
    vectors_ND = encoder.encode(texts, precision="float32")
    np.testing.assert_allclose(vectors_ND, reference.encode_query(texts), rtol=0, atol=1e-5)
    encoder.save_pretrained(tmp_path / "ours")
    again = TextEncoder.from_pretrained(tmp_path / "ours", side="question")
    np.testing.assert_array_equal(again.encode(texts, precision="float32"), vectors_ND)
