"""Questions by people over paragraphs by people: corpus → embeddings → index → recall."""

from __future__ import annotations

from pathlib import Path

import pytest

from rag_core.corpus.corpus import CorpusConfig
from rag_core.embeddings.embeddings import EmbedConfig
from rag_core.embeddings.text_encoder import TextEncoder
from rag_core.evaluation.evaluation import evaluate_retrieval
from rag_core.index.passage_index import IndexConfig, PassageIndex
from rag_core.questions.questions import read_questions
from tests.conftest import MINILM


@pytest.mark.slow
def test_untrained_recall_on_xquad_is_what_brute_force_gives(services: Path, xquad: Path, tmp_path: Path) -> None:
    from flows.stages.build_index import build_index
    from flows.stages.embed_corpus import embed_corpus
    from flows.stages.make_corpus import make_corpus

    corpus = make_corpus([xquad], tmp_path / "corpus", CorpusConfig(format="squad"))
    assert corpus.counts == {"passages": 240, "rejects": 0}
    embeddings = embed_corpus(corpus.path, tmp_path / "embeddings", EmbedConfig(encoder=MINILM))
    index = build_index(embeddings.path, corpus.path, tmp_path / "index", IndexConfig())
    questions = read_questions(xquad)
    assert len(questions) == 1190
    encoder = TextEncoder.from_pretrained(MINILM)
    scores = evaluate_retrieval(PassageIndex.open(index.path), encoder, questions, [1, 5, 20]).overall.means
    # Measured with plain PyTorch and NumPy before this project was written: 88.5%, 98.2%, 99.3% (text without title).
    assert scores["recall@1"] == pytest.approx(0.885, abs=0.02)
    assert scores["recall@5"] == pytest.approx(0.982, abs=0.01)
    assert scores["recall@20"] == pytest.approx(0.993, abs=0.006)
