"""The fuzzed readers. Each target has valid samples, and a function that writes damaged bytes to a file and reads it.

Each target works in a folder of its own. An input must be read or refused with `RagError`; anything else is a finding.
"""

from __future__ import annotations

import gzip
import hashlib
import json
import tempfile
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from rag_core.corpus.formats import CorpusFormat, Reject, read_rows
from rag_core.errors import RagError
from rag_core.storage.artifact import fingerprint_of_json, open_artifact, publish
from tests.fuzz.samples import (
    CORPUS_LAYOUTS_JSON,
    CORPUS_LAYOUTS_JSONL,
    CORPUS_LAYOUTS_TABLES,
    JSONL,
    PASSAGES,
    QRELS,
    QUESTION_LAYOUTS,
    QUESTION_LAYOUTS_JSON,
    QUESTION_LAYOUTS_JSONL,
    QUESTION_LAYOUTS_TABLES,
    QUESTIONS_CSV,
    QUESTIONS_JSONL,
    QUESTIONS_LIST,
    SQUAD,
    TEXT,
    TSV,
)

Feed = Callable[[bytes], None]


@dataclass(frozen=True)
class Target:
    """A reader's valid samples, and the function that reads one damaged input."""

    samples: list[bytes]
    feed: Feed


def _corpus(format: CorpusFormat, name: str, samples: list[bytes], folder: Path) -> Target:
    file = folder / name

    def feed(data: bytes) -> None:
        file.write_bytes(data)
        try:
            for row in read_rows([file], format):
                # Kept passages and reported rejects must be encodable, because they get written.
                text = row.found + row.reason if isinstance(row, Reject) else "".join(_texts(row.passage))
                text.encode("utf-8")
        except RagError as error:
            str(error).encode("utf-8")
            raise

    return Target(samples, feed)


def _texts(passage: Any) -> tuple[str, str, str]:
    return passage.id, passage.title, passage.text


def _parquet_layouts(folder: Path) -> Target:
    samples = []
    for columns in (
        {"wikipedia_id": [7, 8], "wikipedia_title": ["A", "B"], "text": [["A", "x"], ["B", None]]},
        {"kilt_id": ["7"], "wikipedia_id": ["7"], "wikipedia_title": ["A"], "text": [{"paragraph": ["A", "x"]}]},
        {"id": ["q"], "question": ["q?"], "context": [{"title": ["A", "B"], "sentences": [["x", "y"], ["z"]]}]},
        {"id": ["q"], "title": ["A"], "question": ["q?"], "context": ["x"], "answers": [{"text": ["x"]}]},
        {"_id": ["d1", "d2"], "title": ["A", ""], "text": ["x", "y"], "embeddings": [[1.0], [2.0]]},
    ):
        pq.write_table(pa.table(columns), folder / "sample.parquet", compression="none")
        samples.append((folder / "sample.parquet").read_bytes())
    return _corpus("auto", "c.parquet", samples, folder)


def _parquet(folder: Path) -> Target:
    columns = dict(zip(("id", "title", "text"), (list(column) for column in zip(*PASSAGES, strict=True)), strict=True))
    samples = []
    for number, options in enumerate(
        ({"compression": "zstd"}, {"compression": "none", "use_dictionary": False}, {"compression": "snappy"})
    ):
        table = pa.table(columns | ({"id": [1, 2, 3], "more": [[1.5], [], [2.5]]} if number == 2 else {}))
        pq.write_table(table, folder / "sample.parquet", **options)
        samples.append((folder / "sample.parquet").read_bytes())
    return _corpus("parquet", "c.parquet", samples, folder)


def _questions(name: str, samples: list[bytes], folder: Path) -> Target:
    from rag_core.questions.questions import read_questions

    file = folder / name

    def feed(data: bytes) -> None:
        file.write_bytes(data)
        for question in read_questions(file):
            texts = question.answers + question.gold_passage_ids + (question.type or "",)
            (question.id + question.question + "".join(texts)).encode("utf-8")

    return Target(samples, feed)


def _questions_parquet(folder: Path) -> Target:
    samples = []
    for number, rows in enumerate(
        ([QUESTION_LAYOUTS[0]], QUESTION_LAYOUTS[3:4] * 2, QUESTION_LAYOUTS[7:8], QUESTION_LAYOUTS[9:10])
    ):
        rows = [row | {"id": str(at)} for at, row in enumerate(rows)]
        options = {"compression": "none", "use_dictionary": False} if number % 2 else {"compression": "zstd"}
        pq.write_table(pa.Table.from_pylist(rows), folder / "sample.parquet", **options)
        samples.append((folder / "sample.parquet").read_bytes())
    return _questions("q.parquet", samples, folder)


def _judgements(folder: Path) -> Target:
    (folder / "queries.jsonl").write_text('{"_id": "q1", "text": "who?"}\n{"_id": "q2", "text": "what?"}\n')
    return _questions("test.tsv", QRELS, folder)


def _small_artifact(folder: Path, kind: str, files: dict[str, bytes], **described: Any) -> None:
    with publish(folder, kind, config={"a": 1}, made_from={"b": "c" * 64}) as draft:
        for name, content in files.items():
            (draft.folder / name).write_bytes(content)
        draft.counts.update(described.get("counts", {}))
        draft.details = described.get("details", {})


def _put_consistently(folder: Path, name: str, data: bytes, manifest: dict[str, Any]) -> None:
    """Write a file and enter its size and SHA-256 in the manifest, so that no checksum reveals the damage."""
    (folder / name).write_bytes(data)
    manifest["files"][name] = {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    manifest["fingerprint"] = fingerprint_of_json({file: entry["sha256"] for file, entry in manifest["files"].items()})
    (folder / "manifest.json").write_text(json.dumps(manifest))


def _manifest(folder: Path) -> Target:
    from rag_core.corpus.corpus import Corpus

    home = folder / "corpus"
    _small_artifact(home, "corpus", {"passages-00000.parquet": b"xy", "rejects.jsonl": b""}, counts={"passages": 2})
    sample = (home / "manifest.json").read_bytes()

    def feed(data: bytes) -> None:
        (home / "manifest.json").write_bytes(data)
        open_artifact(home, "corpus")
        len(Corpus.open(home))

    return Target([sample, json.dumps(json.loads(sample)).encode()], feed)


def _predictions(folder: Path) -> Target:
    from rag_core.evaluation.predictions import read_predictions

    passages = [{"id": "p", "title": "T", "text": "t", "prior": 0.5, "posterior": 0.25}]
    rows = [
        {
            "id": str(number),
            "question": "q?",
            "answer": answer,
            "log_prob": -1.5,
            "candidates": [{"answer": answer, "log_prob": -1.5}],
            "passages": passages,
        }
        for number, answer in enumerate(("France", "Grüße 😀"))
    ]
    sample = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()
    home = folder / "predictions"
    _small_artifact(home, "predictions", {"predictions.jsonl": sample})
    manifest = json.loads((home / "manifest.json").read_bytes())

    def feed(data: bytes) -> None:
        _put_consistently(home, "predictions.jsonl", data, manifest)
        for row in read_predictions(home):
            # The fields that evaluation reads.
            (row["id"] + row["question"] + row["answer"]).encode("utf-8")
            for passage in row["passages"]:
                (passage["id"] + passage["title"] + passage["text"]).encode("utf-8")

    return Target([sample, json.dumps(rows[0]).encode()], feed)


def _settings(folder: Path) -> Target:
    from flows.cli.settings import parse, read_yaml
    from rag_core.corpus.corpus import CorpusConfig

    file = folder / "run.yaml"
    samples = [
        b"format: text\nwords_per_passage: 100\nshard_rows: 5\n",
        b'format: "jsonl"\nshard_rows: &n 7\nwords_per_passage: *n\n',
        b"{format: squad, shard_rows: 0x10}\n",
        b"<<: [&a {shard_rows: 3}, *a]\nformat: jsonl\nmax_rejects_share: 2.5e-2\n",
    ]

    def feed(data: bytes) -> None:
        file.write_bytes(data)
        parse(CorpusConfig, read_yaml(file), str(file))

    return Target(samples, feed)


def _passage_store(folder: Path) -> Target:
    from rag_core.index.passage_store import PassageStore, write_passage_store

    file = folder / "passages.arrow"
    columns = [list(column) for column in zip(*PASSAGES, strict=True)]
    write_passage_store([pa.table(columns, names=["id", "title", "text"])], file)
    sample = file.read_bytes()

    def feed(data: bytes) -> None:
        file.unlink()  # a new file, because truncating a memory-mapped one crashes its readers
        file.write_bytes(data)
        store = PassageStore(file)
        for row in range(min(len(store), 10)):
            "".join(_texts(store[row])).encode("utf-8")

    return Target([sample], feed)


def _embeddings(folder: Path) -> Target:
    import numpy as np

    from rag_core.embeddings.embeddings import Embeddings

    column = pa.FixedSizeListArray.from_arrays(pa.array(np.arange(1, 13, dtype=np.float32)), 4)
    pq.write_table(
        pa.table({"id": ["a", "b", "c"], "embedding": column}), folder / "sample.parquet", compression="zstd"
    )
    sample, name = (folder / "sample.parquet").read_bytes(), "embeddings-00000.parquet"
    home = folder / "embeddings"
    described = {"counts": {"passages": 3}, "details": {"dim": 4, "dtype": "float32"}}
    _small_artifact(home, "embeddings", {name: sample}, **described)
    manifest = json.loads((home / "manifest.json").read_bytes())

    def feed(data: bytes) -> None:
        _put_consistently(home, name, data, manifest)
        for ids, vectors_nD in Embeddings.open(home).iter_vectors():
            assert vectors_nD.shape == (len(ids), 4)
            assert np.isfinite(vectors_nD).all()

    return Target([sample], feed)


def _index(name: str, factory: str, folder: Path) -> Target:
    """Damages `name`, one file of an index, under a manifest that agrees with the damage."""
    import faiss
    import numpy as np

    from rag_core.index.passage_index import PassageIndex
    from rag_core.index.passage_store import write_passage_store

    faiss.omp_set_num_threads(1)  # searches are tiny, so threads would only wait for each other
    rows, vectors_ND = range(300), np.random.default_rng(0).standard_normal((300, 8)).astype(np.float32)
    index = faiss.index_factory(8, factory, faiss.METRIC_INNER_PRODUCT)
    index.train(vectors_ND)
    index.add(vectors_ND)
    faiss.write_index(index, str(folder / "index.faiss"))
    np.save(folder / "vectors.npy", vectors_ND)
    texts = [f"p{row}" for row in rows]
    write_passage_store([pa.table([texts, texts, texts], names=["id", "title", "text"])], folder / "passages.arrow")
    files = {file: (folder / file).read_bytes() for file in ("index.faiss", "vectors.npy", "passages.arrow")}
    home = folder / "index"
    details = {"dim": 8, "encoder_fingerprint": "f", "factory": factory, "search_parameter": "", "search_value": 0}
    _small_artifact(home, "index", files, counts={"passages": 300}, details=details)
    manifest = json.loads((home / "manifest.json").read_bytes())

    def feed(data: bytes) -> None:
        (home / name).unlink()  # a new file, because truncating a memory-mapped one crashes its readers
        _put_consistently(home, name, data, manifest)
        opened = PassageIndex.open(home, check_content=False)
        opened.passages_of(opened.search(vectors_ND[:2], 3).rows_BK)

    return Target([files[name]], feed)


def _model_folder(name: str, folder: Path) -> Target:
    from rag_core.embeddings.text_encoder import TextEncoder
    from tests.support.small_corpus import make_encoder

    home = make_encoder(folder / "encoder")
    sample = (home / name).read_bytes()

    def feed(data: bytes) -> None:
        (home / name).write_bytes(data)
        TextEncoder.from_pretrained(home)

    return Target([sample], feed)


def _pickled_weights(folder: Path) -> Target:
    """Weights in both of PyTorch's formats."""
    import torch
    from safetensors.torch import load_file

    from rag_core.embeddings.text_encoder import TextEncoder
    from rag_core.errors import ModelNotice
    from tests.support.small_corpus import make_encoder

    home = make_encoder(folder / "encoder", hidden_size=8)
    file, weights = home / "pytorch_model.bin", load_file(home / "model.safetensors")
    (home / "model.safetensors").unlink()
    samples = []
    for is_zip in (True, False):
        torch.save(weights, file, _use_new_zipfile_serialization=is_zip)
        samples.append(file.read_bytes())

    def feed(data: bytes) -> None:
        file.write_bytes(data)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ModelNotice)
            TextEncoder.from_pretrained(home)

    return Target(samples, feed)


def _gguf(folder: Path) -> Target:
    """A GGUF file, read as far as a model and a tokenizer that has encoded a text."""
    from transformers import AutoModelForCausalLM

    from rag_core.errors import ModelNotice
    from rag_core.pretrained.model_source import load_tokenizer, load_weights, resolve_model_source
    from tests.support.models.tiny_gguf import write_gguf

    file = folder / "model.gguf"
    sample = write_gguf(file).read_bytes()

    def feed(data: bytes) -> None:
        file.write_bytes(data)
        with (
            warnings.catch_warnings(),
            tempfile.TemporaryDirectory(dir=folder) as cache,
            pytest.MonkeyPatch.context() as patch,
        ):
            patch.setenv("RAG_CACHE", cache)
            warnings.simplefilter("ignore", ModelNotice)
            source = resolve_model_source(file)
            load_weights(AutoModelForCausalLM.from_pretrained, source, may_lack=())
            load_tokenizer(source)("the café 1984")

    return Target([sample], feed)


TARGETS: dict[str, Callable[[Path], Target]] = {
    "corpus-jsonl": partial(_corpus, "jsonl", "c.jsonl", JSONL),
    "corpus-dpr-tsv": partial(_corpus, "dpr-tsv", "c.tsv", TSV),
    "corpus-parquet": _parquet,
    "corpus-squad": partial(_corpus, "squad", "c.json", SQUAD),
    "layouts-jsonl": partial(_corpus, "auto", "c.jsonl", CORPUS_LAYOUTS_JSONL),
    "layouts-json": partial(_corpus, "auto", "c.json", CORPUS_LAYOUTS_JSON),
    "layouts-tables": partial(_corpus, "auto", "c.csv", CORPUS_LAYOUTS_TABLES),
    "layouts-parquet": _parquet_layouts,
    "layouts-anything": partial(
        _corpus, "auto", "c", [*CORPUS_LAYOUTS_JSONL, *CORPUS_LAYOUTS_JSON, *CORPUS_LAYOUTS_TABLES, *JSONL, *TSV]
    ),
    "corpus-text": partial(_corpus, "text", "c.md", TEXT),
    "questions-jsonl": partial(_questions, "q.jsonl", QUESTIONS_JSONL),
    "questions-list": partial(_questions, "q.json", QUESTIONS_LIST),
    "questions-csv": partial(_questions, "q.csv", QUESTIONS_CSV),
    "questions-squad": partial(_questions, "q.json", SQUAD),
    "datasets-layouts": partial(_questions, "q.jsonl", QUESTION_LAYOUTS_JSONL),
    "datasets-objects": partial(_questions, "q.json", QUESTION_LAYOUTS_JSON),
    "datasets-columns": partial(_questions, "q.csv", QUESTION_LAYOUTS_TABLES),
    "datasets-gzip": partial(
        _questions, "q.jsonl.gz", [gzip.compress(sample, mtime=0) for sample in QUESTION_LAYOUTS_JSONL[-1:]]
    ),
    "datasets-parquet": _questions_parquet,
    "datasets-qrels": _judgements,
    "manifest": _manifest,
    "predictions": _predictions,
    "settings": _settings,
    "passage-store": _passage_store,
    "embeddings": _embeddings,
    "index-vectors": partial(_index, "vectors.npy", "Flat"),
    "index-flat": partial(_index, "index.faiss", "Flat"),
    "index-hnsw": partial(_index, "index.faiss", "HNSW8"),
    "index-ivf": partial(_index, "index.faiss", "IVF8,SQ8"),
    "index-pq": partial(_index, "index.faiss", "OPQ4,IVF8,PQ4x4fs"),
}
# Each input loads a model, so there are fewer.
MODEL_TARGETS: dict[str, Callable[[Path], Target]] = {
    f"model-{name}": partial(_model_folder, name)
    for name in ("config.json", "tokenizer_config.json", "tokenizer.json", "text_encoder.json", "model.safetensors")
} | {"model-pytorch_model.bin": _pickled_weights, "model-gguf": _gguf}
