"""Stage 4: end-to-end training of RAG-Sequence and RAG-Token on Ray Train, with retrieval inside every step."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from prefect import task
from pydantic import BaseModel, ConfigDict, Field

from rag_core.artefacts.artefact import (
    Manifest,
    fingerprint_of_files,
    local_file,
    open_artefact,
    publish,
    stage_key,
    working_place,
)
from rag_core.artefacts.artefact_inputs import input_paths
from rag_core.artefacts.places import absolute
from rag_core.contexts import check_questions
from rag_core.errors import InputError
from rag_core.evaluation import answer_scores, mean_scores, retrieval_scores
from rag_core.index import PassageIndex
from rag_core.likelihood import Variant
from rag_core.objectives import EndToEnd, EndToEndRates
from rag_core.questions import Question, read_questions
from rag_core.rag_model import KIND, ModelConfig, RagModel, batches_of
from rag_core.reader import DecodingConfig
from rag_core.retriever import Retriever
from rag_core.text_encoder import autocast
from rag_core.training import NOT_IN_KEY, OptimizerConfig, run_training, sum_over_workers
from tasks.mlflow_model import register_model
from tasks.plots import training_curves
from tasks.ray_training import deleted_when_done, this_device, this_place, train_on_ray, training_folder
from tasks.reporter import Reporter, count_over_workers
from tasks.results import StageResult
from tasks.retries import STAGE_RETRIES
from tasks.retriever_shards import RetrievalConfig, retrieval
from tasks.stage import Input, run_stage
from tasks.tracking import StageRun


class TrainConfig(BaseModel):
    """End-to-end training of one variant."""

    model_config = ConfigDict(extra="forbid")

    rates: EndToEndRates = Field(default_factory=EndToEndRates)
    optimizer: OptimizerConfig = Field(default_factory=OptimizerConfig)
    eval_questions: int = Field(200, ge=1, description="dev questions used in each evaluation during training")
    best_by: Literal["em", "f1", "nll"] = Field("em", description="dev score that decides which weights are kept")
    num_workers: int = Field(
        0, ge=0, description="data-parallel workers; 0: one for each GPU, else one for each machine"
    )
    retrieval: RetrievalConfig = Field(default_factory=RetrievalConfig)


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
    """Train question encoder and generator from the answers' marginal likelihood; publish and register the best."""
    opened = PassageIndex.open(index)
    recorded, model = model.recorded(), model.pinned()
    start = RagModel.from_parts(model)
    start.check_index(opened)
    opened.check_num_docs(model.num_docs)
    asked = trainable_questions(Path(questions))
    check_questions(start.generator_tokenizer, model.prompt, asked, questions, learnt=True)
    inputs = {
        "index": Input(index, opened.manifest.fingerprint),
        "questions": Input(questions, fingerprint_of_files([local_file(questions)])),
        "dev": Input(dev, fingerprint_of_files([local_file(dev)])),
    }
    made_from = {name: one.fingerprint for name, one in inputs.items()} | {"start": start.fingerprint()}
    settings = {
        "variant": variant,
        "model": model.decisive(),
        "train": config.model_dump(
            mode="json", exclude={"num_workers": True, "retrieval": True, "optimizer": NOT_IN_KEY}
        ),
    }
    stage = f"train-{variant}"

    def work(run: StageRun) -> Manifest:
        run.set_tags({"variant": variant})
        loop_settings: dict[str, Any] = {
            "variant": variant,
            "model": model,
            "config": config,
            "address": run.address,
            "questions": absolute(questions),
            "dev": absolute(dev),
        }
        folder = training_folder(working_place(out), stage_key(KIND, settings, made_from))
        with deleted_when_done(folder), publish(out, KIND, config=settings, made_from=made_from) as draft:
            with retrieval(absolute(index), opened.manifest, config.retrieval) as loop_settings["open_retriever"]:
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
        return open_artefact(out, KIND, check_content=False)

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
        announce=lambda run, skipped: register_model(run, out, index, variant, unless_known=skipped),
    )


def training_loop(settings: dict[str, Any]) -> dict[str, Any]:
    """What a worker does."""
    config: TrainConfig = settings["config"]
    variant: Variant = settings["variant"]
    place = this_place(settings["cpus"], settings["meter"])
    index: Retriever = settings["open_retriever"]()
    questions, dev = trainable_questions(Path(settings["questions"])), read_questions(Path(settings["dev"]))
    model = RagModel.from_parts(settings["model"]).to(this_device())
    model.settings.variant = variant
    model.settings.document_encoder_fingerprint = index.encoder_fingerprint
    mine = dev[: config.eval_questions][place.rank :: place.world_size]
    objective = EndToEnd(model, index, variant, config.rates)

    def better(scores: dict[str, float]) -> float:
        # Equal EM is common on a small dev set; the likelihood decides then.
        tie = -scores["dev_nll"]
        return tie if config.best_by == "nll" else scores[f"dev_{config.best_by}"] + 1e-6 * tie

    reporter = Reporter.of(settings, place, model.write_files, better, model.reader.count)
    hooks = reporter.hooks(evaluate=lambda step: dev_scores(model, objective, index, mine, variant, config))
    done = run_training(objective, questions, config.optimizer, place, hooks, reporter.checkpoints)
    return reporter.result(done)


def trainable_questions(path: Path) -> list[Question]:
    """The questions of a file; InputError names the first one without an answer."""
    questions = read_questions(path)
    for question in questions:
        if not question.answers:
            raise InputError(
                f"{path}: question {question.id!r} has no answer, so it cannot be trained on. Add `answers`, or leave "
                "the question out."
            )
    return questions


def dev_scores(
    model: RagModel,
    objective: EndToEnd,
    index: Retriever,
    questions: Sequence[Question],
    variant: Variant,
    config: TrainConfig,
) -> dict[str, float]:
    """nll, EM, F1 (greedy answers), recall@1 and @K and the share of contexts cut on dev questions, over all workers."""
    import torch

    precision = config.optimizer.precision
    tokens = model.settings.prompt.max_answer_tokens
    decoding = DecodingConfig(
        num_beams=1, num_return_sequences=1, max_new_tokens=tokens, batch_size=32, precision=precision
    )
    with model.reader.counting() as contexts:
        answers = model.answer([question.question for question in questions], index, variant=variant, decoding=decoding)
    ks = sorted({1, model.settings.num_docs})
    scored = [
        {
            **answer_scores(answer.text, question),
            **retrieval_scores([read.passage for read in answer.passages], question, ks),
        }
        for answer, question in zip(answers, questions, strict=True)
    ]
    # Read once more: not to be counted among the contexts of training either.
    with model.reader.counting(), torch.inference_mode(), autocast(model.device, precision):
        nll = sum(float(objective(batch).sum()) for batch in batches_of([one for one in questions if one.answers], 8))
    names = ["em", "f1", *(f"recall@{k}" for k in ks)]
    means = mean_scores(scored)
    sums = {name: means.get(name, 0.0) * len(scored) for name in names} | {"nll": nll, "count": float(len(scored))}
    sums = sum_over_workers(sums)
    count = max(sums.pop("count"), 1.0)
    scores = {name: value / count for name, value in sums.items()}
    scores["contexts_cut_share"] = count_over_workers(contexts).cut_share
    return {f"dev_{name}": value for name, value in scores.items()}
