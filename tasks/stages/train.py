"""Stage 4: end-to-end training of RAG-Sequence and RAG-Token on Ray Train, with retrieval inside every step."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from prefect import task
from pydantic import BaseModel, ConfigDict, Field

from rag_core.embeddings.text_encoder import autocast
from rag_core.errors import ConfigError
from rag_core.evaluation.evaluation import answer_scores, has_text_answers, retrieval_scores
from rag_core.evaluation.metrics import Match
from rag_core.evaluation.scores import Scores, means_of, sums_and_counts
from rag_core.index.passage_index import PassageIndex
from rag_core.index.retriever import Retriever
from rag_core.model.adapters.lora import LoraSettings, add_adapters, check_lora
from rag_core.model.rag_model import RagModel, batches_of
from rag_core.model.reader import DecodingConfig
from rag_core.model.settings import KIND, ModelConfig
from rag_core.questions.questions import Question, QuestionFile, files_of_questions, read_question_file
from rag_core.reading.contexts import check_questions
from rag_core.reading.likelihood import Variant
from rag_core.storage.artifact import (
    Manifest,
    fingerprint_of_files,
    open_artifact,
    publish,
    stage_key,
    working_place,
)
from rag_core.storage.inputs import input_paths
from rag_core.storage.places import absolute
from rag_core.training.loop import FRESH_WEIGHTS, NOT_IN_KEY, OptimizerConfig, run_training, sum_over_workers
from rag_core.training.objectives import EndToEnd, EndToEndRates
from rag_core.training.own_draws import own_draws
from rag_core.verification.preflight import Problems
from rag_core.verification.question_checks import scorable, trainable
from tasks.notices import warn
from tasks.on_ray.retriever_shards import RetrievalConfig, retrieval
from tasks.on_ray.training import deleted_when_done, this_device, this_place, train_on_ray, training_folder
from tasks.preflight import check_optimizer, check_resources
from tasks.reports.plots import training_curves
from tasks.results import StageResult
from tasks.retries import STAGE_RETRIES
from tasks.stage import Input, run_stage
from tasks.tracking.registry import model_entry
from tasks.tracking.reporter import Reporter, count_over_workers
from tasks.tracking.runs import StageRun


class TrainConfig(BaseModel):
    """End-to-end training of one variant."""

    model_config = ConfigDict(extra="forbid")

    rates: EndToEndRates = Field(default_factory=EndToEndRates)
    optimizer: OptimizerConfig = Field(default_factory=OptimizerConfig)
    lora: LoraSettings | None = Field(None, description="train adapters of the generator, and not its weights")
    gradient_checkpointing: bool = Field(
        False, description="compute the generator's layers again for the gradient: less memory, a third more time"
    )
    eval_questions: int = Field(200, ge=1, description="dev questions used in each evaluation during training")
    best_by: Literal["em", "f1", "nll"] = Field("em", description="dev score that decides which weights are kept")
    match: Match = Field("words", description="how dev answers are compared: words (published rule) or characters")
    num_workers: int = Field(
        0, ge=0, description="data-parallel workers; 0: one for each GPU, else one for each machine"
    )
    retrieval: RetrievalConfig = Field(default_factory=RetrievalConfig)

    def decisive(self) -> dict[str, Any]:
        """The settings that decide what is trained; `match` is among them only if it is not the published rule.

        `lora` is among them only if it is set: artifacts made before it existed have keys without it. Gradient
        checkpointing changes no result, so that a run which needs less memory can go on from its checkpoint.
        """
        not_in_key: dict[str, Any] = {"num_workers": True, "retrieval": True, "optimizer": NOT_IN_KEY}
        not_in_key["gradient_checkpointing"] = True
        usual = {"match": self.match == "words", "lora": self.lora is None}
        return self.model_dump(mode="json", exclude=not_in_key | {name: True for name in usual if usual[name]})


@task(name="train", **STAGE_RETRIES)
def train(
    variant: Variant,
    index: Path,
    questions: Path,
    dev: Path,
    out: Path,
    model: ModelConfig,
    config: TrainConfig,
    parent_run_id: str | None = None,
) -> StageResult:
    """Train question encoder and generator on the answers' marginal likelihood; publish and register the best."""
    start = _checked_start(index, questions, dev, model, config)
    recorded, model = start.recorded, start.settings
    inputs = {
        "index": Input(index, start.index.manifest.fingerprint),
        "questions": Input(questions, fingerprint_of_files(files_of_questions(questions))),
        "dev": Input(dev, fingerprint_of_files(files_of_questions(dev))),
    }
    made_from = {name: entry.fingerprint for name, entry in inputs.items()} | {"start": start.model.fingerprint()}
    decisive = model.decisive(start.model.settings.prompt.rendered)
    settings = {"variant": variant, "model": decisive, "train": config.decisive()}
    stage = f"train-{variant}"

    def work(run: StageRun) -> Manifest:
        run.set_tags({"variant": variant})
        start.log(run, stage)
        loop_settings: dict[str, Any] = {"variant": variant, "model": model, "config": config, "address": run.address}
        loop_settings |= {"questions": absolute(questions), "dev": absolute(dev)}
        folder = training_folder(working_place(out), stage_key(KIND, settings, made_from))
        with deleted_when_done(folder), publish(out, KIND, config=settings, made_from=made_from) as draft:
            with retrieval(absolute(index), start.index.manifest, config.retrieval) as loop_settings["open_retriever"]:
                trained = train_on_ray(
                    stage,
                    training_loop,
                    loop_settings,
                    steps=config.optimizer.steps,
                    num_workers=config.num_workers,
                    folder=folder,
                )
            for name, figure in training_curves(trained.history, trained.dev):
                run.log_figure(figure, name)
            run.log_metrics({f"best_{name}": value for name, value in trained.best_scores().items()})
            trained.copy_to(draft.folder)
            draft.counts |= trained.counts()
            draft.details |= {**recorded, "inputs": input_paths(index=index, questions=questions, dev=dev)}
        return open_artifact(out, KIND, check_content=False)

    return run_stage(
        stage,
        KIND,
        out,
        config=settings,
        inputs=inputs,
        made_from=made_from,
        models=recorded,
        parent_run_id=parent_run_id,
        work=work,
        announce=lambda run, skipped: run.write(model_entry(out, index, variant, unless_known=skipped)),
    )


@dataclass(frozen=True)
class _Start:
    """The checked inputs of a training run: index, untrained model and questions.

    `recorded` holds the names of the model's parts for the manifest; `settings` has every hub model pinned to a
    commit. `train` are the questions that are learnt, `dev` those that are scored.
    """

    index: PassageIndex
    recorded: dict[str, str]
    settings: ModelConfig
    model: RagModel
    train_file: QuestionFile
    dev_file: QuestionFile
    train: list[Question]
    dev: list[Question]

    def log(self, run: StageRun, stage: str) -> None:
        """Log how many questions are learnt, how many are scored, and how many are left out as unanswerable."""
        run.log_params({"questions_layout": self.train_file.layout})
        run.log_metrics({"train_questions": len(self.train), "dev_questions": len(self.dev)})
        texts = sum(map(has_text_answers, self.dev))
        if texts < len(self.dev):  # answers that are regular expressions have neither likelihood nor F1
            run.log_metrics({"dev_nll_count": texts, "dev_f1_count": texts})
        left_out = sum(question.is_impossible for question in self.train_file.questions)
        # Count unanswerable dev questions only up to the last question that is scored.
        all_dev = self.dev_file.questions
        only_some_scored = len(self.dev) < sum(bool(question.answers) for question in all_dev)
        considered = all_dev[: all_dev.index(self.dev[-1]) + 1] if only_some_scored else all_dev
        left_out_of_dev = sum(question.is_impossible for question in considered)
        run.log_metrics({"train_unanswerable": left_out, "dev_unanswerable": left_out_of_dev})
        if left_out:
            warn(
                f"{stage}: {left_out:,} of the {len(self.train_file.questions):,} training questions are unanswerable "
                "and are left out: there is no answer to learn."
            )


def _checked_start(index: Path, questions: Path, dev: Path, model: ModelConfig, config: TrainConfig) -> _Start:
    """Open the index, the untrained model and the question files, and check everything that training needs.

    Raises:
        RagError: lists all problems at once.
    """
    problems, opened, start, train_file, dev_file = Problems(), None, None, None, None
    recorded = dict[str, str]()
    train_questions, dev_questions = list[Question](), list[Question]()
    with problems.of("index"):
        opened = PassageIndex.open(index)
        opened.check_num_docs(model.num_docs)
    with problems.of("model"):
        recorded, model = model.recorded(), model.pinned()
        start = RagModel.from_parts(model)
    with problems.of("questions"):
        train_file = read_question_file(questions)
        train_questions = trainable(train_file)
    with problems.of("dev"):
        dev_file = read_question_file(dev)
        dev_questions = scored_of_dev(dev_file, config)
    with problems.of("train.rates"):
        check_rates(config.rates)
    if start:
        with problems.of("train.lora"):
            check_lora(start.generator, config.lora, config.rates.generator, model.generator_dtype)
    with problems.of("train.optimizer"):
        check_optimizer("train", config.optimizer, config.num_workers)
    with problems.of("train.retrieval"):
        check_resources("train", config.retrieval)
    if opened and start:
        with problems.of("index"):
            start.check_index(opened)
    if start and train_questions:
        with problems.of("questions"):
            check_questions(start.generator_tokenizer, start.settings.prompt, train_questions, questions, learnt=True)
    problems.raise_any("before training, so it was not started")
    assert opened is not None
    assert start is not None
    assert train_file is not None
    assert dev_file is not None
    return _Start(opened, recorded, model, start, train_file, dev_file, train_questions, dev_questions)


def scored_of_dev(file: QuestionFile, config: TrainConfig) -> list[Question]:
    """The dev questions that each evaluation scores; InputError if the best weights cannot be chosen by them."""
    return scorable(file, config.eval_questions, as_texts=config.best_by != "em")


def check_rates(rates: EndToEndRates) -> None:
    """Raise ConfigError if both learning rates are 0."""
    if rates.question_encoder == rates.generator == 0:
        raise ConfigError("There is nothing to train: every learning rate is 0. Set at least one above 0.")


def training_loop(settings: dict[str, Any]) -> dict[str, Any]:
    """Run training in one worker; return its reporter's `result`."""
    config: TrainConfig = settings["config"]
    variant: Variant = settings["variant"]
    place = this_place(settings["cpus"], settings["meter"])
    index: Retriever = settings["open_retriever"]()
    questions = trainable(read_question_file(Path(settings["questions"])))
    dev = scored_of_dev(read_question_file(Path(settings["dev"])), config)
    model = RagModel.from_parts(settings["model"])
    if config.lora:
        with own_draws([config.optimizer.seed, FRESH_WEIGHTS], torch.device("cpu")):
            add_adapters(model.generator, config.lora, settings["model"].generator)
    model.to(this_device())
    model.settings.variant = variant
    model.settings.document_encoder_fingerprint = index.encoder_fingerprint
    own_dev = dev[place.rank :: place.world_size]  # this worker's part
    objective = EndToEnd(model, index, variant, config.rates, gradient_checkpointing=config.gradient_checkpointing)

    def better(scores: dict[str, float]) -> float:
        # Equal EM is common on a small dev set; then the likelihood decides.
        log_likelihood = -scores.get("dev_nll", 0.0)
        return log_likelihood if config.best_by == "nll" else scores[f"dev_{config.best_by}"] + 1e-6 * log_likelihood

    reporter = Reporter.of(settings, place, model.write_files, better, model.reader.count)
    hooks = reporter.hooks(evaluate=lambda step: dev_scores(model, objective, index, own_dev, variant, config))
    steps_done = run_training(objective, questions, config.optimizer, place, hooks, reporter.checkpoints)
    return reporter.result(steps_done)


def dev_scores(
    model: RagModel,
    objective: EndToEnd,
    index: Retriever,
    questions: Sequence[Question],
    variant: Variant,
    config: TrainConfig,
) -> dict[str, float]:
    """Dev scores over all workers: nll, EM and F1 of greedy answers, recall@1, recall@K, and the share of contexts cut.

    `questions` are this worker's part and may be empty. Each mean is over those questions of all workers that
    have the score; a score that no question has is left out.
    """
    precision = config.optimizer.precision
    tokens = model.settings.prompt.max_answer_tokens
    decoding = DecodingConfig(
        num_beams=1, num_return_sequences=1, max_new_tokens=tokens, batch_size=32, precision=precision
    )
    with model.reader.counting() as contexts:
        answers = model.answer([question.question for question in questions], index, variant=variant, decoding=decoding)
    ks = sorted({1, model.settings.num_docs})
    scored: list[Scores] = [
        {
            **answer_scores(answer.text, question, config.match),
            **retrieval_scores([read.passage for read in answer.passages], question, ks, config.match),
        }
        for answer, question in zip(answers, questions, strict=True)
    ]
    learnable = [question for question in questions if has_text_answers(question)]
    # These contexts are read a second time, so they count neither here nor among those of training.
    with model.reader.counting(), torch.inference_mode(), autocast(model.device, precision):
        for batch in batches_of(learnable, 8):
            scored += [{"nll": nll} for nll in objective(batch).tolist()]
    names = ["em", "f1", *(f"recall@{k}" for k in ks), "nll"]
    scores = means_of(sum_over_workers(sums_and_counts(scored, names)))
    scores["contexts_cut_share"] = count_over_workers(contexts).cut_share
    return {f"dev_{name}": value for name, value in scores.items()}
