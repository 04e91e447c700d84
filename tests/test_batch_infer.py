"""What a batch of questions is answered from: the index, the file's own contexts, or nothing."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from rag_core.errors import ConfigError
from rag_core.index import PassageIndex
from rag_core.questions import read_questions
from rag_core.rag_model import RagModel
from rag_core.reader import DecodingConfig
from tasks.batch_infer import InferConfig, answer_questions
from tests.small_corpus import make_encoder, make_generator, make_index, model_config

CONFIG = InferConfig(variant="token", decoding=DecodingConfig(num_beams=2, max_new_tokens=4, num_return_sequences=1))


@pytest.fixture(scope="module")
def system(tmp_path_factory: pytest.TempPathFactory) -> tuple[RagModel, PassageIndex]:
    folder = tmp_path_factory.mktemp("infer")
    encoder = make_encoder(folder / "encoder")
    model = RagModel.from_parts(model_config(encoder, make_generator(folder / "generator", encoder)))
    return model.eval(), make_index(folder, encoder)


def fid_file(folder: Path, *, scored: bool = True, bare_last: bool = False) -> Path:
    """Two questions with contexts of their own, two and one."""
    contexts = [
        {"id": "x1", "title": "Lyon", "text": "Lyon is a city in Norway."},
        {"id": "x2", "title": "", "text": "About 522."},
    ]
    rows = [
        {"question": "which country is Lyon in?", "ctxs": contexts},
        {"question": "what is it?", "ctxs": contexts[1:]},
    ]
    if scored:
        for row in rows:
            row["ctxs"] = [dict(one, score=2.0 - place) for place, one in enumerate(row["ctxs"])]
    if bare_last:
        del rows[1]["ctxs"]
    file = folder / "fid.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def test_contexts_of_the_file_are_read_instead_of_retrieving(
    system: tuple[RagModel, PassageIndex], tmp_path: Path
) -> None:
    answers = answer_questions(*system, read_questions(fid_file(tmp_path)), CONFIG)
    assert [read.passage.text for read in answers[0].passages] == ["Lyon is a city in Norway.", "About 522."]
    assert len(answers[1].passages) == 1
    # softmax of the file's scores 2 and 1
    assert [read.prior for read in answers[0].passages] == pytest.approx([0.7310586, 0.2689414], abs=1e-6)


def test_contexts_without_scores_count_alike(system: tuple[RagModel, PassageIndex], tmp_path: Path) -> None:
    answers = answer_questions(*system, read_questions(fid_file(tmp_path, scored=False)), CONFIG)
    assert [read.prior for read in answers[0].passages] == pytest.approx([0.5, 0.5])


def test_a_file_with_contexts_for_some_questions_only_is_refused(
    system: tuple[RagModel, PassageIndex], tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match="separate files"):
        answer_questions(*system, read_questions(fid_file(tmp_path, bare_last=True)), CONFIG)


def test_closed_book_answers_read_no_passage(system: tuple[RagModel, PassageIndex], tmp_path: Path) -> None:
    questions = read_questions(fid_file(tmp_path))
    answers = answer_questions(*system, questions, CONFIG.model_copy(update={"closed_book": True}))
    assert all(read.passage.text == "" for answer in answers for read in answer.passages)
