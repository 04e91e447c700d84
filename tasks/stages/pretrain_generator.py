"""Stage 0: makes a seq2seq generator from an encoder's weights and teaches it to copy and to read, on Ray Train.

The generator trains only on passages that training questions name as gold. It never sees the other passages of
the corpus, such as those of dev and test entities.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from prefect import task

from rag_core.corpus.corpus import Corpus
from rag_core.corpus.passages import Passage
from rag_core.embeddings.text_encoder import TextEncoder
from rag_core.errors import InputError
from rag_core.evaluation.evaluation import answer_scores
from rag_core.evaluation.scores import means_of, sums_and_counts
from rag_core.model.rag_model import batches_of
from rag_core.model.reader import DecodingConfig, GeneratorReader
from rag_core.pretrained.model_source import pin_source, recorded_source
from rag_core.questions.questions import Question, files_of_questions, read_question_file, read_questions
from rag_core.reading.contexts import check_questions
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
from rag_core.training.loop import FRESH_WEIGHTS, run_training, sum_over_workers
from rag_core.training.own_draws import own_draws
from rag_core.training.pretraining import (
    PretrainConfig,
    build_generator,
    copy_then_read,
    copying_examples,
    read_pairs,
    reading_examples,
    reading_objective,
)
from rag_core.verification.preflight import NO_CHOICE, Problems, check_gold, check_reading_steps
from rag_core.verification.question_checks import scorable, trainable
from tasks.on_ray.training import deleted_when_done, this_device, this_place, train_on_ray, training_folder
from tasks.preflight import check_optimizer
from tasks.reports.plots import training_curves
from tasks.results import StageResult
from tasks.retries import STAGE_RETRIES
from tasks.stage import Input, run_stage
from tasks.tracking.reporter import Reporter, count_over_workers
from tasks.tracking.runs import StageRun

KIND = "generator"


@task(name="pretrain-generator", **STAGE_RETRIES)
def pretrain_generator(
    corpus: Path,
    questions: Path,
    dev: Path,
    out: Path,
    config: PretrainConfig,
    num_workers: int = 0,
    parent_run_id: str | None = None,
) -> StageResult:
    """Teach a new seq2seq model to copy passages and to read answers from gold passages."""
    opened = Corpus.open(corpus)
    recorded = recorded_source(config.encoder)
    config = config.model_copy(update={"encoder": pin_source(config.encoder)})
    _check(opened, questions, dev, config, num_workers)
    made_from = {
        "corpus": opened.manifest.fingerprint,
        "questions": fingerprint_of_files(files_of_questions(questions)),
        "dev": fingerprint_of_files(files_of_questions(dev)),
        "encoder": TextEncoder.from_pretrained(
            config.encoder, trust_remote_code=config.trust_remote_code
        ).fingerprint(),
    }
    settings = config.decisive()
    paths = {"corpus": corpus, "questions": questions, "dev": dev}

    def work(run: StageRun) -> Manifest:
        loop_settings = {"config": config, "address": run.address} | {
            name: absolute(path) for name, path in paths.items()
        }
        folder = training_folder(working_place(out), stage_key(KIND, settings, made_from))
        with deleted_when_done(folder), publish(out, KIND, config=settings, made_from=made_from) as draft:
            trained = train_on_ray(
                "pretrain-generator",
                pretraining_loop,
                loop_settings,
                steps=config.optimizer.steps,
                num_workers=num_workers,
                folder=folder,
            )
            for name, figure in training_curves(trained.history, trained.dev):
                run.log_figure(figure, name)
            run.log_metrics({f"best_{name}": value for name, value in trained.best_scores().items()})
            trained.copy_to(draft.folder)
            draft.counts |= trained.counts()
            draft.details |= {"encoder": recorded, "inputs": input_paths(**paths)}
        return open_artifact(out, KIND, check_content=False)

    return run_stage(
        "pretrain-generator",
        KIND,
        out,
        config=settings,
        inputs={name: Input(path, made_from[name]) for name, path in paths.items()},
        made_from=made_from,
        models={"encoder": recorded},
        parent_run_id=parent_run_id,
        work=work,
    )


def _check(corpus: Corpus, questions: Path, dev: Path, config: PretrainConfig, num_workers: int) -> None:
    """Check everything that pretraining needs before it starts.

    Raises:
        RagError: lists all problems at once.
    """
    problems, training_questions = Problems(), None
    with problems.of("questions"):
        training_questions = trainable(read_question_file(questions))
        check_gold(training_questions, questions, corpus)
    with problems.of("dev"):
        check_gold(scorable(read_question_file(dev)), dev, corpus, purpose=NO_CHOICE)
    with problems.of("pretrain"):
        check_reading_steps(config)
    with problems.of("pretrain"):
        check_optimizer("pretrain", config.optimizer, num_workers)
    with problems.of("pretrain"):
        reader = GeneratorReader(*build_generator(config), config.prompt)
        check_questions(reader.tokenizer, reader.prompt, training_questions or (), questions, learnt=True)
    problems.raise_any("before pretraining, so it was not started")


def pretraining_loop(settings: dict[str, Any]) -> dict[str, Any]:
    """Run pretraining in one worker; return its reporter's `result`."""
    config: PretrainConfig = settings["config"]
    place = this_place(settings["cpus"], settings["meter"])
    with own_draws([config.optimizer.seed, FRESH_WEIGHTS], torch.device("cpu")):
        generator, tokenizer = build_generator(config)
    generator.to(this_device())
    questions, dev = read_questions(Path(settings["questions"])), read_questions(Path(settings["dev"]))
    passages = gold_passages(Corpus.open(Path(settings["corpus"]), check_content=False), [*questions, *dev])
    reading = reading_examples(questions, passages)
    copying = copying_examples(list({example.passage.id: example.passage for example in reading}.values()))
    dev_pairs = scorable_pairs(Path(settings["dev"]), dev, passages)
    reader = GeneratorReader(generator, tokenizer, config.prompt)

    def evaluate(step: int) -> dict[str, float]:
        pairs = dev_pairs[place.rank :: place.world_size]  # this worker's part
        return reading_scores(reader, pairs, config) if step > config.copy_steps else {}

    def better(dev: dict[str, float]) -> float:
        # Weights from the copying phase have no dev_em; any weights from the reading phase replace them.
        return dev.get("dev_em", -1.0)

    reporter = Reporter.of(settings, place, reader.save_pretrained, better, reader.count)
    hooks = reporter.hooks(
        evaluate=evaluate,
        batch=lambda step, batch: copy_then_read(copying, step, batch, config),
    )
    objective = reading_objective(reader, config)
    steps_done = run_training(objective, reading, config.optimizer, place, hooks, reporter.checkpoints)
    return reporter.result(steps_done)


def gold_passages(corpus: Corpus, questions: Sequence[Question]) -> list[Passage]:
    """The passages of the corpus that at least one question names as gold."""
    gold_ids = {gold for question in questions for gold in question.gold_passage_ids}
    return [passage for passage in corpus.iter_passages() if passage.id in gold_ids]


def scorable_pairs(path: Path, dev: Sequence[Question], passages: Sequence[Passage]) -> list[tuple[Question, Passage]]:
    """Dev questions that have an answer to compare with, each with its gold passage.

    Raises:
        InputError: there are none, so no weights can be chosen.
    """
    answerable = [question for question in dev if question.answers and not question.is_impossible]
    pairs = read_pairs(answerable, passages)
    if not pairs:
        raise InputError(
            f"{path}: none of the {len(dev)} dev questions has an answer and names a gold passage of the corpus "
            "(field gold_passage_ids), so no weights can be chosen. Give questions made from this corpus."
        )
    return pairs


def reading_scores(
    reader: GeneratorReader, pairs: Sequence[tuple[Question, Passage]], config: PretrainConfig
) -> dict[str, float]:
    """EM and F1 of greedy answers over gold passages, and the share of contexts cut, over all workers."""
    decoding = DecodingConfig(
        num_beams=1, max_new_tokens=config.prompt.max_answer_tokens, precision=config.optimizer.precision
    )
    scored = []
    with reader.counting() as contexts:
        for batch in batches_of(pairs, 64):
            answers = reader.answer_from(
                [question.question for question, _ in batch],
                [[passage] for _, passage in batch],
                torch.zeros(len(batch), 1, device=reader.device),
                variant="token",
                decoding=decoding,
            )
            scored += [
                answer_scores(answer.text, question, config.match)
                for answer, (question, _) in zip(answers, batch, strict=True)
            ]
    scores = means_of(sum_over_workers(sums_and_counts(scored, ("em", "f1"))))
    scores["contexts_cut_share"] = count_over_workers(contexts).cut_share
    return {f"dev_{name}": value for name, value in scores.items()}
