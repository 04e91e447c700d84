"""Stage 3: builds a FAISS index from vectors and passages."""

from __future__ import annotations

from pathlib import Path

from prefect import task

from rag_core.corpus.corpus import Corpus
from rag_core.embeddings.embeddings import Embeddings
from rag_core.index.passage_index import KIND, IndexConfig, index_inputs
from rag_core.index.passage_index import build_index as build
from rag_core.storage.artifact import Manifest
from tasks.reports.plots import recall_against_latency
from tasks.results import StageResult
from tasks.retries import STAGE_RETRIES
from tasks.stage import Input, run_stage
from tasks.tracking.runs import StageRun


@task(name="build-index", **STAGE_RETRIES)
def build_index(
    embeddings: Path, corpus: Path, out: Path, config: IndexConfig, parent_run_id: str | None = None
) -> StageResult:
    """Build the index, measure its recall@10 against exact search, and publish it with the passages."""
    vectors, passages = Embeddings.open(embeddings), Corpus.open(corpus)

    def work(run: StageRun) -> Manifest:
        manifest = build(vectors, passages, out, config)
        details = manifest.details
        run.log_params({"factory_built": details["factory"], "search_value": details["search_value"]})
        run.log_metrics({"index_recall@10": details["recall_at_10"]})
        for step, point in enumerate(details["recall_curve"]):
            run.log_metrics(
                {"curve_recall@10": point["recall_at_10"], "curve_milliseconds": point["milliseconds_per_query"]}, step
            )
        run.log_figure(recall_against_latency(details), "index_recall_against_latency.png")
        return manifest

    made_from = index_inputs(vectors, passages)
    return run_stage(
        "build-index",
        KIND,
        out,
        config=config.for_key(),
        inputs={"embeddings": Input(embeddings, made_from["embeddings"]), "corpus": Input(corpus, made_from["corpus"])},
        parent_run_id=parent_run_id,
        work=work,
    )
