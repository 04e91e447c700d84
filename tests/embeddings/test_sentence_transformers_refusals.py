"""Folders of sentence-transformers that ask for an unsupported step are refused, and the message names the step."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.modules import Dense, StaticEmbedding

from rag_core.embeddings.text_encoder import TextEncoder
from rag_core.errors import ConfigError
from tests.embeddings.sentence_transformers_models import byte_tokenizer, edit, save

MODULES, POOLING, NORMALIZE = "modules.json", "1_Pooling/config.json", "2_Normalize/config.json"
TRANSFORMER, MODEL = "sentence_bert_config.json", "config_sentence_transformers.json"


def test_a_dense_module_is_refused_by_name(tmp_path: Path, transformers: dict[str, Path]) -> None:
    save(tmp_path / "st-folder", transformers["bert"], more=(Dense(32, 16),), normalize=True)
    with pytest.raises(ConfigError, match=r"st-folder: modules.json lists Transformer, Pooling, Dense, Normalize; "):
        TextEncoder.from_pretrained(tmp_path / "st-folder")


def test_static_embeddings_are_refused_by_name(tmp_path: Path) -> None:
    tokenizer = byte_tokenizer().backend_tokenizer
    model = SentenceTransformer(modules=[StaticEmbedding(tokenizer, embedding_dim=8)], device="cpu")
    model.save(str(tmp_path / "st-folder"), create_model_card=False)
    with pytest.raises(ConfigError, match=r"st-folder: modules.json lists StaticEmbedding; "):
        TextEncoder.from_pretrained(tmp_path / "st-folder")


def test_two_poolings_at_once_are_refused(tmp_path: Path, transformers: dict[str, Path]) -> None:
    save(tmp_path / "st-folder", transformers["bert"], ("cls", "mean"))
    with pytest.raises(ConfigError, match=r"st-folder: 1_Pooling/config.json pools by cls and mean; "):
        TextEncoder.from_pretrained(tmp_path / "st-folder")


@pytest.mark.parametrize(
    ("name", "change", "reason"),
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
def test_settings_that_would_give_other_vectors_are_refused_by_name(
    copy: Path, name: str, change: Callable[[Any], Any], reason: str
) -> None:
    edit(copy / name, change)
    with pytest.raises(ConfigError, match=f"st-folder.*{reason}"):
        TextEncoder.from_pretrained(copy)


def test_a_folder_that_does_not_say_how_to_pool_is_refused(copy: Path) -> None:
    (copy / "1_Pooling" / "config.json").unlink()
    with pytest.raises(ConfigError, match=r"st-folder has no 1_Pooling/config.json"):
        TextEncoder.from_pretrained(copy)
