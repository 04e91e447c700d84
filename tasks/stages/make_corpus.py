"""Stage 1: reads source files and publishes them as a corpus."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from prefect import task
from prefect.logging import get_run_logger

from rag_core.corpus.corpus import (
    KIND,
    CorpusConfig,
    refuse_many_rejects,
    source_files,
    source_fingerprint,
    write_corpus,
)
from rag_core.storage.artifact import Manifest, local_file
from tasks import notices
from tasks.results import StageResult
from tasks.retries import STAGE_RETRIES
from tasks.stage import Input, run_stage
from tasks.tracking.runs import StageRun


def read_as(manifest: Manifest) -> str:
    """One line: the layouts recognised in the sources, and the rows skipped because they hold no passage."""
    layouts: Mapping[str, int] = manifest.details["layouts"]
    skipped: Mapping[str, int] = manifest.details.get("skipped_by_reason", {})
    read = "; ".join(layout if files == 1 else f"{files:,} files of {layout}" for layout, files in layouts.items())
    skips = ", ".join(f"{count:,} × {reason}" for reason, count in skipped.items())
    return f"corpus: read as {read}{f' (no passages: {skips})' if skips else ''}"


@task(name="make-corpus", **STAGE_RETRIES)
def make_corpus(
    sources: Sequence[Path], out: Path, config: CorpusConfig, parent_run_id: str | None = None
) -> StageResult:
    """Read passages, reject rows that hold none, and publish canonical Parquet shards."""
    named, sources = sources, [local_file(source) for source in sources]
    fingerprint = source_fingerprint(sources, config.format)
    files = source_files(sources, config.format)

    def work(run: StageRun) -> Manifest:
        run.log_dict({"files": [str(file) for file in files]}, "sources.json")
        manifest = write_corpus(sources, out, config)
        notices.tell(read_as(manifest))
        rejects = manifest.details.get("rejects_by_reason", {})
        if rejects:
            get_run_logger().warning("%d rows were left out (%s); see %s", manifest.counts["rejects"], rejects, out)
        run.log_metrics({f"rejects_{reason.replace(' ', '_')}": count for reason, count in rejects.items()})
        return manifest

    result = run_stage(
        "corpus",
        KIND,
        out,
        config=config.decisive(),
        inputs={"sources": Input(named[0], fingerprint)},
        parent_run_id=parent_run_id,
        work=work,
    )
    refuse_many_rejects(result.counts, result.path, config.max_rejects_share)
    return result
