"""A pipeline's parent run, and the table that ends it."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from rag_core.evaluation import Scores
from tasks.environment.ray_cluster import check_ray_settings
from tasks.results import StageResult
from tasks.stage import publish_page
from tasks.tracking import RunAddress, metric_name, open_run

# Share of a stage's contexts above which the user is told what to do about it.
MANY_CUT = 0.03


@contextlib.contextmanager
def pipeline_run(name: str, config: Mapping[str, Any]) -> Iterator[str]:
    """The parent MLflow run of a pipeline; yields its id, which the stages take as `parent_run_id`.

    Raises:
        ConfigError: MLflow's store cannot be used, or Ray's settings are wrong: better now than after the first stages.
    """
    check_ray_settings()
    with open_run(name) as run:
        run.log_params(config)
        run.log_dict(config, "config.json")
        yield run.run_id


def publish_summary(run_id: str, stages: Sequence[StageResult], scores: Mapping[str, Mapping[str, Scores]]) -> None:
    """Scores of every system and seconds of every stage: to the parent run, and as a table to Prefect."""
    address = RunAddress.of(run_id)
    for system, values in scores.items():
        address.log_metrics({f"{system}/{name}": value for name, value in values["overall"].items()})
    address.log_metrics({f"seconds/{result.stage}": result.seconds for result in stages})
    body = results_markdown(scores) + "\n\n" + stages_markdown(stages)
    address.log_text(body, "summary.md")
    publish_page(body, key="pipeline-summary", description="pipeline")


def results_markdown(scores: Mapping[str, Mapping[str, Scores]]) -> str:
    """Systems as rows, scores as columns."""
    names = list(dict.fromkeys(name for values in scores.values() for name in values["overall"]))
    head = "| system | " + " | ".join(metric_name(name) for name in names) + " |\n|" + " --- |" * (len(names) + 1)
    rows = [
        f"| {system} | " + " | ".join(f"{values['overall'].get(name, float('nan')):.3g}" for name in names) + " |"
        for system, values in scores.items()
    ]
    return "\n".join([head, *rows])


def stages_markdown(stages: Sequence[StageResult]) -> str:
    """Stages as rows: seconds, skipped or not, folder; below them, where too many contexts were cut."""
    rows = [
        f"| {one.stage} | {one.seconds:.1f} | {'up to date' if one.skipped else 'ran'} | `{one.path}` |"
        for one in stages
    ]
    notes = [f"\n{note}" for note in map(cut_note, stages) if note]
    return "\n".join(["| stage | seconds | | artefact |", "| --- | --- | --- | --- |", *rows, *notes])


def cut_note(result: StageResult) -> str:
    """What to do if more than a few of a stage's contexts were cut; else an empty string."""
    contexts, cut = (result.counts.get(name, 0) for name in ("contexts", "contexts_cut"))
    if cut <= MANY_CUT * contexts:
        return ""
    return (
        f"{result.stage}: {cut:,} of {contexts:,} contexts ({cut / contexts:.0%}) were too long and lost the end of "
        "their passage. Raise prompt.max_context_tokens and train again, or make shorter passages."
    )
