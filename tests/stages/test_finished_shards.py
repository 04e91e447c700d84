"""If a worker finishes a shard and is lost before it reports that, the shard is counted and not made again."""

from __future__ import annotations

from pathlib import Path

import pytest

from rag_core.corpus.corpus import Corpus
from rag_core.embeddings.embeddings import EmbedConfig
from rag_core.index.passage_index import PassageIndex
from rag_core.model.reader import DecodingConfig
from tasks.on_ray.answering import InferConfig, QuestionAnswerer
from tasks.on_ray.embedding import ShardEmbedder
from tasks.on_ray.runtime import progress
from tests.support.small_corpus import make_encoder, make_generator, make_index, model_config, write_questions_jsonl

pytestmark = pytest.mark.timeout(300)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Encoder, generator, corpus, index and questions."""
    folder = tmp_path_factory.mktemp("finished")
    encoder = make_encoder(folder / "encoder")
    make_generator(folder / "generator", encoder)
    make_index(folder, encoder)
    write_questions_jsonl(folder / "questions.jsonl")
    return folder


def times_written(folder: Path) -> dict[str, int]:
    return {file.name: file.stat().st_mtime_ns for file in folder.iterdir()}


def test_of_a_corpus(services: Path, folder: Path, tmp_path: Path) -> None:
    shards = [(number, str(path)) for number, path in enumerate(Corpus.open(folder / "corpus").shards)]
    config = EmbedConfig(encoder=str(folder / "encoder"))
    with progress("embed-corpus", 9) as meter:
        first = [ShardEmbedder(config, str(tmp_path), False, meter)(shard) for shard in shards]
        before = times_written(tmp_path)
        assert [ShardEmbedder(config, str(tmp_path), False, meter)(shard) for shard in shards] == first == [4, 4, 1]
    assert times_written(tmp_path) == before


def test_of_questions(services: Path, folder: Path, tmp_path: Path) -> None:
    decoding = DecodingConfig(num_beams=2, max_new_tokens=4, num_return_sequences=1)
    config = InferConfig(variant="token", decoding=decoding, shard_questions=3)
    model = model_config(folder / "encoder", folder / "generator")
    files = str(folder / "questions.jsonl"), str(tmp_path)
    with progress("batch-infer", 8) as meter:
        arguments = model, lambda: PassageIndex.open(folder / "index"), *files, config, False, meter
        first = [QuestionAnswerer(*arguments)(number) for number in range(3)]
        before = times_written(tmp_path)
        assert [QuestionAnswerer(*arguments)(number) for number in range(3)] == first
    assert [count.contexts for count in first] == [9, 9, 6]
    assert times_written(tmp_path) == before
