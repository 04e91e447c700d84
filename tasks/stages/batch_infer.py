"""Stage 5: answers a question file on Ray and publishes the predictions.

`tasks/on_ray/answering.py` answers the questions in shards, on workers. This stage then joins the shards'
predictions in the order of the question file.
"""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from prefect import task

from rag_core.evaluation.predictions import KIND, join_parts
from rag_core.index.passage_index import PassageIndex
from rag_core.model.rag_model import RagModel
from rag_core.model.settings import ModelConfig
from rag_core.questions.questions import Question, files_of_questions, read_question_file
from rag_core.reading.contexts import check_questions
from rag_core.storage.artifact import (
    Manifest,
    fingerprint_of_files,
    open_artifact,
    publish,
)
from rag_core.storage.inputs import input_paths
from rag_core.storage.places import absolute
from tasks.on_ray.answering import InferConfig, answer_on_ray, load_model, part_name
from tasks.on_ray.retriever_shards import retrieval
from tasks.results import StageResult
from tasks.retries import STAGE_RETRIES
from tasks.stage import Input, refuse_unseen_parts, run_stage
from tasks.tracking.runs import StageRun


@task(name="batch-infer", **STAGE_RETRIES)
def batch_infer(
    model: Path | ModelConfig,
    index: Path,
    questions: Path,
    out: Path,
    config: InferConfig,
    parent_run_id: str | None = None,
    stage: str = "batch-infer",
) -> StageResult:
    """Answer every question of a file. `model` is a trained model's folder, or the parts of an untrained model."""
    opened_index, file = PassageIndex.open(index), read_question_file(questions)
    recorded = " + ".join(model.recorded().values()) if isinstance(model, ModelConfig) else str(model)
    model = model.pinned() if isinstance(model, ModelConfig) else model
    loaded = _checked_model(model, config, opened_index, questions, file.questions)
    settings_hash = hashlib.sha256(loaded.settings.model_dump_json().encode()).hexdigest()
    made_from = {
        "model": loaded.fingerprint(),
        "model_settings": settings_hash,
        "index": opened_index.manifest.fingerprint,
        "questions": fingerprint_of_files(files_of_questions(questions)),
    }
    not_in_key = {"num_workers", "shard_questions", "retrieval", "trust_remote_code"}
    settings = config.model_dump(mode="json", exclude=not_in_key)
    total, size = len(file.questions), config.shard_questions

    def work(run: StageRun) -> Manifest:
        run.log_params({"questions_layout": file.layout})
        with publish(out, KIND, config=settings, made_from=made_from, resume=True) as draft:
            parts = draft.folder / "parts"
            parts.mkdir(exist_ok=True)
            source = model if isinstance(model, ModelConfig) else absolute(model)
            with retrieval(absolute(index), opened_index.manifest, config.retrieval) as open_retriever:
                count = answer_on_ray(source, open_retriever, questions, parts, config, total, stage)
            run.log_metrics({"contexts_cut_share": count.cut_share})
            names = [part_name(number, size) for number in range(-(-total // size))]
            refuse_unseen_parts(parts, names, out)
            draft.counts["questions"] = join_parts([parts / name for name in names], draft.folder)
            draft.counts |= asdict(count)
            shutil.rmtree(parts)
            draft.details |= {
                "model": recorded,
                "shard_questions": config.shard_questions,
                "inputs": input_paths(index=index, questions=questions),
            }
        return open_artifact(out, KIND, check_content=False)

    inputs = {"index": Input(index, made_from["index"]), "questions": Input(questions, made_from["questions"])}
    if not isinstance(model, ModelConfig):
        inputs["model"] = Input(model, made_from["model"])
    return run_stage(
        stage,
        KIND,
        out,
        config=settings,
        inputs=inputs,
        made_from=made_from,
        models={"model": recorded},
        parent_run_id=parent_run_id,
        work=work,
    )


def _checked_model(
    model: Path | ModelConfig, config: InferConfig, index: PassageIndex, file: Path, questions: Sequence[Question]
) -> RagModel:
    """Load the model and check that index, settings and questions fit it.

    Raises:
        RagError: one of them does not fit.
    """
    loaded = load_model(model if isinstance(model, ModelConfig) else str(model), config)
    loaded.check_index(index)
    loaded.variant_or(config.variant)
    loaded.reader.check_decoding(config.decoding)
    index.check_num_docs(config.num_docs or loaded.settings.num_docs)
    check_questions(loaded.generator_tokenizer, loaded.settings.prompt, questions, file, learnt=False)
    return loaded
