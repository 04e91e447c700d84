"""A pipeline's parent MLflow run, and the summary table at its end."""

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

# If a larger share of a stage's contexts was cut, the summary tells the user what to do.
MANY_CUT = 0.03


@contextlib.contextmanager
def pipeline_run(name: str, config: Mapping[str, Any]) -> Iterator[str]:
    """The parent MLflow run of a pipeline; yields its id, which the stages take as `parent_run_id`.

    Raises:
        ConfigError: MLflow's store cannot be used, or Ray's settings are wrong. Better now than after the first stages.
    """
    check_ray_settings()
    with open_run(name) as run:
        run.log_params(config)
        run.log_dict(config, "config.json")
        yield run.run_id


def publish_summary(run_id: str, stages: Sequence[StageResult], scores: Mapping[str, Evaluation]) -> None:
    """Log every system's scores and every stage's seconds to the parent run, and publish both on the Prefect page."""
    address = RunAddress.of(run_id)
    for system, evaluation in scores.items():
        overall = score_metrics(evaluation.model_copy(update={"by_type": {}}))
        address.log_metrics({f"{system}/{name}": value for name, value in overall.items()})
    address.log_metrics({f"seconds/{result.stage}": result.seconds for result in stages})
    body = systems_markdown(scores) + "\n\n" + stages_markdown(stages)
    address.log_text(body, "summary.md")
    publish_page(body, key="pipeline-summary", description="pipeline")


def stages_markdown(stages: Sequence[StageResult]) -> str:
    """A table with one row per stage (seconds, skipped or not, folder), and below it the `cut_note` of each stage."""
    rows = [
        [
            text_cell(result.stage),
            f"{result.seconds:.1f}",
            "up to date" if result.skipped else "ran",
            code_cell(str(result.path)),
        ]
        for result in stages
    ]
    notes = [f"\n{text_cell(note)}" for note in map(cut_note, stages) if note]
    return "\n".join([table(["stage", "seconds", "", "artifact"], rows), *notes])


def cut_note(result: StageResult) -> str:
    """Advice for the user if more than MANY_CUT of a stage's contexts were cut, else ""."""
    contexts, cut = (result.counts.get(name, 0) for name in ("contexts", "contexts_cut"))
    if cut <= MANY_CUT * contexts:
        return ""
    return (
        f"{result.stage}: {cut:,} of {contexts:,} contexts ({cut / contexts:.0%}) were too long and lost the end of "
        "their passage. Raise prompt.max_context_tokens and train again, or make passages shorter."
    )
