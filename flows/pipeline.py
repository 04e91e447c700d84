"""The pipeline: corpus → embeddings → index → (generator) → training → answers → scores, under one MLflow run.

A stage is skipped if its inputs have not changed; each artifact records the settings and inputs that it was made from.
"""

from __future__ import annotations

from pathlib import Path

from prefect import flow
from pydantic import BaseModel

from flows.config import PipelineConfig
from flows.preflight import check_corpus, checked
from flows.stages.batch_infer import batch_infer
from flows.stages.build_index import build_index
from flows.stages.embed_corpus import embed_corpus
from flows.stages.evaluate import evaluate
from flows.stages.make_corpus import make_corpus
from flows.stages.pretrain_generator import pretrain_generator
from flows.stages.train import train_sequence, train_token
from rag_core.evaluation.scores import Evaluation
from rag_core.model.settings import ModelConfig
from rag_core.storage.places import ArtifactPath
from tasks.on_ray.answering import InferConfig
from tasks.reports.summary import pipeline_run, publish_summary
from tasks.results import StageResult

TRAIN_FLOWS = {"sequence": train_sequence, "token": train_token}
NAMES = {"sequence": "RAG-Sequence", "token": "RAG-Token"}


class PipelineResult(BaseModel):
    """The stages in the order in which they ran, and the scores of every system on the test questions."""

    run_id: str
    stages: list[StageResult]
    scores: dict[str, Evaluation]


@flow(name="pipeline")
def pipeline(config: PipelineConfig, out: ArtifactPath = Path("runs/pipeline")) -> PipelineResult:
    """Run every stage into folders below `out` and compare the trained variants on the test questions."""
    config = checked(config, out)
    files = config.questions
    stages: list[StageResult] = []
    scores: dict[str, Evaluation] = {}

    def done(result: StageResult) -> Path:
        stages.append(result)
        return result.path

    with pipeline_run(config.name, config.model_dump(mode="json")) as parent:

        def score(system: str, model: Path | ModelConfig, infer: InferConfig) -> None:
            folder = system.lower()
            answers = done(
                batch_infer(model, index, files.test, out / "predictions" / folder, infer, parent, f"infer {system}")
            )
            result, scores[system] = evaluate(
                answers, files.test, config.ks, parent, f"evaluate {system}", config.match, files.test_answers_are
            )
            stages.append(result)

        corpus = done(make_corpus(config.sources, out / "corpus", config.corpus, parent))
        check_corpus(config, corpus)
        embeddings = done(embed_corpus(corpus, out / "embeddings", config.embed, parent))
        index = done(build_index(embeddings, corpus, out / "index", config.index, parent))
        model = config.model
        match_update = {} if config.match == "words" else {"match": config.match}
        if config.pretrain:
            pretrain = config.pretrain.model_copy(update=match_update)
            generator = done(pretrain_generator(corpus, files.train, files.dev, out / "generator", pretrain, 0, parent))
            model = model.model_copy(update={"generator": str(generator)})
        if config.baselines:
            score("untrained", model, config.infer.model_copy(update={"variant": config.variants[-1]}))
        training = config.train.model_copy(update=match_update)
        for variant in config.variants:
            folder = out / f"rag-{variant}"
            trained = done(TRAIN_FLOWS[variant](index, files.train, files.dev, folder, model, training, parent))
            score(NAMES[variant], trained, config.infer)
        if config.baselines:
            score("closed-book", trained, config.infer.model_copy(update={"closed_book": True}))
        publish_summary(parent, stages, scores)
    return PipelineResult(run_id=parent, stages=stages, scores=scores)
