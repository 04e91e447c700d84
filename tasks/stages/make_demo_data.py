"""Writes the demo's files: passages and questions about places, in the format that users' own files have."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path

from prefect import task

from demo_data.config import GeonamesConfig
from demo_data.dataset import make_passages, make_questions
from rag_core.corpus.passages import Passage
from rag_core.questions.questions import write_questions


@task(name="make-demo-data")
def make_demo_data(config: GeonamesConfig, out: Path) -> Path:
    """Write passages.jsonl, train.jsonl, dev.jsonl and test.jsonl, and return their folder.

    The same settings give the same bytes.
    """
    out.mkdir(parents=True, exist_ok=True)
    _write_passages(make_passages(config), out / "passages.jsonl")
    for split, questions in make_questions(config).items():
        write_questions(questions, out / f"{split}.jsonl")
    return out.resolve()


def _write_passages(passages: Sequence[Passage], file: Path) -> None:
    partial = file.with_name(f".{file.name}.partial")
    with partial.open("w", encoding="utf-8") as lines:
        for passage in passages:
            row = {"id": passage.id, "title": passage.title, "text": passage.text}
            lines.write(json.dumps(row, ensure_ascii=False) + "\n")
    os.replace(partial, file)
