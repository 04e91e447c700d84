"""Stage 5: a question file to predictions, on Ray.

Questions are cut into shards; long-lived workers load the model and map the index once, retrieve (unless the file brings
its own contexts) and decode; parts are joined in the order of the file.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable, Sequence
from dataclasses import asdict
from itertools import groupby
from pathlib import Path
from typing import Any

import torch
from prefect import task
from pydantic import BaseModel, ConfigDict, Field

from rag_core.artefacts.artefact import (
    Manifest,
    fingerprint_of_files,
    finished_file,
    local_file,
    open_artefact,
    publish,
)
from rag_core.artefacts.artefact_inputs import input_paths
from rag_core.artefacts.places import absolute
from rag_core.contexts import ContextCount, check_questions
from rag_core.errors import ConfigError
from rag_core.index import PassageIndex
from rag_core.likelihood import Variant
from rag_core.passages import Passage
from rag_core.predictions import KIND, join_parts, prediction_row, write_part
from rag_core.questions import Question, read_questions
from rag_core.rag_model import ModelConfig, RagModel, batches_of
from rag_core.reader import Answer, DecodingConfig
from rag_core.retriever import Retriever
from tasks.ray_runtime import ensure_ray, progress, share_of_cluster
from tasks.ray_workers import map_on_workers
from tasks.results import StageResult
from tasks.retries import STAGE_RETRIES
from tasks.retriever_shards import RetrievalConfig, retrieval
from tasks.stage import Input, refuse_unseen_parts, run_stage
from tasks.tracking import StageRun

# Beside each part: how many contexts were read for it.
COUNT = ".count"
NO_PASSAGE = Passage(id="", title="", text="")


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


@task(name="batch-infer", **STAGE_RETRIES)
def batch_infer(
    model: Path | ModelConfig,
    index: Path,
    questions: Path,
    out: Path,
    config: InferConfig,
    parent_run_id: str | None = None,
    stage: str = "batch-infer",
) -> StageResult:
    """Answer every question of a file. `model` is a trained folder, or the parts of one that is not trained yet."""
    opened_index, opened_questions = PassageIndex.open(index), read_questions(questions)
    loaded = load_model(model if isinstance(model, ModelConfig) else str(model), config)
    loaded.check_index(opened_index)
    loaded.variant_or(config.variant)
    opened_index.check_num_docs(config.num_docs or loaded.settings.num_docs)
    check_questions(loaded.generator_tokenizer, loaded.settings.prompt, opened_questions, questions, learnt=False)
    settings_print = hashlib.sha256(loaded.settings.model_dump_json().encode()).hexdigest()
    made_from = {
        "model": loaded.fingerprint(),
        "model_settings": settings_print,
        "index": opened_index.manifest.fingerprint,
        "questions": fingerprint_of_files([local_file(questions)]),
    }
    undecisive = {"num_workers", "shard_questions", "retrieval", "trust_remote_code"}
    settings = config.model_dump(mode="json", exclude=undecisive)
    size = config.shard_questions

    def work(run: StageRun) -> Manifest:
        with publish(out, KIND, config=settings, made_from=made_from, resume=True) as draft:
            parts = draft.folder / "parts"
            parts.mkdir(exist_ok=True)
            source = model.with_absolute_sources() if isinstance(model, ModelConfig) else absolute(model)
            with retrieval(absolute(index), opened_index.manifest, config.retrieval) as open_retriever:
                count = _answer_on_ray(source, open_retriever, questions, parts, config, len(opened_questions), stage)
            run.log_metrics({"contexts_cut_share": count.cut_share})
            names = [part_name(number, size) for number in range(-(-len(opened_questions) // size))]
            refuse_unseen_parts(parts, names, out)
            draft.counts["questions"] = join_parts([parts / name for name in names], draft.folder)
            draft.counts |= asdict(count)
            shutil.rmtree(parts)
            draft.details |= {
                "model": str(model),
                "shard_questions": config.shard_questions,
                "inputs": input_paths(index=index, questions=questions),
            }
        return open_artefact(out, KIND, check_content=False)

    inputs = {"index": Input(index, made_from["index"]), "questions": Input(questions, made_from["questions"])}
    if not isinstance(model, ModelConfig):
        inputs["model"] = Input(model, made_from["model"])
    return run_stage(
        stage,
        KIND,
        out,
        config=settings,
        inputs=inputs,
        made_from=made_from,
        parent_run_id=parent_run_id,
        work=work,
    )


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


def _answer_on_ray(
    model: str | ModelConfig,
    open_retriever: Callable[[], Retriever],
    questions: Path,
    parts: Path,
    config: InferConfig,
    total: int,
    stage: str,
) -> ContextCount:
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
