"""A question's gold passages exist in the corpus read from the same data set, and contain the answer."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from rag_core.corpus.corpus import Corpus, CorpusConfig, write_corpus
from rag_core.questions.questions import read_questions

TEXTS = ("The river of Cork is the Lee.", "The river of Oslo is the Akerselva.")
ANSWERS = ("Lee", "Akerselva")


def put(path: Path, *rows: Any, whole: bool = False) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(rows[0]) if whole else "".join(json.dumps(row) + "\n" for row in rows))
    return path


def squad(folder: Path, *titles: str | None) -> tuple[Path, Path]:
    articles = [
        {
            "title": title,
            "paragraphs": [{"context": text, "qas": [{"id": answer, "question": "q?", "answers": [{"text": answer}]}]}],
        }
        for title, text, answer in zip(titles, TEXTS, ANSWERS, strict=True)
    ]
    file = put(folder / "dev.json", {"data": articles}, whole=True)
    return file, file


def squad_rows(folder: Path, titles: tuple[str | None, ...], *, parquet: bool) -> tuple[Path, Path]:
    rows: list[dict[str, Any]] = [
        {"id": f"{n}-{at}", "title": title, "context": text, "question": f"q{n}?", "answers": {"text": [answer]}}
        for at, (title, text, answer) in enumerate(zip(titles, TEXTS, ANSWERS, strict=True))
        for n in range(2)
    ]
    if not parquet:
        return (put(folder / "rows.jsonl", *rows),) * 2
    pq.write_table(pa.Table.from_pylist(rows), folder / "rows.parquet")
    return (folder / "rows.parquet",) * 2


def hotpot(folder: Path) -> tuple[Path, Path]:
    rows = [
        {
            "_id": answer,
            "question": "q?",
            "answer": answer,
            "supporting_facts": [[f"City {at}", 0]],
            "context": [["Elsewhere", ["Nothing.", " More."]], [f"City {at}", [text, " It is long."]]],
        }
        for at, (text, answer) in enumerate(zip(TEXTS, ANSWERS, strict=True))
    ]
    file = put(folder / "hotpot.json", rows, whole=True)
    return file, file


def kilt(folder: Path) -> tuple[Path, Path]:
    pages = [
        {
            "_id": f"1{at}",
            "wikipedia_id": f"1{at}",
            "wikipedia_title": "T",
            "text": ["T\n", "Section::::Rivers.\n", f"{text}\n"],
        }
        for at, text in enumerate(TEXTS)
    ]
    questions = [
        {
            "id": answer,
            "input": "q?",
            "output": [
                {
                    "answer": answer,
                    "provenance": [{"wikipedia_id": f"1{at}", "start_paragraph_id": 2, "end_paragraph_id": 2}],
                }
            ],
        }
        for at, answer in enumerate(ANSWERS)
    ]
    return put(folder / "source.json", *pages), put(folder / "dev-kilt.jsonl", *questions)


def dpr(folder: Path) -> tuple[Path, Path]:
    source = folder / "psgs.tsv"
    source.write_text("id\ttext\ttitle\n" + "".join(f"{at}\t{text}\tT\n" for at, text in enumerate(TEXTS)))
    rows = [
        {
            "question": f"{answer}?",
            "answers": [answer],
            "positive_ctxs": [{"title": "T", "text": text, "passage_id": str(at)}],
        }
        for at, (text, answer) in enumerate(zip(TEXTS, ANSWERS, strict=True))
    ]
    return source, put(folder / "train.json", rows, whole=True)


def beir(folder: Path) -> tuple[Path, Path]:
    corpus = [{"_id": f"d{at}", "title": "", "text": text, "metadata": {}} for at, text in enumerate(TEXTS)]
    put(folder / "queries.jsonl", *({"_id": f"q{at}", "text": f"{answer}?"} for at, answer in enumerate(ANSWERS)))
    (folder / "qrels").mkdir()
    (folder / "qrels/test.tsv").write_text("query-id\tcorpus-id\tscore\nq0\td0\t1\nq1\td1\t1\n")
    return put(folder / "corpus.jsonl", *corpus), folder / "qrels/test.tsv"


DATA_SETS = {
    "SQuAD": lambda folder: squad(folder, "Cork", "Oslo"),
    "SQuAD, no titles": lambda folder: squad(folder, None, ""),
    "SQuAD, equal titles": lambda folder: squad(folder, "Rivers", "Rivers"),
    "SQuAD rows": lambda folder: squad_rows(folder, ("Cork", "Cork"), parquet=False),
    "SQuAD rows, no titles": lambda folder: squad_rows(folder, (None, ""), parquet=False),
    "SQuAD rows in Parquet": lambda folder: squad_rows(folder, ("Cork", "Oslo"), parquet=True),
    "HotpotQA": hotpot,
    "KILT": kilt,
    "DPR": dpr,
    "BEIR": beir,
}


@pytest.mark.parametrize("name", DATA_SETS)
def test_gold_passages_are_in_the_corpus_and_hold_the_answer(name: str, tmp_path: Path) -> None:
    source, file = DATA_SETS[name](tmp_path)
    write_corpus([source], tmp_path / "corpus", CorpusConfig())
    texts = {passage.id: passage.text for passage in Corpus.open(tmp_path / "corpus").iter_passages()}
    questions = read_questions(file)
    assert len(questions) >= 2
    for question in questions:
        (gold,) = question.gold_passage_ids
        answer = question.answers[0] if question.answers else question.question.removesuffix("?")
        assert answer in texts[gold]
