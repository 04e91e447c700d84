"""Make tests/samples/v1: one artifact of each kind with schema version 1, small enough for the repository.

    python -m tests.storage.make_v1_samples FOLDER

They are made once and kept: `tests/storage/test_v1_samples.py` reads the stored samples for ever. Run this again only
to add a kind, and never overwrite the stored samples.
"""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

from rag_core.evaluation.predictions import join_parts, prediction_row, write_part
from rag_core.model.rag_model import RagModel
from rag_core.model.reader import DecodingConfig
from rag_core.questions.questions import read_questions
from rag_core.storage.artifact import fingerprint_of_files, publish
from rag_core.storage.inputs import input_paths
from tests.support.small_corpus import make_encoder, make_generator, make_index, model_config, write_questions_jsonl

# The weights are a few kilobytes. The answers are nonsense, but always the same.
HIDDEN_SIZE = 8
DECODING = DecodingConfig(num_beams=2, max_new_tokens=6, num_return_sequences=2, precision="float32")


def make_samples(folder: Path) -> None:
    """Corpus, embeddings, index, generator, rag-model and predictions below `folder`."""
    parts = folder / "parts"
    encoder = make_encoder(parts / "encoder", hidden_size=HIDDEN_SIZE)
    index = make_index(folder, encoder)
    generator = make_generator(parts / "generator", encoder)
    questions = write_questions_jsonl(folder / "questions.jsonl")
    with publish(folder / "generator", "generator") as draft:
        shutil.copytree(generator, draft.folder, dirs_exist_ok=True)
        draft.counts |= {"best_step": 0, "contexts": 0, "contexts_cut": 0}
        draft.details["encoder"] = str(encoder)
    model = RagModel.from_parts(model_config(encoder, folder / "generator"))
    model.settings.variant = "token"
    model.settings.document_encoder_fingerprint = index.encoder_fingerprint
    model.save_pretrained(folder / "rag-model", config={"variant": "token"})
    rows_read = read_questions(questions)
    made_from = {
        "model": model.fingerprint(),
        "index": index.manifest.fingerprint,
        "questions": fingerprint_of_files([questions]),
    }
    loaded = RagModel.from_pretrained(folder / "rag-model")
    answers = loaded.answer([row.question for row in rows_read], index, decoding=DECODING)
    rows = [prediction_row(question, answer) for question, answer in zip(rows_read, answers, strict=True)]
    config = {"decoding": json.loads(DECODING.model_dump_json())}
    with publish(folder / "predictions", "predictions", config=config, made_from=made_from) as draft:
        write_part(rows, draft.folder / "part.jsonl")
        draft.counts["questions"] = join_parts([draft.folder / "part.jsonl"], draft.folder)
        (draft.folder / "part.jsonl").unlink()
        draft.details |= {
            "model": str(folder / "rag-model"),
            "shard_questions": 256,
            "inputs": input_paths(index=index.path, questions=questions),
        }
    shutil.rmtree(parts)


if __name__ == "__main__":
    make_samples(Path(sys.argv[1]))
