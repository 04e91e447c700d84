"""Settings of a pipeline run: one section for each stage, defined by the module that reads it."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict, Field, PositiveInt

from rag_core.corpus.corpus import CorpusConfig
from rag_core.embeddings.embeddings import EmbedConfig
from rag_core.evaluation.metrics import Match
from rag_core.index.passage_index import IndexConfig
from rag_core.model.settings import ModelConfig
from rag_core.questions.questions import AnswersAre
from rag_core.reading.likelihood import Variant
from rag_core.storage.places import ArtifactPath
from rag_core.training.pretraining import PretrainConfig
from tasks.on_ray.answering import InferConfig
from tasks.stages.train import TrainConfig


class QuestionFiles(BaseModel):
    """Question files of the three splits, in any format that `rag infer` reads."""

    model_config = ConfigDict(extra="forbid")

    train: ArtifactPath
    dev: ArtifactPath
    test: ArtifactPath
    test_answers_are: AnswersAre | None = Field(
        None, description="regex: test answers whose kind the file does not state are regular expressions"
    )


class PipelineConfig(BaseModel):
    """Settings of a pipeline run."""

    model_config = ConfigDict(extra="forbid")

    name: str = Field("pipeline", description="name of the parent MLflow run")
    sources: list[ArtifactPath] = Field(min_length=1, description="files or folders that the corpus is read from")
    corpus: CorpusConfig = CorpusConfig()
    questions: QuestionFiles
    embed: EmbedConfig
    index: IndexConfig = Field(default_factory=IndexConfig)
    pretrain: PretrainConfig | None = Field(None, description="make a generator first; it replaces model.generator")
    model: ModelConfig
    variants: list[Variant] = Field(default=["sequence", "token"], min_length=1)
    train: TrainConfig = Field(default_factory=TrainConfig)
    infer: InferConfig = Field(default_factory=InferConfig)
    baselines: bool = Field(False, description="also answer with the untrained start, and closed-book")
    ks: list[PositiveInt] = Field(default_factory=lambda: [1, 5], min_length=1, description="k of recall@k")
    match: Match = Field(
        "words",
        description="how answers are compared, also those of dev questions: words (published rule) or characters",
    )
