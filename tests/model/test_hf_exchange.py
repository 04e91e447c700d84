"""Models exchanged with Hugging Face's RAG classes, by real saving and loading: equal weights, equal losses.

The reference is Hugging Face's own `RagSequenceForGeneration` and `RagTokenForGeneration`.

Legend: B questions, K passages per question, S context tokens, T answer tokens.
"""

from __future__ import annotations

import json
import re
import shutil
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import BertModel, DPRContextEncoder, LlamaConfig, LlamaForCausalLM, RagTokenizer

from rag_core.embeddings.encoder_settings import EncoderSettings
from rag_core.errors import ArtifactError, ConfigError
from rag_core.model.hf_rag import ExchangeWarning
from rag_core.model.rag_model import RagModel
from rag_core.model.settings import ModelSettings
from rag_core.reading.likelihood import Variant
from rag_core.reading.prompt import PromptConfig, RenderedPrompt
from tests.support.models.hf_checkpoints import (
    CLASSES,
    DPR,
    END,
    FAMILIES,
    PAD,
    QUESTIONS,
    assert_equal_weights,
    bert_config,
    dpr_encoder,
    load_hf,
    make_hf_checkpoint,
    make_model,
    our_loss,
    question_tokenizer,
    their_loss,
    tied_groups,
)


@pytest.mark.parametrize("variant", ["sequence", "token"])
@pytest.mark.parametrize("family", FAMILIES)
def test_hugging_faces_class_gives_an_exported_model_the_same_loss(
    family: str, variant: Variant, tmp_path: Path
) -> None:
    model = make_model(family)
    model.to_hf_rag(tmp_path / "hf", variant=variant)
    hf_model = load_hf(tmp_path / "hf", CLASSES[variant])
    loss_B = our_loss(model, variant)
    assert loss_B.std() > 0.1, "equal losses for all questions would prove little"
    torch.testing.assert_close(their_loss(hf_model), loss_B, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_an_exported_model_comes_back_with_equal_weights_ties_and_settings(family: str, tmp_path: Path) -> None:
    prompt = PromptConfig(template=": {title} / {text} // {question}", max_context_tokens=40, max_answer_tokens=6)
    model = make_model(family, prompt=prompt, variant="sequence")
    model.to_hf_rag(tmp_path / "hf")
    back = RagModel.from_hf_rag(tmp_path / "hf")
    assert back.settings == model.settings
    assert back.question_encoder.settings == model.question_encoder.settings
    assert_equal_weights(back, model)
    assert tied_groups(model.generator)
    assert tied_groups(back.generator) == tied_groups(model.generator)
    assert back.fingerprint() == model.fingerprint()
    assert not back.training


def test_an_untied_head_stays_untied_although_the_configuration_calls_it_tied(tmp_path: Path) -> None:
    model = make_model("bart")
    model.generator.lm_head.weight = torch.nn.Parameter(model.generator.lm_head.weight.detach() + 1)
    model.to_hf_rag(tmp_path / "hf")
    back = RagModel.from_hf_rag(tmp_path / "hf")
    assert_equal_weights(back, model)
    back.save_pretrained(tmp_path / "ours")
    assert_equal_weights(RagModel.from_pretrained(tmp_path / "ours"), model)


def test_mean_pooling_scaled_scores_and_another_prompt_survive_a_round_trip_with_warnings(tmp_path: Path) -> None:
    settings = EncoderSettings(pooling="mean", normalize=True, max_tokens=17, title_separator=" : ")
    prompt = PromptConfig(template="question: {question} context: {title} {text}", max_answer_tokens=5)
    model = make_model("t5", BertModel(bert_config()).eval(), settings, score_scale=20.0, prompt=prompt)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        model.to_hf_rag(tmp_path / "hf")
    messages = [str(warning.message) for warning in caught if warning.category is ExchangeWarning]
    assert len(messages) == 2
    assert "score_scale 20" in messages[0]
    assert repr(prompt.template) in messages[1]
    back = RagModel.from_hf_rag(tmp_path / "hf")
    assert back.settings == model.settings
    assert back.question_encoder.settings == settings
    assert back.fingerprint() == model.fingerprint()


def test_a_chat_survives_a_round_trip_and_the_warning_shows_it_whole(tmp_path: Path) -> None:
    context = "{text} {question} [SEP]"
    rendered = RenderedPrompt(context=context, special_tokens=False, answer_prefix=" ", answer_end="[SEP]")
    prompt = PromptConfig(template="chat", system="Be short.", user="{text} {question}", rendered=rendered)
    model = make_model("t5", prompt=prompt)
    with pytest.warns(ExchangeWarning, match=re.escape(repr(context))):
        model.to_hf_rag(tmp_path / "hf")
    assert RagModel.from_hf_rag(tmp_path / "hf").settings == model.settings


@pytest.mark.parametrize(
    ("changes", "settings"),
    [
        ({"score_scale": 2.0}, DPR),
        ({}, DPR.model_copy(update={"normalize": True})),
        ({}, DPR.model_copy(update={"prompt": "query: "})),
        ({}, DPR.model_copy(update={"lowercase": True})),
    ],
)
def test_scores_that_their_class_would_not_compute_cause_a_warning(
    changes: dict[str, Any], settings: EncoderSettings, tmp_path: Path
) -> None:
    with pytest.warns(ExchangeWarning, match="doc_scores"):
        make_model("bart", None, settings, **changes).to_hf_rag(tmp_path / "hf")


def test_a_model_as_in_the_paper_is_exported_without_a_warning(tmp_path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error", ExchangeWarning)
        make_model().to_hf_rag(tmp_path / "hf")


@pytest.mark.parametrize(
    ("hf_class", "variant"),
    [("RagSequenceForGeneration", "sequence"), ("RagTokenForGeneration", "token"), ("RagModel", None)],
)
def test_a_checkpoint_that_hugging_face_made_survives_import_and_export(
    hf_class: str, variant: Variant | None, tmp_path: Path
) -> None:
    theirs = make_hf_checkpoint(tmp_path / "hf", hf_class)
    model = RagModel.from_hf_rag(tmp_path / "hf")
    assert model.settings == ModelSettings(
        variant=variant, num_docs=3, prompt=PromptConfig(max_context_tokens=40), score_scale=1.0
    )
    assert model.question_encoder.settings == DPR.model_copy(update={"max_tokens": 48})
    parts = theirs if hf_class == "RagModel" else theirs.rag
    assert_equal_weights(model.question_encoder.model, parts.question_encoder)
    assert_equal_weights(model.generator, parts.generator)
    assert tied_groups(model.generator) == tied_groups(parts.generator)
    encoded = question_tokenizer()(QUESTIONS, padding=True, return_tensors="pt")
    expected_BD = parts.question_encoder(**encoded)[0]
    torch.testing.assert_close(model.question_encoder.embed(QUESTIONS), expected_BD)
    variants: tuple[Variant, ...] = (variant,) if variant else ("sequence", "token")
    for chosen in variants:
        if variant:
            torch.testing.assert_close(our_loss(model, chosen), their_loss(theirs), atol=1e-5, rtol=1e-5)
        model.to_hf_rag(tmp_path / chosen, variant=chosen)
        again = load_hf(tmp_path / chosen, CLASSES[chosen])
        torch.testing.assert_close(their_loss(again), our_loss(model, chosen), atol=1e-5, rtol=1e-5)


def test_an_export_has_the_requested_variant(tmp_path: Path) -> None:
    make_model(variant="token").to_hf_rag(tmp_path / "hf", variant="sequence")
    assert json.loads((tmp_path / "hf/rag_model.json").read_text())["variant"] == "sequence"
    assert RagModel.from_hf_rag(tmp_path / "hf").settings.variant == "sequence"


@pytest.mark.parametrize("variant", ["sequence", "token"])
@pytest.mark.parametrize("family", FAMILIES)
def test_their_classes_decode_with_the_generators_tokens(family: str, variant: Variant, tmp_path: Path) -> None:
    model = make_model(family)
    expected = {"decoder_start_token_id": 5, "eos_token_id": 6, "pad_token_id": PAD, "bos_token_id": 7}
    model.generator.generation_config.update(**expected, suppress_tokens=[9])
    if family == "bart":
        model.generator.config.forced_eos_token_id = END  # as in released BART models; decoding ignores it
    model.to_hf_rag(tmp_path / "hf", variant=variant)
    hf_model = load_hf(tmp_path / "hf", CLASSES[variant])
    used = hf_model.generation_config if variant == "token" else hf_model.generator.generation_config
    assert {name: getattr(used, name) for name in expected} == expected
    back: Any = RagModel.from_hf_rag(tmp_path / "hf").generator
    assert back.generation_config.to_diff_dict() == {
        **model.generator.generation_config.to_diff_dict(),
        "_from_model_config": back.generation_config._from_model_config,
    }


def test_rag_tokenizer_reads_the_exported_tokenizers(tmp_path: Path) -> None:
    model = make_model()
    model.to_hf_rag(tmp_path / "hf")
    tokenizer = RagTokenizer.from_pretrained(tmp_path / "hf")
    assert tokenizer.question_encoder(QUESTIONS)["input_ids"] == model.question_encoder.tokenize(QUESTIONS)
    assert tokenizer.generator(QUESTIONS)["input_ids"] == model.generator_tokenizer(QUESTIONS)["input_ids"]


def test_exporting_does_not_change_the_model(tmp_path: Path) -> None:
    model = make_model("bert2bert")
    model.generator.generation_config.update(decoder_start_token_id=5)
    before, configs = (
        model.fingerprint(),
        [model.generator.config.to_dict(), model.question_encoder.model.config.to_dict()],
    )
    model.to_hf_rag(tmp_path / "hf")
    assert model.fingerprint() == before
    assert [model.generator.config.to_dict(), model.question_encoder.model.config.to_dict()] == configs


def test_an_export_appears_whole_or_not_at_all_and_overwrites_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = make_model()
    (tmp_path / "full").mkdir()
    (tmp_path / "full/thesis.txt").write_text("ten years of work")
    with pytest.raises(ArtifactError, match="full"):
        model.to_hf_rag(tmp_path / "full")
    (tmp_path / "empty").mkdir()
    model.to_hf_rag(tmp_path / "empty")
    monkeypatch.setattr(model.generator_tokenizer, "save_pretrained", lambda folder: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        model.to_hf_rag(tmp_path / "broken")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["empty", "full"]
    assert [path.name for path in (tmp_path / "full").iterdir()] == ["thesis.txt"]


def test_parts_that_their_class_cannot_hold_are_refused(tmp_path: Path) -> None:
    config = dpr_encoder().config
    model = make_model("bart", DPRContextEncoder(config).eval())
    with pytest.raises(ConfigError, match="DPRContextEncoder"):
        model.to_hf_rag(tmp_path / "hf")
    with pytest.raises(ConfigError, match="sequence or token"):
        make_model(variant=None).to_hf_rag(tmp_path / "hf")
    model = make_model()
    sizes = {"vocab_size": 8, "hidden_size": 8, "intermediate_size": 8}
    model.generator = LlamaForCausalLM(LlamaConfig(num_hidden_layers=1, num_attention_heads=1, **sizes))
    with pytest.raises(ConfigError, match="hold encoder-decoders only, and the generator is a LlamaForCausalLM"):
        model.to_hf_rag(tmp_path / "hf")
    assert not (tmp_path / "hf").exists()


def test_the_command_line_imports_and_exports(tmp_path: Path) -> None:
    from typer.testing import CliRunner

    from flows.cli.main import app

    def rag(*arguments: object) -> Any:
        return CliRunner().invoke(app, [str(argument) for argument in arguments], env={"COLUMNS": "200"})

    theirs = make_hf_checkpoint(tmp_path / "hf", "RagSequenceForGeneration")
    done = rag("import-hf", tmp_path / "hf", tmp_path / "ours")
    assert done.exit_code == 0, done.output
    assert "RAG-Sequence, 3 passages per question" in done.output
    imported = RagModel.from_pretrained(tmp_path / "ours")
    assert_equal_weights(imported.generator, theirs.rag.generator)
    done = rag("export-hf", tmp_path / "ours", tmp_path / "again", "--variant", "token")
    assert done.exit_code == 0, done.output
    assert "RagTokenForGeneration" in done.output
    assert "Note" not in done.output
    assert json.loads((tmp_path / "again/config.json").read_text())["architectures"] == ["RagTokenForGeneration"]
    loss_B = their_loss(load_hf(tmp_path / "again", "RagTokenForGeneration"))
    torch.testing.assert_close(loss_B, our_loss(imported, "token"), atol=1e-5, rtol=1e-5)
    refused = rag("export-hf", tmp_path / "ours", tmp_path / "again")
    assert isinstance(refused.exception, ArtifactError)
    unknown = rag("export-hf", tmp_path / "ours", tmp_path / "other", "--variant", "both")
    assert isinstance(unknown.exception, ConfigError)
    pooled = rag("import-hf", tmp_path / "hf", tmp_path / "third", "--pooling", "most")
    assert "mean, cls" in str(pooled.exception)
    make_model(score_scale=4.0).save_pretrained(tmp_path / "scaled")
    noted = rag("export-hf", tmp_path / "scaled", tmp_path / "noted")
    assert noted.stderr.startswith("Note: Hugging Face's class")
    shutil.rmtree(tmp_path / "hf/generator_tokenizer")
    assert isinstance(rag("import-hf", tmp_path / "hf", tmp_path / "third").exception, ConfigError)
    assert not (tmp_path / "third").exists()


@pytest.mark.parametrize("command", ["import-hf", "export-hf"])
def test_the_exchange_commands_explain_themselves(command: str) -> None:
    from typer.testing import CliRunner

    from flows.cli.main import app

    result = CliRunner().invoke(app, [command, "--help"], env={"COLUMNS": "200"})
    assert result.exit_code == 0
    assert "Hugging Face" in result.output
    options = [line for line in result.output.splitlines() if "│ --" in line or "│ *  " in line]
    assert all(len(line.strip("│ ").split()) > 4 for line in options), result.output
