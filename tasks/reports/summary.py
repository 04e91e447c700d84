"""A pipeline's parent run, and the table that ends it."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from rag_core.evaluation.scores import Evaluation
from tasks.environment.ray_cluster import check_ray_settings
from tasks.markdown import code_cell, table, text_cell
from tasks.reports.score_tables import systems_markdown
from tasks.results import StageResult
from tasks.stage import publish_page
from tasks.tracking.metric_names import score_metrics
from tasks.tracking.runs import RunAddress, open_run

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


def publish_summary(run_id: str, stages: Sequence[StageResult], scores: Mapping[str, Evaluation]) -> None:
    """Scores of every system and seconds of every stage: to the parent run, and as a table to Prefect."""
    address = RunAddress.of(run_id)
    for system, evaluation in scores.items():
        overall = score_metrics(evaluation.model_copy(update={"by_type": {}}))
        address.log_metrics({f"{system}/{name}": value for name, value in overall.items()})
    address.log_metrics({f"seconds/{result.stage}": result.seconds for result in stages})
    body = systems_markdown(scores) + "\n\n" + stages_markdown(stages)
    address.log_text(body, "summary.md")
    publish_page(body, key="pipeline-summary", description="pipeline")


def stages_markdown(stages: Sequence[StageResult]) -> str:
    """Stages as rows: seconds, skipped or not, folder; below them, where too many contexts were cut."""
    rows = [
        [text_cell(one.stage), f"{one.seconds:.1f}", "up to date" if one.skipped else "ran", code_cell(str(one.path))]
        for one in stages
    ]
    notes = [f"\n{text_cell(note)}" for note in map(cut_note, stages) if note]
    return "\n".join([table(["stage", "seconds", "", "artifact"], rows), *notes])


def cut_note(result: StageResult) -> str:
    """What to do if more than a few of a stage's contexts were cut; else an empty string."""
    contexts, cut = (result.counts.get(name, 0) for name in ("contexts", "contexts_cut"))
    if cut <= MANY_CUT * contexts:
        return ""
    return (
        f"{result.stage}: {cut:,} of {contexts:,} contexts ({cut / contexts:.0%}) were too long and lost the end of "
        "their passage. Raise prompt.max_context_tokens and train again, or make shorter passages."
    )
