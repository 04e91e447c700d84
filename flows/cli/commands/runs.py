"""Commands that run the whole pipeline: pipeline and demo."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from flows.cli.prefect_server import with_services
from flows.cli.printing import print_pages, print_pipeline

DEMO_CONFIG = Path(__file__).resolve().parents[3] / "configs" / "demo.yaml"


def add_to(app: typer.Typer) -> None:
    """Register the commands."""
    for command in (pipeline, demo):
        app.command(rich_help_panel="Whole runs")(with_services(command, ray=True, trains=True))


def pipeline(
    config: Annotated[Path, typer.Option(help="YAML file of a run, such as configs/nq-bart-large.yaml.")],
    out: Annotated[Path, typer.Option(help="Folder; every stage writes below it.")] = Path("runs/pipeline"),
) -> None:
    """Run every stage from one file; stages whose inputs have not changed are skipped."""
    from flows.cli.settings import parse, read_yaml
    from flows.config import PipelineConfig
    from flows.pipeline import pipeline as pipeline_flow

    print_pipeline(pipeline_flow(parse(PipelineConfig, read_yaml(config), str(config)), out))
    print_pages()


def demo(
    config: Annotated[Path, typer.Option(help="YAML file of the demo.")] = DEMO_CONFIG,
    out: Annotated[Path, typer.Option(help="Folder; every stage writes below it.")] = Path("runs/demo"),
) -> None:
    """Run the built-in example: about 14,000 facts of the world, both variants trained and compared."""
    from flows.cli.settings import parse, read_yaml
    from flows.demo import DemoConfig
    from flows.demo import demo as demo_flow

    print_pipeline(demo_flow(parse(DemoConfig, read_yaml(config), str(config)), out))
    typer.echo(
        f'\nAsk it yourself:  rag ask "Which time zone is used in Lisbon?" --model {out}/rag-token --index {out}/index'
    )
    print_pages()
