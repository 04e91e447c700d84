"""Folders that sentence-transformers writes: the same vectors to 1e-5, or refused by the name of what is not done here.

The reference is always `SentenceTransformer.encode`, of the modules that were saved or of the folder as it loads it.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.modules import Dense, Normalize, Pooling, StaticEmbedding, Transformer
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

from rag_core.embeddings.text_encoder import TextEncoder, pool
from rag_core.errors import ConfigError
from rag_core.pretrained.model_source import resolve_model_source
from tests.conftest import MINILM

FAMILIES = ("bert", "xlm-roberta", "mpnet")
POOLINGS = ("mean", "cls", "max", "mean_sqrt_len_tokens", "weightedmean", "lasttoken")
SENTENCE = "Zürich lies on the Limmat, 408 metres above the SEA; 東京 does not. 🚣 1,000 boats lie in its harbour!"
# Out of order, empty, of one blank, of one token, and far beyond every limit.
TEXTS = [SENTENCE[: 1 + (number * 37) % 90] for number in range(15)] + ["", " ", "a", SENTENCE * 20]
DEEP = 64  # tokens that the tiny models have positions for


@pytest.fixture(scope="module")
def transformers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Plain model folders of three architectures with random weights."""
    return {family: _make_transformer(tmp_path_factory.mktemp("plain") / family, family) for family in FAMILIES}


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory, transformers: dict[str, Path]) -> Path:
    """A mean-pooled, normalised BERT as sentence-transformers 6 saves it. Copy before you change it."""
    folder = tmp_path_factory.mktemp("saved") / "st-folder"
    _save(folder, transformers["bert"], "mean", normalize=True)
    return folder


@pytest.fixture
def copy(tmp_path: Path, saved: Path) -> Path:
    """A copy of `saved` to change."""
    return Path(shutil.copytree(saved, tmp_path / "st-folder"))


def _make_transformer(folder: Path, family: str) -> Path:
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
            *(f"##{one}" for one in letters),
            "the",
            "##ies",
        ]
        tokenizer: Any = BertTokenizer(vocab={word: number for number, word in enumerate(words)})
        model: Any = BertModel(BertConfig(vocab_size=len(tokenizer), max_position_embeddings=DEEP, **shape))
    else:
        # Padding is token 1, and positions count from 2.
        tokenizer = _byte_tokenizer()
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


def _byte_tokenizer() -> PreTrainedTokenizerFast:
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


def _save(
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


def _assert_equal_vectors(folder: Path, reference: SentenceTransformer | None = None, **given: Any) -> TextEncoder:
    """Our vectors of `TEXTS` equal those of the reference, which is what sentence-transformers makes of the folder."""
    encoder = TextEncoder.from_pretrained(folder, **given)
    expected_ND = (reference or SentenceTransformer(str(folder), device="cpu")).encode(TEXTS)
    for batch_tokens in (1, 8192):  # each text alone, and all in one batch or two
        vectors_ND = encoder.encode(TEXTS, batch_tokens=batch_tokens, precision="float32")
        np.testing.assert_allclose(vectors_ND, expected_ND, rtol=0, atol=1e-5)
    assert encoder.dim == expected_ND.shape[1]
    return encoder


def _edit(file: Path, change: Callable[[Any], Any]) -> None:
    """Rewrite a JSON file by a function that changes what it is given, or returns what is to be written."""
    content = json.loads(file.read_text())
    returned = change(content)
    file.write_text(json.dumps(content if returned is None else returned))


@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("pooling", POOLINGS)
@pytest.mark.parametrize("family", FAMILIES)
def test_every_pooling_and_architecture_gives_the_vectors_of_sentence_transformers(
    tmp_path: Path, transformers: dict[str, Path], family: str, pooling: str, normalize: bool
) -> None:
    reference = _save(tmp_path, transformers[family], pooling, normalize=normalize)
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
    reference = _save(tmp_path, source, pooling, normalize=normalize, max_seq_length=max_seq_length, **options)
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
    reference = _save(tmp_path, transformers[family], max_seq_length=9)
    assert _assert_equal_vectors(tmp_path, reference).settings.max_tokens == 9


@pytest.mark.parametrize("name", ["sentence_bert_config.json", "sentence_xlm-roberta_config.json"])
def test_a_limit_in_an_older_file_beats_the_tokenizers(copy: Path, name: str) -> None:
    (copy / "sentence_bert_config.json").unlink()
    (copy / name).write_text('{"max_seq_length": 11, "do_lower_case": false}')
    assert _assert_equal_vectors(copy).settings.max_tokens == 11


def test_without_any_limit_of_its_own_a_folder_has_the_models(copy: Path) -> None:
    _edit(copy / "tokenizer_config.json", lambda config: config.pop("model_max_length") and None)
    (copy / "sentence_bert_config.json").unlink()
    assert _assert_equal_vectors(copy).settings.max_tokens == DEEP


@pytest.mark.parametrize("family", ["xlm-roberta", "mpnet"])
def test_positions_that_count_from_padding_are_not_overrun(
    tmp_path: Path, transformers: dict[str, Path], family: str
) -> None:
    _save(tmp_path, transformers[family], max_seq_length=None)
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
    flags = {f"pooling_mode_{names.get(one, f'{one}_tokens')}": one == pooling for one in POOLINGS}
    (copy / "1_Pooling" / "config.json").write_text(json.dumps({"word_embedding_dimension": 32, **flags}))
    (copy / "sentence_bert_config.json").write_text('{"max_seq_length": 30, "do_lower_case": false}')
    (copy / "config_sentence_transformers.json").unlink()
    (copy / "2_Normalize" / "config.json").unlink()
    types = [f"sentence_transformers.models.{one}" for one in ("Transformer", "Pooling", "Normalize")]
    _edit(
        copy / "modules.json", lambda modules: [one | {"type": kind} for one, kind in zip(modules, types, strict=True)]
    )
    encoder = _assert_equal_vectors(copy)
    assert (encoder.settings.pooling, encoder.settings.normalize, encoder.settings.max_tokens) == (pooling, True, 30)


def test_pooling_with_every_boolean_false_is_the_mean(copy: Path) -> None:
    content = {"word_embedding_dimension": 32, "pooling_mode_cls_token": False, "pooling_mode_mean_tokens": False}
    (copy / "1_Pooling" / "config.json").write_text(json.dumps(content))
    assert _assert_equal_vectors(copy).settings.pooling == "mean"


def test_a_transformer_in_a_subfolder_is_loaded_from_there(copy: Path) -> None:
    (copy / "0_Transformer").mkdir()
    for file in [one for one in copy.iterdir() if one.is_file() and "modules" not in one.name]:
        if file.name != "config_sentence_transformers.json":
            file.rename(copy / "0_Transformer" / file.name)
    (copy / "0_Transformer" / "sentence_bert_config.json").write_text('{"max_seq_length": 13}')
    _edit(copy / "modules.json", lambda modules: modules[0].update(path="0_Transformer"))
    assert not (copy / "config.json").exists()
    assert _assert_equal_vectors(copy).settings.max_tokens == 13


@pytest.mark.parametrize("family", ["bert", "xlm-roberta"])
def test_lower_casing_is_done_whatever_the_tokenizer_does(
    tmp_path: Path, transformers: dict[str, Path], family: str
) -> None:
    _save(tmp_path / "st", transformers[family])
    config = {"max_seq_length": DEEP, "do_lower_case": True}
    (tmp_path / "st" / "sentence_bert_config.json").write_text(json.dumps(config))
    encoder = _assert_equal_vectors(tmp_path / "st")
    assert encoder.tokenize(["THE SEA"]) == encoder.tokenize(["the sea"])
    encoder.save_pretrained(tmp_path / "ours")
    again = TextEncoder.from_pretrained(tmp_path / "ours")
    np.testing.assert_array_equal(again.encode(TEXTS), encoder.encode(TEXTS))
    assert again.settings == encoder.settings
    normalizers = [one.tokenizer.backend_tokenizer.normalizer for one in (encoder, again)]
    assert repr(normalizers[0]) == repr(normalizers[1])


def test_settings_of_ours_lead_when_both_are_there(copy: Path) -> None:
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
    _save(tmp_path / "st", transformers[family], pooling, prompts={"query": "a city: "})
    _edit(tmp_path / "st" / "1_Pooling" / "config.json", lambda config: config.update(include_prompt=False))
    _assert_equal_vectors(tmp_path / "st")
    reference = SentenceTransformer(str(tmp_path / "st"), device="cpu")
    texts = [text for text in TEXTS if text.strip()]
    encoder = TextEncoder.from_pretrained(tmp_path / "st", side="question")
    vectors_ND = encoder.encode(texts, precision="float32")
    np.testing.assert_allclose(vectors_ND, reference.encode_query(texts), rtol=0, atol=1e-5)
    encoder.save_pretrained(tmp_path / "ours")
    again = TextEncoder.from_pretrained(tmp_path / "ours", side="question")
    np.testing.assert_array_equal(again.encode(texts, precision="float32"), vectors_ND)


# What is refused


def test_a_dense_module_is_refused_by_name(tmp_path: Path, transformers: dict[str, Path]) -> None:
    _save(tmp_path / "st-folder", transformers["bert"], more=(Dense(32, 16),), normalize=True)
    with pytest.raises(ConfigError, match=r"st-folder: modules.json lists Transformer, Pooling, Dense, Normalize; "):
        TextEncoder.from_pretrained(tmp_path / "st-folder")


def test_static_embeddings_are_refused_by_name(tmp_path: Path) -> None:
    tokenizer = _byte_tokenizer().backend_tokenizer
    model = SentenceTransformer(modules=[StaticEmbedding(tokenizer, embedding_dim=8)], device="cpu")
    model.save(str(tmp_path / "st-folder"), create_model_card=False)
    with pytest.raises(ConfigError, match=r"st-folder: modules.json lists StaticEmbedding; "):
        TextEncoder.from_pretrained(tmp_path / "st-folder")


def test_two_poolings_at_once_are_refused(tmp_path: Path, transformers: dict[str, Path]) -> None:
    _save(tmp_path / "st-folder", transformers["bert"], ("cls", "mean"))
    with pytest.raises(ConfigError, match=r"st-folder: 1_Pooling/config.json pools by cls and mean; "):
        TextEncoder.from_pretrained(tmp_path / "st-folder")


MODULES, POOLING, NORMALIZE = "modules.json", "1_Pooling/config.json", "2_Normalize/config.json"
TRANSFORMER, MODEL = "sentence_bert_config.json", "config_sentence_transformers.json"


@pytest.mark.parametrize(
    ("name", "change", "said"),
    [
        (MODULES, lambda modules: modules[::-1], "Normalize, Pooling, Transformer; "),
        (MODULES, lambda modules: modules[:1], "modules.json lists Transformer; "),
        (MODULES, lambda modules: [*modules, modules[2]], "Pooling, Normalize, Normalize; "),
        (MODULES, lambda modules: [], "modules.json lists nothing; "),
        (MODULES, lambda modules: modules[0].update(type="custom.Transformer"), "lists custom.Transformer, Pooling"),
        (MODULES, lambda modules: modules[0].pop("type") and None, "modules.json holds.*0.type"),
        (MODULES, lambda modules: {"modules": modules}, "modules.json holds.*valid list"),
        (POOLING, lambda config: config.update(pooling_mode="median"), "pools by median; "),
        (POOLING, lambda config: config.update(pooling_mode="dpr"), "pools by dpr; "),
        (POOLING, lambda config: config.update(pooling_mode=7), "1_Pooling/config.json holds.*pooling_mode.* is 7 "),
        (
            POOLING,
            lambda _: {"pooling_mode_max_tokens": True, "pooling_mode_mean_tokens": True},
            "pools by max and mean; ",
        ),
        (NORMALIZE, lambda config: config.update(module_input_name="token_embeddings"), "'token_embeddings'"),
        (TRANSFORMER, lambda config: config.update(transformer_task="fill-mask"), "transformer_task is 'fill-mask'"),
        (TRANSFORMER, lambda config: config.update(max_seq_length=0), "max_seq_length is 0"),
        (TRANSFORMER, lambda config: config.update(processing_kwargs={"text": {"max_length": 3}}), "processing_kwargs"),
        (TRANSFORMER, lambda config: config["modality_config"].update(message={}), "modality_config.message"),
        (
            TRANSFORMER,
            lambda config: config["modality_config"]["text"].update(method_output_name="pooler_output"),
            "method_output_name is 'pooler_output'",
        ),
        (MODEL, lambda config: config.update(truncate_dim=8), "truncate_dim is 8"),
        (MODEL, lambda config: config.update(model_type="SparseEncoder"), "model_type is 'SparseEncoder'"),
        (MODEL, lambda config: config.update(default_prompt_name="mine"), "default prompt 'mine'.*query, document"),
    ],
)
def test_what_would_give_other_vectors_is_refused_by_name(
    copy: Path, name: str, change: Callable[[Any], Any], said: str
) -> None:
    _edit(copy / name, change)
    with pytest.raises(ConfigError, match=f"st-folder.*{said}"):
        TextEncoder.from_pretrained(copy)


def test_a_folder_that_does_not_say_how_to_pool_is_refused(copy: Path) -> None:
    (copy / "1_Pooling" / "config.json").unlink()
    with pytest.raises(ConfigError, match=r"st-folder has no 1_Pooling/config.json"):
        TextEncoder.from_pretrained(copy)
