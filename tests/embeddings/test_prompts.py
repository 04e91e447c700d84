"""Prompts before questions and before passages (E5's "query: " and "passage: "): each side its own, wherever texts are read."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from rag_core.corpus.corpus import Corpus, CorpusConfig, write_corpus
from rag_core.embeddings.embeddings import EmbedConfig, Embeddings, embed_shard, load_document_encoder, shard_name
from rag_core.embeddings.encoder_settings import EncoderSettings
from rag_core.embeddings.text_encoder import TextEncoder
from rag_core.errors import ConfigError
from rag_core.evaluation.evaluation import check_own_encoder, evaluate_retrieval
from rag_core.index.passage_index import IndexConfig, PassageIndex, build_index
from rag_core.model.rag_model import RagModel, load_question_encoder
from rag_core.questions.questions import read_questions
from rag_core.storage.artifact import publish
from tests.support.small_corpus import (
    FACTS,
    QUESTIONS,
    make_encoder,
    make_generator,
    model_config,
    write_passages_jsonl,
    write_questions_jsonl,
)

ASK, READ = "which city: ", "people live in "
TEXTS = [question for question, *_ in QUESTIONS]
PASSAGE_TEXTS = [f"{title} {text}" for _, title, text in FACTS]


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("parts")
    encoder = make_encoder(folder / "encoder")
    return encoder, make_generator(folder / "generator", encoder)


@pytest.fixture(scope="module")
def index(parts: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> PassageIndex:
    """An index of passages with a prompt before them."""
    folder = tmp_path_factory.mktemp("index")
    write_corpus([write_passages_jsonl(folder / "passages.jsonl")], folder / "corpus", CorpusConfig(format="jsonl"))
    corpus, config = (
        Corpus.open(folder / "corpus"),
        EmbedConfig(encoder=str(parts[0]), prompt=READ, precision="float32"),
    )
    encoder = load_document_encoder(config)
    made_from = {"corpus": corpus.manifest.fingerprint}
    with publish(folder / "embeddings", "embeddings", config={"prompt": READ}, made_from=made_from) as draft:
        for number, shard in enumerate(corpus.shards):
            embed_shard(encoder, shard, draft.folder / shard_name(number), config)
        draft.counts["passages"] = len(corpus)
        details = {"dim": encoder.dim, "dtype": "float32", "encoder": str(parts[0])}
        draft.details = details | {"encoder_fingerprint": encoder.fingerprint()}
    build_index(Embeddings.open(folder / "embeddings"), corpus, folder / "index", IndexConfig())
    return PassageIndex.open(folder / "index")


def plain_vectors(encoder: Path, texts: list[str]) -> np.ndarray:
    """The reference: texts with the prompt written out, through an encoder that has none."""
    return TextEncoder.from_pretrained(encoder).encode(texts, precision="float32")


def test_passages_are_embedded_behind_their_prompt(parts: tuple[Path, Path], index: PassageIndex) -> None:
    expected_ND = plain_vectors(parts[0], [READ + text for text in PASSAGE_TEXTS])
    result = index.search(expected_ND, 1)
    np.testing.assert_allclose(result.vectors_BKD[:, 0], expected_ND[result.rows_BK[:, 0]], rtol=0, atol=1e-5)
    np.testing.assert_allclose(
        np.load(index.path / "vectors.npy"), expected_ND, rtol=0, atol=1e-5, err_msg="the prompt was not read"
    )


def test_questions_of_a_model_are_embedded_behind_theirs_also_after_saving(
    parts: tuple[Path, Path], tmp_path: Path
) -> None:
    config = model_config(*parts).model_copy(update={"question_prompt": ASK})
    model = RagModel.from_parts(config).eval()
    model.save_pretrained(tmp_path / "model")
    expected_ND = plain_vectors(parts[0], [ASK + text for text in TEXTS])
    for opened in (model, RagModel.from_pretrained(tmp_path / "model")):
        vectors_ND = opened.question_encoder.encode(TEXTS, precision="float32")
        np.testing.assert_allclose(vectors_ND, expected_ND, rtol=0, atol=1e-5)
        np.testing.assert_allclose(opened.question_encoder.embed(TEXTS).detach(), expected_ND, rtol=0, atol=1e-5)
    # The trained question encoder as a document encoder: the questions' prompt does not go before passages.
    passages = TextEncoder.from_pretrained(tmp_path / "model" / "question_encoder", side="passage")
    assert passages.prompt == ""


def test_a_model_with_an_encoder_for_texts_of_any_kind_uses_the_question_prompt(
    parts: tuple[Path, Path],
) -> None:
    start = RagModel.from_parts(model_config(*parts))
    encoder = TextEncoder.from_pretrained(parts[0])
    encoder.settings = encoder.settings.model_copy(update={"question_prompt": ASK})
    model = RagModel(encoder, start.generator, start.generator_tokenizer, start.settings)
    assert model.question_encoder.prompt == ASK


def test_a_prompt_changes_the_keys_and_no_prompt_keeps_the_former_keys(parts: tuple[Path, Path]) -> None:
    config = model_config(*parts)
    asking = config.model_copy(update={"question_prompt": ASK})
    assert "question_prompt" not in config.decisive()
    assert asking.decisive()["question_prompt"] == ASK
    assert RagModel.from_parts(config).fingerprint() != RagModel.from_parts(asking).fingerprint()
    settings = EncoderSettings().model_dump_json()
    assert "question_prompt" not in settings
    assert "include_prompt" not in settings
    plain = TextEncoder.from_pretrained(parts[0])
    for side in ("question", "passage"):
        assert TextEncoder.from_pretrained(parts[0], side=side).fingerprint() == plain.fingerprint()
    # A prompt of the other side changes no vector.
    asks = TextEncoder.from_pretrained(parts[0], side="passage")
    asks.settings = asks.settings.model_copy(update={"question_prompt": ASK})
    assert asks.fingerprint() == plain.fingerprint()


def test_the_indexs_own_encoder_is_recognised_and_embeds_questions_without_the_passage_prompt(
    parts: tuple[Path, Path], index: PassageIndex, tmp_path: Path
) -> None:
    own = TextEncoder.from_pretrained(parts[0], side="passage", prompt=index.manifest.details["prompt"])
    check_own_encoder(index, own)
    assert own.for_questions().prompt == ""
    questions = read_questions(write_questions_jsonl(tmp_path / "questions.jsonl"))
    scores = evaluate_retrieval(index, own.for_questions(ASK), questions, [1])
    vectors_ND = plain_vectors(parts[0], [ASK + text for text in TEXTS])
    top = [index.passages_of(index.search(vectors_ND, 1).rows_BK)[at][0].id for at in range(len(TEXTS))]
    expected = np.mean([found == gold for found, (_, _, gold, _) in zip(top, QUESTIONS, strict=True)])
    assert scores.overall.means["recall@1"] == pytest.approx(expected)


def test_retrieve_takes_a_question_prompt_on_the_command_line(
    parts: tuple[Path, Path],
    index: PassageIndex,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from typer.testing import CliRunner

    from flows.cli.main import app

    questions = write_questions_jsonl(tmp_path / "questions.jsonl")
    prompts = []
    encode = TextEncoder.encode

    def recording_encode(self: TextEncoder, texts: list[str], **options: object) -> np.ndarray:
        prompts.append(self.prompt)
        return encode(self, texts, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(TextEncoder, "encode", recording_encode)
    arguments = ["retrieve", "--index", str(index.path), "--questions", str(questions), "--k", "1", "--json"]
    for options, prompt in (([], ""), (["--question-prompt", ASK], ASK)):
        result = CliRunner().invoke(app, [*arguments, *options])
        assert result.exit_code == 0, result.output
        assert 0 <= json.loads(result.output)["recall@1"] <= 1
        assert prompts.pop() == prompt


def test_more_tokens_than_an_encoder_has_positions_for_are_refused_when_it_is_loaded(
    parts: tuple[Path, Path], tmp_path: Path
) -> None:
    encoder = make_encoder(tmp_path / "encoder")
    settings = json.loads((encoder / "text_encoder.json").read_text())
    for tokens in (64, 65):
        (encoder / "text_encoder.json").write_text(json.dumps(settings | {"max_tokens": tokens}))
        if tokens == 64:
            vectors_ND = TextEncoder.from_pretrained(encoder).encode([" ".join(["lyon"] * 100)])
            assert np.isfinite(vectors_ND).all()
    with pytest.raises(ConfigError, match=r"max_tokens is 65, but the encoder \(bert\) has positions for 64 tokens"):
        TextEncoder.from_pretrained(encoder)


def test_each_side_is_loaded_with_the_prompt_that_the_encoders_folder_has_for_it(tmp_path: Path) -> None:
    encoder = make_encoder(tmp_path / "encoder")
    settings = json.loads((encoder / "text_encoder.json").read_text())
    (encoder / "text_encoder.json").write_text(
        json.dumps(settings | {"prompt": "any: ", "question_prompt": ASK, "passage_prompt": READ})
    )
    config = model_config(encoder, tmp_path / "generator")
    assert load_document_encoder(EmbedConfig(encoder=str(encoder))).prompt == READ
    assert load_question_encoder(config).prompt == ASK
    assert TextEncoder.from_pretrained(encoder).prompt == "any: "
    # What is set wins, even where it is empty.
    assert load_document_encoder(EmbedConfig(encoder=str(encoder), prompt="")).prompt == ""
    assert load_question_encoder(config.model_copy(update={"question_prompt": ""})).prompt == ""
