"""Models exchanged with Hugging Face's RAG classes, by real saving and loading: equal weights, equal losses.

The reference is Hugging Face's own `RagSequenceForGeneration` and `RagTokenForGeneration`, and their retriever's way of
joining title, text and question.

Legend: B questions, K passages per question, S context tokens, T answer tokens.
"""

from __future__ import annotations

import json
import os
import shutil
import warnings
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    BertModel,
    DPRContextEncoder,
    RagRetriever,
    RagTokenizer,
)

from rag_core.corpus.passages import Passage
from rag_core.embeddings.encoder_settings import EncoderSettings
from rag_core.errors import ArtifactError, ConfigError, ModelNotice
from rag_core.model.hf_rag import ExchangeWarning, separators_of, template_of
from rag_core.model.rag_model import RagModel
from rag_core.model.settings import ModelSettings
from rag_core.reading.contexts import assemble_contexts
from rag_core.reading.likelihood import Variant
from rag_core.reading.prompt import PromptConfig
from tests.support.models.hf_checkpoints import (
    CLASSES,
    DPR,
    END,
    FAMILIES,
    PAD,
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
    assert loss_B.std() > 0.1, "losses that are all alike would prove little"
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


def test_a_head_of_its_own_stays_so_though_the_configuration_calls_it_tied(tmp_path: Path) -> None:
    model = make_model("bart")
    model.generator.lm_head.weight = torch.nn.Parameter(model.generator.lm_head.weight.detach() + 1)
    model.to_hf_rag(tmp_path / "hf")
    back = RagModel.from_hf_rag(tmp_path / "hf")
    assert_equal_weights(back, model)
    back.save_pretrained(tmp_path / "ours")
    assert_equal_weights(RagModel.from_pretrained(tmp_path / "ours"), model)


def test_mean_pooling_scaled_scores_and_another_prompt_come_back_and_are_warned_of(tmp_path: Path) -> None:
    settings = EncoderSettings(pooling="mean", normalize=True, max_tokens=17, title_separator=" : ")
    prompt = PromptConfig(template="question: {question} context: {title} {text}", max_answer_tokens=5)
    model = make_model("t5", BertModel(bert_config()).eval(), settings, score_scale=20.0, prompt=prompt)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        model.to_hf_rag(tmp_path / "hf")
    told = [str(one.message) for one in caught if one.category is ExchangeWarning]
    assert len(told) == 2
    assert "score_scale 20" in told[0]
    assert repr(prompt.template) in told[1]
    back = RagModel.from_hf_rag(tmp_path / "hf")
    assert back.settings == model.settings
    assert back.question_encoder.settings == settings
    assert back.fingerprint() == model.fingerprint()


@pytest.mark.parametrize(
    ("changes", "settings"),
    [
        ({"score_scale": 2.0}, DPR),
        ({}, DPR.model_copy(update={"normalize": True})),
        ({}, DPR.model_copy(update={"prompt": "query: "})),
        ({}, DPR.model_copy(update={"lowercase": True})),
    ],
)
def test_scores_that_their_class_would_not_compute_are_warned_of(
    changes: dict[str, Any], settings: EncoderSettings, tmp_path: Path
) -> None:
    with pytest.warns(ExchangeWarning, match="doc_scores"):
        make_model("bart", None, settings, **changes).to_hf_rag(tmp_path / "hf")


def test_a_model_after_the_paper_is_exported_without_a_warning(tmp_path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error", ExchangeWarning)
        make_model().to_hf_rag(tmp_path / "hf")


@pytest.mark.parametrize(
    ("hf_class", "variant"),
    [("RagSequenceForGeneration", "sequence"), ("RagTokenForGeneration", "token"), ("RagModel", None)],
)
def test_a_checkpoint_of_hugging_faces_own_making_goes_there_and_back(
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


def test_weights_without_a_place_are_told_but_not_those_of_a_document_encoder(tmp_path: Path) -> None:
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


def test_a_dtype_noted_for_a_part_does_not_round_its_weights(tmp_path: Path) -> None:
    theirs = make_hf_checkpoint(tmp_path / "hf")
    edit_json(tmp_path / "hf/config.json", lambda config: config["generator"].update(dtype="bfloat16"))
    edit_json(tmp_path / "hf/config.json", lambda config: config["question_encoder"].update(dtype="float16"))
    model = RagModel.from_hf_rag(tmp_path / "hf")
    assert_equal_weights(model.generator, theirs.rag.generator)
    assert_equal_weights(model.question_encoder.model, theirs.rag.question_encoder)


def edit_json(path: Path, change: Any) -> None:
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


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


def test_what_is_no_rag_checkpoint_is_refused_with_its_model_type_and_its_use(tmp_path: Path) -> None:
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


def test_a_question_encoder_other_than_dprs_needs_its_pooling_to_be_told(tmp_path: Path) -> None:
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
    with pytest.raises(ConfigError, match="can be dpr"):
        RagModel.from_hf_rag(tmp_path / "dpr", pooling="mean")


def test_what_config_json_says_wins_over_our_files(tmp_path: Path) -> None:
    make_model(variant="token").to_hf_rag(tmp_path / "hf")
    changed = {"n_docs": 7, "max_combined_length": 33, "title_sep": " : ", "architectures": [CLASSES["sequence"]]}
    edit_json(tmp_path / "hf/config.json", lambda config: config.update(changed))
    settings = RagModel.from_hf_rag(tmp_path / "hf").settings
    assert (settings.variant, settings.num_docs, settings.prompt.max_context_tokens) == ("sequence", 7, 33)
    assert settings.prompt.template == "{title} : {text} // {question}"
    assert settings.document_encoder_fingerprint == "f" * 64


def test_the_variant_of_an_export_is_the_one_asked_for(tmp_path: Path) -> None:
    make_model(variant="token").to_hf_rag(tmp_path / "hf", variant="sequence")
    assert json.loads((tmp_path / "hf/rag_model.json").read_text())["variant"] == "sequence"
    assert RagModel.from_hf_rag(tmp_path / "hf").settings.variant == "sequence"


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
    assert S < 90, "cut contexts differ: theirs lose the question, ours the passage's end"
    unquoted = [[Passage(one.id, one.title.strip('"'), one.text) for one in passages_K] for passages_K in TITLED]
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
def test_prompts_that_their_retriever_cannot_make_are_known(template: str) -> None:
    assert separators_of(template) is None


def test_separators_that_make_no_prompt_are_refused(tmp_path: Path) -> None:
    make_hf_checkpoint(tmp_path / "hf")
    edit_json(tmp_path / "hf/config.json", lambda config: config.update(title_sep=" {text} "))
    with pytest.raises(ConfigError, match="title_sep"):
        RagModel.from_hf_rag(tmp_path / "hf")


def test_the_tokens_of_generation_config_reach_the_generator(tmp_path: Path) -> None:
    make_hf_checkpoint(tmp_path / "hf")
    given = {"forced_eos_token_id": 2, "suppress_tokens": [5, 6], "bad_words_ids": [[7]], "decoder_start_token_id": 4}
    edit_json(tmp_path / "hf/generation_config.json", lambda config: config.update(given, bos_token_id=None))
    generator: Any = RagModel.from_hf_rag(tmp_path / "hf").generator
    assert {name: getattr(generator.generation_config, name) for name in given} == given
    assert generator.generation_config.bos_token_id == START, (
        "what the file leaves open stays as the generator's configuration has it"
    )
    (tmp_path / "hf/generation_config.json").unlink()
    generator = RagModel.from_hf_rag(tmp_path / "hf").generator
    assert generator.generation_config.decoder_start_token_id == END


def test_forced_tokens_of_checkpoints_older_than_generation_config_reach_the_generator(tmp_path: Path) -> None:
    make_hf_checkpoint(tmp_path / "hf")
    (tmp_path / "hf/generation_config.json").unlink()
    given = {"forced_bos_token_id": START, "forced_eos_token_id": 2, "bad_words_ids": [[7]]}
    edit_json(tmp_path / "hf/config.json", lambda config: config["generator"].update(given))
    generator: Any = RagModel.from_hf_rag(tmp_path / "hf").generator
    assert {name: getattr(generator.generation_config, name) for name in given} == given


@pytest.mark.parametrize("variant", ["sequence", "token"])
@pytest.mark.parametrize("family", FAMILIES)
def test_their_classes_decode_with_the_generators_tokens(family: str, variant: Variant, tmp_path: Path) -> None:
    model = make_model(family)
    expected = {"decoder_start_token_id": 5, "eos_token_id": 6, "pad_token_id": PAD, "bos_token_id": 7}
    model.generator.generation_config.update(**expected, suppress_tokens=[9])
    if family == "bart":
        model.generator.config.forced_eos_token_id = END  # as released BART models have it; decoding does without
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


def test_exporting_changes_nothing_of_the_model(tmp_path: Path) -> None:
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
