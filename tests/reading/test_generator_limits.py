"""The longest context and answer of each family run through the model; one more token is refused before the run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    BlenderbotConfig,
    BlenderbotForConditionalGeneration,
    M2M100Config,
    M2M100ForConditionalGeneration,
    RobertaConfig,
    RobertaModel,
    XLMRobertaConfig,
    XLMRobertaModel,
)

from rag_core.decoding import decode_rag_sequence, decode_rag_token
from rag_core.errors import ConfigError, ModelNotice
from rag_core.generators.generation_tokens import GenerationTokens
from rag_core.generators.kinds import as_generator
from rag_core.model.rag_model import RagModel
from rag_core.model.reader import DecodingConfig, GeneratorReader, load_generator
from rag_core.pretrained.model_limits import positions_of
from rag_core.reading.generator_limits import within_positions
from rag_core.reading.likelihood import rag_nll
from rag_core.reading.prompt import PromptConfig
from rag_core.training.pretraining import PretrainConfig, build_generator
from tests.support.models.chat_tokenizers import byte_level
from tests.support.models.tiny_causal import tiny_causal
from tests.support.models.tiny_models import _BART_SIZES, ALL_BUILDS, tiny_led, tiny_model
from tests.support.small_corpus import PROMPT, make_encoder, make_generator, make_index, model_config

UNLIMITED = ("t5", "flan-t5")
LIMITED = tuple(build for build in ALL_BUILDS if build not in UNLIMITED)
DECODE: dict[str, Any] = {"num_beams": 2}


def contexts_of(tokens: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Two contexts of `tokens` tokens each for one question, and their scores."""
    ids_BKS = torch.randint(3, 6, (1, 2, tokens), generator=torch.Generator().manual_seed(0))
    return ids_BKS, torch.ones_like(ids_BKS), torch.zeros(1, 2, dtype=torch.float64)


def encoder_positions(generator: Any) -> int | None:
    return as_generator(generator).context_limit(1)


def decoder_positions(generator: Any) -> int | None:
    limit = as_generator(generator).answer_limit(1)
    return None if limit is None else limit + GenerationTokens.of(generator).forced_first


def labels_of(tokens: int) -> torch.Tensor:
    return torch.randint(3, 6, (1, tokens), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("build", LIMITED)
def test_the_longest_context_is_read_and_one_token_more_is_refused(build: str) -> None:
    generator = tiny_model(build)
    limit = encoder_positions(generator)
    assert limit == 64
    for variant in ("sequence", "token"):
        nll_B = rag_nll(generator, *contexts_of(limit), labels_of(3), variant=variant)  # type: ignore[arg-type]
        assert torch.isfinite(nll_B).all()
    answers = decode_rag_token(generator, *contexts_of(limit), max_new_tokens=4, **DECODE)
    assert answers[0]
    refusal = r"65 tokens are more than the encoder .* has positions for: 64\. Set prompt\.max_context_tokens"
    with pytest.raises(ConfigError, match=refusal):
        rag_nll(generator, *contexts_of(limit + 1), labels_of(3), variant="token")
    for decode in (decode_rag_sequence, decode_rag_token):
        with pytest.raises(ConfigError, match=refusal):
            decode(generator, *contexts_of(limit + 1), max_new_tokens=4, **DECODE)
    # The refused length would indeed fail in the model.
    with pytest.raises((IndexError, RuntimeError)):
        generator.get_encoder()(input_ids=contexts_of(limit + 1)[0][0])


@pytest.mark.parametrize("build", LIMITED)
def test_the_longest_answer_is_learnt_and_written_and_one_token_more_is_refused(build: str) -> None:
    generator = tiny_model(build)
    limit, forced = decoder_positions(generator), GenerationTokens.of(generator).forced_first
    assert limit == 64
    assert torch.isfinite(rag_nll(generator, *contexts_of(5), labels_of(limit - forced), variant="sequence")).all()
    with pytest.raises(ConfigError, match=r"decoder .* has positions for: 6[34]\. Set prompt\.max_answer_tokens"):
        rag_nll(generator, *contexts_of(5), labels_of(limit - forced + 1), variant="sequence")
    # Nothing may end before the limit.
    generator.generation_config.suppress_tokens = list(GenerationTokens.of(generator).ends)
    for decode in (decode_rag_sequence, decode_rag_token):
        hypothesis = decode(generator, *contexts_of(5), max_new_tokens=limit, **DECODE)[0][0]
        assert len(hypothesis.token_ids) >= limit - forced - 1
        with pytest.raises(ConfigError, match=r"max_new_tokens 65 is more than the decoder .* has positions for: 64"):
            decode(generator, *contexts_of(5), max_new_tokens=limit + 1, **DECODE)


@pytest.mark.parametrize("build", UNLIMITED)
def test_relative_positions_have_no_limit(build: str) -> None:
    generator = tiny_model(build)
    assert encoder_positions(generator) is decoder_positions(generator) is None
    assert torch.isfinite(rag_nll(generator, *contexts_of(700), labels_of(600), variant="token")).all()
    assert within_positions(generator, PromptConfig()) == PromptConfig()


def test_leds_contexts_are_filled_up_to_whole_windows() -> None:
    generator = tiny_led()
    generator.get_encoder().embed_positions = torch.nn.Embedding(62, 16).double()
    # 61 tokens are filled up to 64.
    assert encoder_positions(generator) == 60


@pytest.mark.parametrize(
    ("model_class", "config_class", "limit"),
    [
        (BlenderbotForConditionalGeneration, BlenderbotConfig, 20),
        (M2M100ForConditionalGeneration, M2M100Config, None),
    ],
)
def test_other_descendants_of_bart(model_class: Any, config_class: Any, limit: int | None) -> None:
    generator = model_class(config_class(**_BART_SIZES, vocab_size=9, max_position_embeddings=20)).eval()
    assert encoder_positions(generator) == decoder_positions(generator) == limit
    tokens_BT = labels_of(limit or 40)
    assert torch.isfinite(generator(input_ids=tokens_BT, decoder_input_ids=tokens_BT).logits).all()


@pytest.mark.parametrize(
    ("model_class", "config_class"), [(RobertaModel, RobertaConfig), (XLMRobertaModel, XLMRobertaConfig)]
)
def test_positions_that_count_from_the_padding_token_are_fewer_than_the_tables_rows(
    model_class: Any, config_class: Any
) -> None:
    shape = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1, "intermediate_size": 8}
    model = model_class(config_class(vocab_size=9, max_position_embeddings=34, pad_token_id=1, **shape)).eval()
    assert positions_of(model) == 32
    assert torch.isfinite(model(input_ids=labels_of(32)).last_hidden_state).all()
    with pytest.raises((IndexError, RuntimeError)):
        model(input_ids=labels_of(33))


# Whole models


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("parts")
    encoder = make_encoder(folder / "encoder")
    return encoder, make_generator(folder / "generator", encoder)


def test_explicit_lengths_beyond_the_positions_are_refused_when_a_model_is_made(parts: tuple[Path, Path]) -> None:
    for name, words in (("max_context_tokens", "encoder"), ("max_answer_tokens", "decoder")):
        whole = PROMPT.model_copy(update={name: 64})
        RagModel.from_parts(model_config(*parts).model_copy(update={"prompt": whole}))
        long = PROMPT.model_copy(update={name: 65})
        with pytest.raises(
            ConfigError, match=rf"{name}: 65 tokens are more than the {words} .*: 64\. Set prompt\.{name}"
        ):
            RagModel.from_parts(model_config(*parts).model_copy(update={"prompt": long}))
        generator, tokenizer = build_generator(
            PretrainConfig(encoder=str(parts[0]), encoder_layers=1, decoder_layers=1)
        )
        with pytest.raises(ConfigError, match=f"{name}: 65 tokens"):
            GeneratorReader(generator, tokenizer, long)


def test_default_lengths_are_lowered_to_what_the_generator_can_read(parts: tuple[Path, Path]) -> None:
    prompt = PromptConfig(template="{text} // {question}")
    model = RagModel.from_parts(model_config(*parts).model_copy(update={"prompt": prompt}))
    assert model.settings.prompt.max_context_tokens == model.reader.prompt.max_context_tokens == 64
    assert model.settings.prompt.max_answer_tokens == 32


def test_a_stored_model_with_longer_contexts_than_positions_still_answers_and_refuses_longer_answers(
    parts: tuple[Path, Path], tmp_path: Path
) -> None:
    index = make_index(tmp_path, parts[0])
    model = RagModel.from_parts(model_config(*parts))
    model.settings.prompt = PROMPT.model_copy(update={"max_context_tokens": 300})
    model.settings.variant = "token"
    model.save_pretrained(tmp_path / "model")
    assert json.loads((tmp_path / "model" / "rag_model.json").read_text())["prompt"]["max_context_tokens"] == 300
    loaded = RagModel.from_pretrained(tmp_path / "model")
    question = "which country is Lyon in? " + "lyon " * 30
    assert loaded.answer([question], index, decoding=DecodingConfig(num_beams=1, max_new_tokens=64))
    with pytest.raises(ConfigError, match=r"max_new_tokens 65 .* Set max_new_tokens to at most 64"):
        loaded.answer([question], index, decoding=DecodingConfig(num_beams=1, max_new_tokens=65))


# Tokenizers


def test_another_models_tokenizer_is_refused_when_the_generator_is_loaded(
    parts: tuple[Path, Path], tmp_path: Path
) -> None:
    folder = make_generator(tmp_path / "generator", parts[0])
    content = json.loads((folder / "tokenizer.json").read_text())
    content["model"]["vocab"] |= {f"word{number}": 900 + number for number in range(3)}
    (folder / "tokenizer.json").write_text(json.dumps(content))
    with pytest.raises(
        ConfigError,
        match=r"tokens up to id 902, but the model has embeddings for only \d+, so the tokenizer is another",
    ):
        load_generator(folder)


@pytest.mark.parametrize("name", ["decoder_start_token_id", "eos_token_id", "pad_token_id"])
def test_a_special_token_without_embedding_is_refused(parts: tuple[Path, Path], tmp_path: Path, name: str) -> None:
    folder = make_generator(tmp_path / "generator", parts[0])
    content = json.loads((folder / "generation_config.json").read_text())
    (folder / "generation_config.json").write_text(json.dumps(content | {name: 5000}))
    with pytest.raises(ConfigError, match="starts, ends or pads with token 5000"):
        load_generator(folder)


def test_a_language_models_end_token_pads_if_its_tokenizer_has_no_padding_token_and_one_line_says_so(
    tmp_path: Path,
) -> None:
    tokenizer = byte_level(eos_token="<|endoftext|>")
    tokenizer.pad_token = None
    model = tiny_causal("llama", vocab_size=len(tokenizer), dtype=torch.float32)
    model.generation_config.eos_token_id = model.config.eos_token_id = tokenizer.eos_token_id
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    with pytest.warns(ModelNotice, match=r"has no padding token, so its end token '<\|endoftext\|>' pads") as notices:
        _, loaded = load_generator(tmp_path)
    assert len(notices) == 1
    assert loaded.pad_token_id == tokenizer.eos_token_id
