"""Checks a pipeline's configuration before its first stage, and reports all problems at once.

The checks load what the stages will load, so a wrong generator name is an error now and not after the corpus was
embedded. They also pin each model name to a commit: all stages, workers and manifests then mean the same weights,
even if the hub's branch moves during the run.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from flows.config import PipelineConfig
from rag_core.corpus.corpus import Corpus
from rag_core.embeddings.embeddings import load_document_encoder
from rag_core.embeddings.text_encoder import TextEncoder
from rag_core.generators.kinds import as_generator
from rag_core.generators.limits import refuse_long_search
from rag_core.model.adapters.lora import check_lora
from rag_core.model.rag_model import load_question_encoder
from rag_core.model.reader import GeneratorReader, load_generator
from rag_core.pretrained.model_source import recorded_source
from rag_core.questions.questions import Question, read_question_file
from rag_core.reading.contexts import check_questions
from rag_core.training.pretraining import build_generator
from rag_core.verification.preflight import (
    NO_CHOICE,
    Problems,
    check_factory,
    check_gold,
    check_index_size,
    check_num_docs,
    check_place,
    check_reading_steps,
    check_same_width,
    check_sources,
)
from rag_core.verification.question_checks import scorable, trainable
from tasks.notices import warn
from tasks.preflight import check_optimizer, check_resources
from tasks.stages.train import check_rates, scored_of_dev


def checked(config: PipelineConfig, out: Path) -> PipelineConfig:
    """Check the configuration, and return it with every model name pinned.

    Raises:
        RagError: lists all problems with sources, question files, models, settings that do not fit each other, and
            folders that cannot be written.
    """
    problems = Problems()
    config = _pinned(config, problems)
    with problems.of("sources"):
        check_sources(config.sources, config.corpus)
    questions = _questions(config, problems)
    document_encoder = _encoders(config, problems)
    if document_encoder:
        with problems.of("index"):
            check_factory(config.index, document_encoder.dim)
    _generator(config, questions, problems)
    _training(config, problems)
    for place in _places(config, out):
        with problems.of("--out"):
            check_place(place)
    problems.raise_any("before the first stage, so nothing was started")
    return config


def check_corpus(config: PipelineConfig, corpus: Path) -> None:
    """Check, before the corpus is embedded, that it has enough passages and the gold passages of the questions.

    Raises: RagError: K, or the index's shards or lists, exceed the number of passages; or the corpus lacks all
        gold passages.
    """
    opened, problems = Corpus.open(corpus, check_content=False), Problems()
    passages = len(opened)
    with problems.of("model"):
        check_num_docs("model.num_docs", config.model.num_docs, passages)
    with problems.of("infer"):
        check_num_docs("infer.num_docs", config.infer.num_docs, passages)
    with problems.of("index"):
        width = 0 if config.index.factory == "auto" else load_document_encoder(config.embed).dim
        check_index_size(config.index, width, passages)
    if config.pretrain:
        train, dev = config.questions.train, config.questions.dev
        with problems.of("questions.train"):
            check_gold(trainable(read_question_file(train)), train, opened)
        with problems.of("questions.dev"):
            check_gold(scorable(read_question_file(dev)), dev, opened, purpose=NO_CHOICE)
    problems.raise_any("once the corpus was read; it is kept")


def _pinned(config: PipelineConfig, problems: Problems) -> PipelineConfig:
    def pin(part: Any, section: str, *names: str) -> Any:
        pinned = {}
        for name in names:
            with problems.of(f"{section}.{name}"):
                pinned[name] = recorded_source(getattr(part, name))
        return part.model_copy(update=pinned)

    # With a section `pretrain`, the run itself makes the generator.
    parts = ("question_encoder",) if config.pretrain else ("question_encoder", "generator")
    update = {"embed": pin(config.embed, "embed", "encoder"), "model": pin(config.model, "model", *parts)}
    if config.pretrain:
        update["pretrain"] = pin(config.pretrain, "pretrain", "encoder")
    return config.model_copy(update=update)


def _questions(config: PipelineConfig, problems: Problems) -> dict[str, list[Question]]:
    """The questions of each split whose file has no problem."""
    files = config.questions
    questions: dict[str, list[Question]] = {}
    with problems.of("questions.train"):
        questions["train"] = trainable(read_question_file(files.train))
        if config.pretrain:
            check_gold(questions["train"], files.train)
    with problems.of("questions.dev"):
        dev = read_question_file(files.dev)
        questions["dev"] = scored_of_dev(dev, config.train)
        if config.pretrain:
            check_gold(scorable(dev), files.dev, purpose=NO_CHOICE)
    with problems.of("questions.test"):
        questions["test"] = scorable(read_question_file(files.test, files.test_answers_are))
    return questions


def _encoders(config: PipelineConfig, problems: Problems) -> TextEncoder | None:
    document_encoder = question_encoder = None
    with problems.of("embed.encoder"):
        document_encoder = load_document_encoder(config.embed)
    with problems.of("model.question_encoder"):
        question_encoder = load_question_encoder(config.model)
    if document_encoder and question_encoder:
        with problems.of("model.question_encoder"):
            check_same_width(document_encoder, question_encoder)
    return document_encoder


def _generator(config: PipelineConfig, questions: dict[str, list[Question]], problems: Problems) -> None:
    """Check the generator, and whether prompt, longest answer and questions fit it."""
    model, loaded = config.model, None
    if config.pretrain:
        with problems.of("pretrain"):
            loaded = build_generator(config.pretrain)
            GeneratorReader(*loaded, config.pretrain.prompt)
        if config.pretrain.prompt != model.prompt:
            warn("pretrain.prompt is not model.prompt: the generator learns from prompts that it will not get later.")
    else:
        with problems.of("model.generator"):
            loaded = load_generator(
                model.generator, trust_remote_code=model.trust_remote_code, dtype=model.generator_dtype
            )
    if loaded is None:
        return
    (generator, tokenizer), reader = loaded, None
    with problems.of("train.lora"):
        check_lora(generator, config.train.lora, config.train.rates.generator, model.generator_dtype)
    with problems.of("model.prompt"):
        reader = GeneratorReader(generator, tokenizer, model.prompt)
    with problems.of("infer.decoding"):
        context = reader.prompt.max_context_tokens if reader else 1
        refuse_long_search(as_generator(generator), config.infer.decoding.max_new_tokens, context_tokens=context)
    for split in questions if reader else ():
        with problems.of(f"questions.{split}"):
            file = getattr(config.questions, split)
            check_questions(tokenizer, reader.prompt, questions[split], file, learnt=split == "train")


def _training(config: PipelineConfig, problems: Problems) -> None:
    with problems.of("train.rates"):
        check_rates(config.train.rates)
    with problems.of("train.optimizer"):
        check_optimizer("train", config.train.optimizer, config.train.num_workers)
    for part, retrieval in (("train", config.train.retrieval), ("infer", config.infer.retrieval)):
        with problems.of(f"{part}.retrieval"):
            check_resources(part, retrieval)
    if config.pretrain:
        with problems.of("pretrain.optimizer"):
            check_optimizer("pretrain", config.pretrain.optimizer, 0)
        with problems.of("pretrain.copy_steps"):
            check_reading_steps(config.pretrain)


def _places(config: PipelineConfig, out: Path) -> list[Path]:
    """Every folder that the run writes."""
    names = ["corpus", "embeddings", "index", *(["generator"] if config.pretrain else [])]
    systems = [f"rag-{variant}" for variant in config.variants]
    names += systems + [f"predictions/{name}" for name in systems]
    names += ["predictions/untrained", "predictions/closed-book"] if config.baselines else []
    return [out / name for name in names]
