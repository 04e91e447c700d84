"""Questions to parts of predictions, on Ray's long-lived workers.

Workers load the model and map the index once, retrieve (unless the file brings its own contexts) and decode, one shard of
questions at a time. A worker imports this module and neither Prefect nor MLflow, which would take it seconds.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict
from itertools import groupby
from pathlib import Path
from typing import Any

import torch
from pydantic import BaseModel, ConfigDict, Field

from rag_core.corpus.passages import NO_PASSAGE, Passage
from rag_core.errors import ConfigError
from rag_core.evaluation.predictions import prediction_row, write_part
from rag_core.index.retriever import Retriever
from rag_core.model.rag_model import RagModel, batches_of
from rag_core.model.reader import Answer, DecodingConfig
from rag_core.model.settings import ModelConfig
from rag_core.questions.questions import Question, read_questions
from rag_core.reading.contexts import ContextCount
from rag_core.reading.likelihood import Variant
from rag_core.storage.artifact import finished_file
from rag_core.storage.places import absolute
from tasks.on_ray.retriever_shards import RetrievalConfig
from tasks.on_ray.runtime import ensure_ray, progress, share_of_cluster
from tasks.on_ray.workers import map_on_workers

# Beside each part: how many contexts were read for it.
COUNT = ".count"


class InferConfig(BaseModel):
    """How a question file is answered."""

    model_config = ConfigDict(extra="forbid")

    variant: Variant | None = Field(None, description="sequence or token; empty: what the model was trained as")
    num_docs: int | None = Field(None, ge=1, description="K; empty: the model's own")
    closed_book: bool = Field(False, description="answer without passages, for contrast")
    decoding: DecodingConfig = Field(default_factory=DecodingConfig)
    shard_questions: int = Field(256, ge=1, description="questions that a worker answers at a time")
    num_workers: int = Field(0, ge=0, description="actors; 0: one for each GPU, else one for each machine")
    retrieval: RetrievalConfig = Field(default_factory=RetrievalConfig)
    trust_remote_code: bool = Field(False, description="run code that was saved with the trained model")


class QuestionAnswerer:
    """In a worker: loads model and index once, then answers one shard of questions a call."""

    def __init__(
        self,
        model: str | ModelConfig,
        open_retriever: Callable[[], Retriever],
        questions: str,
        parts: str,
        config: InferConfig,
        gpu: bool,
        meter: Any,
    ) -> None:
        self._config, self._parts, self._meter = config, Path(parts), meter
        self._model = load_model(model, config).to("cuda" if gpu else "cpu")
        self._index = open_retriever()
        self._questions = read_questions(Path(questions))

    def __call__(self, number: int) -> ContextCount:
        size = self._config.shard_questions
        part = self._parts / part_name(number, size)
        if part.is_file():  # the worker that finished it was lost before it could say so
            return _count_of(part)
        mine = self._questions[number * size : (number + 1) * size]
        with self._model.reader.counting() as count:
            answers = answer_questions(
                self._model, self._index, mine, self._config, lambda done: self._meter.advance.remote(done)
            )
        rows = [prediction_row(question, answer) for question, answer in zip(mine, answers, strict=True)]
        with finished_file(part.with_suffix(COUNT)) as file:
            file.write_text(json.dumps(asdict(count)), encoding="utf-8")
        write_part(rows, part)
        return count


def load_model(model: str | ModelConfig, config: InferConfig) -> RagModel:
    """A trained model from its folder, or an untrained one from its parts."""
    if isinstance(model, ModelConfig):
        return RagModel.from_parts(model)
    return RagModel.from_pretrained(model, trust_remote_code=config.trust_remote_code)


def part_name(number: int, size: int) -> str:
    """File name of one shard of predictions, of so many questions; names sort in the order of the questions."""
    return f"part-{number:08d}-of-{size}.jsonl"


def answer_questions(
    model: RagModel,
    index: Retriever,
    questions: Sequence[Question],
    config: InferConfig,
    on_progress: Callable[[int], None] = lambda done: None,
) -> list[Answer]:
    """Answers in the questions' order, closed-book, over the file's own contexts, or over what the index finds.

    Questions with equally many contexts of like length are decoded together, the longest first, so that little padding
    is read and memory that does not suffice is found out at once. `on_progress` gets the questions done of each batch.
    """
    variant = model.variant_or(config.variant)
    passages, scores = _what_to_read(model, index, questions, config)
    lengths = [max(len(one.title) + len(one.text) for one in passages_K) for passages_K in passages]
    order = sorted(range(len(questions)), key=lambda place: (len(passages[place]), lengths[place]), reverse=True)
    answers: dict[int, Answer] = {}
    with model.reader.many_batches(config.decoding):
        for _, alike in groupby(order, key=lambda place: len(passages[place])):
            for batch in batches_of(list(alike), config.decoding.batch_size):
                found = model.reader.answer_from(
                    [questions[place].question for place in batch],
                    [passages[place] for place in batch],
                    torch.tensor([scores[place] for place in batch], dtype=torch.float32, device=model.device),
                    variant=variant,
                    decoding=config.decoding,
                )
                answers.update(zip(batch, found, strict=True))
                on_progress(len(batch))
    return [answers[place] for place in range(len(questions))]


def _what_to_read(
    model: RagModel, index: Retriever, questions: Sequence[Question], config: InferConfig
) -> tuple[list[list[Passage]], list[list[float]]]:
    """Passages of every question and their scores; files may bring a different number of them for each question."""
    num_docs = config.num_docs or model.settings.num_docs
    if config.closed_book:
        return [[NO_PASSAGE]] * len(questions), [[0.0]] * len(questions)
    if not any(question.contexts for question in questions):
        texts = [question.question for question in questions]
        found = index.search(model.question_encoder.encode(texts, precision=config.decoding.precision), num_docs)
        return index.passages_of(found.rows_BK), (model.settings.score_scale * found.scores_BK).tolist()
    own = [list(question.contexts or ())[:num_docs] for question in questions]
    if not all(own):
        raise ConfigError(
            "Some questions of the file bring their own contexts (ctxs) and some do not. Put them into separate files."
        )
    given = [question.context_scores or (0.0,) * num_docs for question in questions]
    return own, [list(scores[: len(contexts)]) for contexts, scores in zip(own, given, strict=True)]


def answer_on_ray(
    model: str | ModelConfig,
    open_retriever: Callable[[], Retriever],
    questions: Path,
    parts: Path,
    config: InferConfig,
    total: int,
    stage: str,
) -> ContextCount:
    """Every shard of the questions into a part of predictions in `parts`; returns the contexts that were read and cut.

    Parts that a former run finished stay as they are.
    """
    ensure_ray()
    share, size = share_of_cluster(config.num_workers), config.shard_questions
    names = [part_name(number, size) for number in range(-(-total // size))]
    for file in parts.iterdir():  # a former run may have cut the questions otherwise
        if file.with_suffix(".jsonl").name not in names:
            file.unlink()
    finished = [number for number, name in enumerate(names) if (parts / name).is_file()]
    shards = [number for number in range(len(names)) if number not in set(finished)]
    done = sum(min(size, total - number * size) for number in finished)
    files = absolute(questions), str(parts)
    with progress(stage, total, done=done) as meter:
        arguments = (model, open_retriever, *files, config, share.gpus > 0, meter)
        counts = map_on_workers(share, QuestionAnswerer, arguments, shards)
    counts += [_count_of(parts / names[one]) for one in finished]
    return ContextCount(**{name: sum(getattr(one, name) for one in counts) for name in ("contexts", "contexts_cut")})


def _count_of(part: Path) -> ContextCount:
    return ContextCount(**json.loads(part.with_suffix(COUNT).read_bytes()))
