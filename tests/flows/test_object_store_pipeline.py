"""The whole pipeline reads from and writes to s3://, on Ray, with a real S3 server."""

from __future__ import annotations

import json
import os
from pathlib import Path

import boto3
import pytest

from rag_core.storage.artifact import manifest_at
from rag_core.storage.places import ObjectPath
from rag_core.verification.verification import artifacts_below, verify
from tests.stages.test_resume import finish
from tests.support.servers.s3_server import BUCKET, CREDENTIALS, s3_server
from tests.support.small_corpus import (
    PROMPT,
    make_encoder,
    model_config,
    optimizer,
    write_passages_jsonl,
    write_questions_jsonl,
)

pytestmark = [pytest.mark.chaos(short=False), pytest.mark.timeout(600)]

PIPELINE = """
def work(config, out):
    from flows.pipeline import pipeline
    from flows.config import PipelineConfig
    result = pipeline(PipelineConfig.model_validate_json(Path(config).read_text()), out)
    print("STAGES", [(stage.stage, str(stage.path), stage.skipped) for stage in result.stages])
"""


def configuration(folder: Path, files: str) -> Path:
    """Write the configuration of a small run that reads its sources and questions from `files`."""
    encoder = make_encoder(folder / "encoder")
    model = model_config(encoder, folder / "made-by-the-pipeline")
    pretrain = {"encoder": str(encoder), "encoder_layers": 2, "decoder_layers": 1, "copy_steps": 1}
    steps = optimizer(2).model_dump(mode="json")
    questions = f"{files}/questions.jsonl"
    config = {
        "sources": [f"{files}/passages.jsonl"],
        "corpus": {"format": "jsonl", "shard_rows": 4},
        "questions": {"train": questions, "dev": questions, "test": questions},
        "embed": {"encoder": str(encoder)},
        "pretrain": {**pretrain, "prompt": PROMPT.model_dump(), "optimizer": steps},
        "model": model.model_dump(mode="json"),
        "variants": ["token"],
        "train": {"optimizer": steps, "eval_questions": 8},
        "infer": {"decoding": {"num_beams": 2, "max_new_tokens": 6, "num_return_sequences": 2}, "shard_questions": 3},
        "ks": [1, 3],
    }
    file = folder / "config.json"
    file.write_text(json.dumps(config))
    return file


def test_every_stage_reads_from_and_publishes_to_a_store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with s3_server(tmp_path / "s3.log") as environment:
        for name, value in {**environment, "RAG_CACHE": str(tmp_path / "cache")}.items():
            monkeypatch.setenv(name, value)
        s3 = boto3.client("s3")
        for file in (
            write_passages_jsonl(tmp_path / "passages.jsonl"),
            write_questions_jsonl(tmp_path / "questions.jsonl"),
        ):
            s3.put_object(Bucket=BUCKET, Key=f"files/{file.name}", Body=file.read_bytes())
            file.unlink()
        config, out = configuration(tmp_path, f"s3://{BUCKET}/files"), ObjectPath(f"s3://{BUCKET}/run")
        log = finish(PIPELINE, tmp_path, config, out)
        assert f"'s3://{BUCKET}/run/rag-token', False" in log
        kinds = ["corpus", "embeddings", "index", "generator", "rag-token", "predictions/rag-token"]
        assert [str(path) for path in artifacts_below(out)] == [str(out / kind) for kind in kinds]
        # With an empty cache, as on another machine.
        monkeypatch.setenv("RAG_CACHE", str(tmp_path / "elsewhere"))
        for path in artifacts_below(out):
            assert verify(path).findings == [], path
        assert manifest_at(out / "index").details["inputs"]["corpus"] == f"s3://{BUCKET}/run/corpus"
        if os.environ.get("CHAOS") != "smoke":
            # A machine with an empty cache finds everything up to date.
            log = finish(PIPELINE, tmp_path, config, out)
            assert log.count("True") == len(kinds), log
        assert not list(tmp_path.glob("s3:*")), "an s3:// address was taken for a local path"
    written = [path for path in tmp_path.rglob("*") if path.is_file() and path.name != "s3.log"]
    for secret in CREDENTIALS.values():
        assert not [path for path in written if secret.encode() in path.read_bytes()]
