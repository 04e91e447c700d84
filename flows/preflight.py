"""Everything that can be known to be wrong with a pipeline before its first stage, told at once.

The checks load what the stages will load: a wrong name of a generator is told now, not after the corpus was embedded.
Model names are pinned here, once: every stage, worker and manifest then means the same weights, though a hub's main
branch may move meanwhile.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from rag_core.corpus.corpus import Corpus
from rag_core.embeddings.embeddings import load_document_encoder
from rag_core.embeddings.text_encoder import TextEncoder
from rag_core.model.rag_model import load_question_encoder
from rag_core.model.reader import GeneratorReader, load_generator
from rag_core.pretrained.model_source import recorded_source
from rag_core.questions.questions import Question, read_question_file
from rag_core.reading.contexts import check_questions
from rag_core.reading.generator_limits import refuse_long_search
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

if TYPE_CHECKING:
    from flows.config import PipelineConfig


def checked(config: PipelineConfig, out: Path) -> PipelineConfig:
    """The configuration with every model's name pinned.

    Raises:
        RagError: what is wrong, all of it: sources, question files, models, settings that do not fit each other, places
            that cannot be written.
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
    """What only the corpus can tell, before it is embedded: whether it has passages enough, and those that questions name.

    Raises:
        RagError: K, shards or lists beyond the number of passages, or no gold passage in the corpus.
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

    # With a section `pretrain` the generator is made by the run.
    parts = ("question_encoder",) if config.pretrain else ("question_encoder", "generator")
    update = {"embed": pin(config.embed, "embed", "encoder"), "model": pin(config.model, "model", *parts)}
    if config.pretrain:
        update["pretrain"] = pin(config.pretrain, "pretrain", "encoder")
    return config.model_copy(update=update)


def _questions(config: PipelineConfig, problems: Problems) -> dict[str, list[Question]]:
    """Questions of each split whose file can be used."""
    files, found = config.questions, {}
    with problems.of("questions.train"):
        found["train"] = trainable(read_question_file(files.train))
        if config.pretrain:
            check_gold(found["train"], files.train)
    with problems.of("questions.dev"):
        dev = read_question_file(files.dev)
        found["dev"] = scored_of_dev(dev, config.train)
        if config.pretrain:
            check_gold(scorable(dev), files.dev, purpose=NO_CHOICE)
    with problems.of("questions.test"):
        found["test"] = scorable(read_question_file(files.test, files.test_answers_are))
    return found


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
    """The generator and all that it has to read and write."""
    model, loaded = config.model, None
    if config.pretrain:
        with problems.of("pretrain"):
            loaded = build_generator(config.pretrain)
            GeneratorReader(*loaded, config.pretrain.prompt)
        if config.pretrain.prompt != model.prompt:
            warn(
                "pretrain.prompt is not model.prompt: the generator learns to read contexts that it will not be given."
            )
    else:
        with problems.of("model.generator"):
            loaded = load_generator(model.generator, trust_remote_code=model.trust_remote_code)
    if loaded is None:
        return
    (generator, tokenizer), reader = loaded, None
    with problems.of("model.prompt"):
        reader = GeneratorReader(generator, tokenizer, model.prompt)
    with problems.of("infer.decoding"):
        refuse_long_search(generator, config.infer.decoding.max_new_tokens)
    for split in questions if reader else ():
        with problems.of(f"questions.{split}"):
            place = getattr(config.questions, split)
            check_questions(tokenizer, reader.prompt, questions[split], place, learnt=split == "train")


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
