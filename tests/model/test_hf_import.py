"""Reading Hugging Face's RAG checkpoints: weights, tokenizers, prompts, special tokens, and refusals.

The reference is Hugging Face's own classes, and their retriever's way of joining title, text and question.

Legend: B questions, K passages per question, S context tokens.
"""

from __future__ import annotations

import json
import os
import warnings
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import BertModel, RagRetriever

from rag_core.corpus.passages import Passage
from rag_core.embeddings.encoder_settings import EncoderSettings
from rag_core.errors import ConfigError, ModelNotice
from rag_core.model.hf_rag import ExchangeWarning, separators_of, template_of
from rag_core.model.rag_model import RagModel
from rag_core.reading.contexts import assemble_contexts
from tests.support.models.hf_checkpoints import (
    CLASSES,
    END,
    PASSAGES,
    QUESTIONS,
    START,
    TITLED,
    assert_equal_weights,
    bert_config,
    dpr_encoder,
    generator_of,
    letter_tokenizer,
    load_hf,
    make_hf_checkpoint,
    make_model,
    tied_groups,
)


def edit_json(path: Path, change: Any) -> None:
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def test_an_imported_model_is_saved_loaded_and_answers_as_a_model_of_ours(tmp_path: Path) -> None:
    make_hf_checkpoint(tmp_path / "hf")
    model = RagModel.from_hf_rag(tmp_path / "hf")
    model.save_pretrained(tmp_path / "ours")
    loaded = RagModel.from_pretrained(tmp_path / "ours")
    assert loaded.settings == model.settings
    assert loaded.fingerprint() == model.fingerprint()
    nll_B = loaded.reader.nll(QUESTIONS, PASSAGES, torch.zeros(2, 3), ["France", "the Rhone"], "token")
    assert torch.isfinite(nll_B).all()


def test_a_bin_checkpoint_is_read_like_its_safetensors(tmp_path: Path) -> None:
    theirs = make_hf_checkpoint(tmp_path / "hf")
    (tmp_path / "hf/model.safetensors").unlink()
    torch.save(theirs.state_dict(), tmp_path / "hf/pytorch_model.bin")
    with pytest.warns(ModelNotice, match="hf has pickled weights"):
        model = RagModel.from_hf_rag(tmp_path / "hf")
    assert_equal_weights(model.generator, theirs.rag.generator)
    assert tied_groups(model.generator) == tied_groups(theirs.rag.generator)


class _Attack:
    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.marker),)


def test_a_bin_checkpoint_that_would_run_code_is_refused_and_does_not_run(tmp_path: Path) -> None:
    theirs = make_hf_checkpoint(tmp_path / "hf")
    (tmp_path / "hf/model.safetensors").unlink()
    marker = tmp_path / "was-here"
    torch.save({**theirs.state_dict(), "attack": _Attack(marker)}, tmp_path / "hf/pytorch_model.bin")
    with pytest.raises(ConfigError, match="safetensors"):
        RagModel.from_hf_rag(tmp_path / "hf", trust_remote_code=True)
    assert not marker.exists()
    torch.load(tmp_path / "hf/pytorch_model.bin", weights_only=False)
    assert marker.exists(), "the attack must be a real one"


def test_missing_weights_are_an_error_and_not_random_numbers(tmp_path: Path) -> None:
    make_hf_checkpoint(tmp_path / "hf")
    weights = load_file(tmp_path / "hf/model.safetensors")
    name = "rag.generator.model.decoder.layers.1.fc1.weight"
    save_file({key: value for key, value in weights.items() if key != name}, tmp_path / "hf/model.safetensors")
    with pytest.raises(ConfigError, match=rf"lacks 1 weights \({name}\)"):
        RagModel.from_hf_rag(tmp_path / "hf")


def test_unknown_weights_cause_a_warning_but_a_document_encoder_does_not(tmp_path: Path) -> None:
    make_hf_checkpoint(tmp_path / "hf")
    weights = load_file(tmp_path / "hf/model.safetensors") | {"rag.ctx_encoder.ctx_encoder.w": torch.zeros(1)}
    save_file(weights, tmp_path / "hf/model.safetensors", {"format": "pt"})
    with warnings.catch_warnings():
        warnings.simplefilter("error", ExchangeWarning)
        RagModel.from_hf_rag(tmp_path / "hf")
    name = "rag.generator.model.decoder.layers.2.fc1.weight"
    save_file(weights | {name: torch.zeros(1)}, tmp_path / "hf/model.safetensors", {"format": "pt"})
    with pytest.warns(ExchangeWarning, match=name):
        RagModel.from_hf_rag(tmp_path / "hf")


def test_a_dtype_in_a_parts_config_does_not_round_its_weights(tmp_path: Path) -> None:
    theirs = make_hf_checkpoint(tmp_path / "hf")
    edit_json(tmp_path / "hf/config.json", lambda config: config["generator"].update(dtype="bfloat16"))
    edit_json(tmp_path / "hf/config.json", lambda config: config["question_encoder"].update(dtype="float16"))
    model = RagModel.from_hf_rag(tmp_path / "hf")
    assert_equal_weights(model.generator, theirs.rag.generator)
    assert_equal_weights(model.question_encoder.model, theirs.rag.question_encoder)


@pytest.mark.parametrize("missing", ["question_encoder_tokenizer", "generator_tokenizer"])
def test_a_missing_tokenizer_is_named(missing: str, tmp_path: Path) -> None:
    make_hf_checkpoint(tmp_path / "hf")
    for file in (tmp_path / "hf" / missing).iterdir():
        file.unlink()
    with pytest.raises(ConfigError, match=missing):
        RagModel.from_hf_rag(tmp_path / "hf")
    (tmp_path / "hf" / missing).rmdir()
    with pytest.raises(ConfigError, match=f"no folder {missing}/"):
        RagModel.from_hf_rag(tmp_path / "hf")


def test_another_model_is_refused_with_its_type_and_its_use(tmp_path: Path) -> None:
    generator_of("bart").save_pretrained(tmp_path / "bart")
    with pytest.raises(ConfigError, match=r"'bart'.*generator"):
        RagModel.from_hf_rag(tmp_path / "bart")
    dpr_encoder().save_pretrained(tmp_path / "dpr")
    with pytest.raises(ConfigError, match=r"'dpr'.*question_encoder"):
        RagModel.from_hf_rag(tmp_path / "dpr")
    make_model().save_pretrained(tmp_path / "ours")
    with pytest.raises(ConfigError, match=r"RagModel.from_pretrained"):
        RagModel.from_hf_rag(tmp_path / "ours")
    with pytest.raises(ConfigError, match="There is no model folder"):
        RagModel.from_hf_rag(tmp_path / "nothing")
    make_hf_checkpoint(tmp_path / "hf")
    edit_json(tmp_path / "hf/config.json", lambda config: config.update(architectures=["RagForDancing"]))
    with pytest.raises(ConfigError, match="RagForDancing"):
        RagModel.from_hf_rag(tmp_path / "hf")


def test_a_question_encoder_other_than_dprs_needs_a_pooling(tmp_path: Path) -> None:
    settings = EncoderSettings(pooling="cls", max_tokens=48)
    with pytest.warns(ExchangeWarning):
        make_model("bart", BertModel(bert_config()).eval(), settings).to_hf_rag(tmp_path / "hf")
    (tmp_path / "hf/question_encoder_tokenizer/text_encoder.json").unlink()
    with pytest.raises(ConfigError, match="--pooling"):
        RagModel.from_hf_rag(tmp_path / "hf")
    with pytest.raises(ConfigError, match="mean, cls"):
        RagModel.from_hf_rag(tmp_path / "hf", pooling="dpr")
    assert RagModel.from_hf_rag(tmp_path / "hf", pooling="cls").question_encoder.settings == settings
    make_hf_checkpoint(tmp_path / "dpr")
    with pytest.raises(ConfigError, match="must be dpr"):
        RagModel.from_hf_rag(tmp_path / "dpr", pooling="mean")


def test_config_json_wins_over_our_files(tmp_path: Path) -> None:
    make_model(variant="token").to_hf_rag(tmp_path / "hf")
    changed = {"n_docs": 7, "max_combined_length": 33, "title_sep": " : ", "architectures": [CLASSES["sequence"]]}
    edit_json(tmp_path / "hf/config.json", lambda config: config.update(changed))
    settings = RagModel.from_hf_rag(tmp_path / "hf").settings
    assert (settings.variant, settings.num_docs, settings.prompt.max_context_tokens) == ("sequence", 7, 33)
    assert settings.prompt.template == "{title} : {text} // {question}"
    assert settings.document_encoder_fingerprint == "f" * 64


@pytest.mark.parametrize(
    ("prefix", "title_sep", "doc_sep"),
    [("", " / ", " // "), (": ", " / ", " // "), (" ", " is ", " {of} "), ("in  ", "  /  ", " //  ")],
)
def test_the_imported_prompt_makes_the_tokens_of_hugging_faces_retriever(
    prefix: str, title_sep: str, doc_sep: str, tmp_path: Path
) -> None:
    make_hf_checkpoint(tmp_path / "hf")
    edit_json(tmp_path / "hf/config.json", lambda config: config.update(title_sep=title_sep, doc_sep=doc_sep))
    edit_json(tmp_path / "hf/config.json", lambda config: config["generator"].update(prefix=prefix))
    model = RagModel.from_hf_rag(tmp_path / "hf")
    hf_model = load_hf(tmp_path / "hf", "RagTokenForGeneration")
    tokenizer = letter_tokenizer()
    retriever: Any = SimpleNamespace(config=hf_model.config, generator_tokenizer=tokenizer)
    retriever.config.max_combined_length = 90
    documents = [{"title": [p.title for p in row], "text": [p.text for p in row]} for row in TITLED]
    expected_RS, mask_RS = RagRetriever.postprocess_docs(
        retriever, documents, QUESTIONS, hf_model.generator.config.prefix, 2, return_tensors="pt"
    )
    S = int(mask_RS.sum(1).max())
    assert S < 90, "cut contexts differ: their retriever cuts the question, ours the end of the passage"
    unquoted = [
        [Passage(passage.id, passage.title.strip('"'), passage.text) for passage in passages_K] for passages_K in TITLED
    ]
    contexts = assemble_contexts(
        tokenizer,
        model.settings.prompt.model_copy(update={"max_context_tokens": 90}),
        QUESTIONS,
        unquoted,
        torch.device("cpu"),
    )
    assert torch.equal(contexts.attention_mask_BKS.flatten(0, 1), mask_RS[:, :S])
    assert torch.equal(contexts.input_ids_BKS.flatten(0, 1), expected_RS[:, :S])
    model.to_hf_rag(tmp_path / "again")
    config = load_hf(tmp_path / "again", "RagTokenForGeneration").config
    assert (
        template_of(config.generator.prefix or "", config.title_sep, config.doc_sep) == model.settings.prompt.template
    )


@pytest.mark.parametrize(
    "template",
    [
        "question: {question} context: {title} {text}",
        "{text} // {question}",
        "{title} {text} {question} ?",
        "{title}  {text} {question}",
    ],
)
def test_prompts_that_their_retriever_cannot_make_have_no_separators(template: str) -> None:
    assert separators_of(template) is None


def test_separators_that_make_no_prompt_are_refused(tmp_path: Path) -> None:
    make_hf_checkpoint(tmp_path / "hf")
    edit_json(tmp_path / "hf/config.json", lambda config: config.update(title_sep=" {text} "))
    with pytest.raises(ConfigError, match="title_sep"):
        RagModel.from_hf_rag(tmp_path / "hf")


def test_the_tokens_of_generation_config_reach_the_generator(tmp_path: Path) -> None:
    make_hf_checkpoint(tmp_path / "hf")
    tokens = {"forced_eos_token_id": 2, "suppress_tokens": [5, 6], "bad_words_ids": [[7]], "decoder_start_token_id": 4}
    edit_json(tmp_path / "hf/generation_config.json", lambda config: config.update(tokens, bos_token_id=None))
    generator: Any = RagModel.from_hf_rag(tmp_path / "hf").generator
    assert {name: getattr(generator.generation_config, name) for name in tokens} == tokens
    assert generator.generation_config.bos_token_id == START, (
        "a setting that the file lacks keeps the value of the generator's configuration"
    )
    (tmp_path / "hf/generation_config.json").unlink()
    generator = RagModel.from_hf_rag(tmp_path / "hf").generator
    assert generator.generation_config.decoder_start_token_id == END


def test_forced_tokens_of_checkpoints_older_than_generation_config_reach_the_generator(tmp_path: Path) -> None:
    make_hf_checkpoint(tmp_path / "hf")
    (tmp_path / "hf/generation_config.json").unlink()
    tokens = {"forced_bos_token_id": START, "forced_eos_token_id": 2, "bad_words_ids": [[7]]}
    edit_json(tmp_path / "hf/config.json", lambda config: config["generator"].update(tokens))
    generator: Any = RagModel.from_hf_rag(tmp_path / "hf").generator
    assert {name: getattr(generator.generation_config, name) for name in tokens} == tokens
