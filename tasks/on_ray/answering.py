"""Answers questions on Ray's long-lived workers, one shard of questions at a time.

A worker loads the model and maps the index once. For each shard it retrieves (unless the questions bring their
own contexts), decodes, and writes one part of the predictions. This module imports neither Prefect nor MLflow,
which would cost each worker seconds at its start.
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

# Suffix of the file beside each part that holds the number of contexts read for it.
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
    """In a worker: loads model and index once, then answers one shard of questions per call."""

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
        if part.is_file():  # a worker finished it, but was lost before it could report that
            return _count_of(part)
        questions = self._questions[number * size : (number + 1) * size]
        with self._model.reader.counting() as count:
            answers = answer_questions(
                self._model, self._index, questions, self._config, lambda done: self._meter.advance.remote(done)
            )
        rows = [prediction_row(question, answer) for question, answer in zip(questions, answers, strict=True)]
        with finished_file(part.with_suffix(COUNT)) as file:
            file.write_text(json.dumps(asdict(count)), encoding="utf-8")
        write_part(rows, part)
        return count


def load_model(model: str | ModelConfig, config: InferConfig) -> RagModel:
    """Load a trained model from its folder, or an untrained one from its parts."""
    if isinstance(model, ModelConfig):
        return RagModel.from_parts(model)
    return RagModel.from_pretrained(model, trust_remote_code=config.trust_remote_code)


def part_name(number: int, size: int) -> str:
    """File name of the predictions of a shard of `size` questions; names sort in the order of the questions."""
    return f"part-{number:08d}-of-{size}.jsonl"


def answer_questions(
    model: RagModel,
    index: Retriever,
    questions: Sequence[Question],
    config: InferConfig,
    on_progress: Callable[[int], None] = lambda done: None,
) -> list[Answer]:
    """Answer questions closed-book, from the file's own contexts, or from passages that the index finds.

    A batch holds questions with the same number of contexts and similar lengths, so it needs little padding.
    The longest batch comes first, so too little memory shows at once. `on_progress` gets the number of
    questions of each finished batch.

    Returns:
        the answers, in the order of the questions.
    """
    variant = model.variant_or(config.variant)
    passages, scores = _passages_to_read(model, index, questions, config)
    lengths = [max(len(passage.title) + len(passage.text) for passage in passages_K) for passages_K in passages]
    order = sorted(range(len(questions)), key=lambda row: (len(passages[row]), lengths[row]), reverse=True)
    answers: dict[int, Answer] = {}
    with model.reader.many_batches(config.decoding):
        for _, rows in groupby(order, key=lambda row: len(passages[row])):
            for batch in batches_of(list(rows), config.decoding.batch_size):
                batch_answers = model.reader.answer_from(
                    [questions[row].question for row in batch],
                    [passages[row] for row in batch],
                    torch.tensor([scores[row] for row in batch], dtype=torch.float32, device=model.device),
                    variant=variant,
                    decoding=config.decoding,
                )
                answers.update(zip(batch, batch_answers, strict=True))
                on_progress(len(batch))
    return [answers[row] for row in range(len(questions))]


def _passages_to_read(
    model: RagModel, index: Retriever, questions: Sequence[Question], config: InferConfig
) -> tuple[list[list[Passage]], list[list[float]]]:
    """The passages of every question and their scores. A file's own contexts may differ in number between questions."""
    num_docs = config.num_docs or model.settings.num_docs
    if config.closed_book:
        return [[NO_PASSAGE]] * len(questions), [[0.0]] * len(questions)
    if not any(question.contexts for question in questions):
        texts = [question.question for question in questions]
        vectors_BD = model.question_encoder.encode(texts, precision=config.decoding.precision)
        retrieved = index.search(vectors_BD, num_docs)
        return index.passages_of(retrieved.rows_BK), (model.settings.score_scale * retrieved.scores_BK).tolist()
    own = [list(question.contexts or ())[:num_docs] for question in questions]
    if not all(own):
        raise ConfigError(
            "Some questions of the file have their own contexts (ctxs) and some do not. Put them into separate files."
        )
    own_scores = [question.context_scores or (0.0,) * num_docs for question in questions]
    return own, [list(scores[: len(contexts)]) for contexts, scores in zip(own, own_scores, strict=True)]


def answer_on_ray(
    model: str | ModelConfig,
    open_retriever: Callable[[], Retriever],
    questions: Path,
    parts: Path,
    config: InferConfig,
    total: int,
    stage: str,
) -> ContextCount:
    """Answer every shard of the questions into a file in the folder `parts`; keep the files of finished shards.

    Returns:
        how many contexts were read and how many were cut, over all shards.
    """
    ensure_ray()
    share, size = share_of_cluster(config.num_workers), config.shard_questions
    names = [part_name(number, size) for number in range(-(-total // size))]
    for file in parts.iterdir():  # an earlier run may have used shards of another size
        if file.with_suffix(".jsonl").name not in names:
            file.unlink()
    finished = [number for number, name in enumerate(names) if (parts / name).is_file()]
    shards = [number for number in range(len(names)) if number not in set(finished)]
    done = sum(min(size, total - number * size) for number in finished)
    files = absolute(questions), str(parts)
    with progress(stage, total, done=done) as meter:
        arguments = (model, open_retriever, *files, config, share.gpus > 0, meter)
        counts = map_on_workers(share, QuestionAnswerer, arguments, shards)
    counts += [_count_of(parts / names[number]) for number in finished]
    totals = {name: sum(getattr(count, name) for count in counts) for name in ("contexts", "contexts_cut")}
    return ContextCount(**totals)


def _count_of(part: Path) -> ContextCount:
    return ContextCount(**json.loads(part.with_suffix(COUNT).read_bytes()))
