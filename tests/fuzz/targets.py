"""The readers that are fuzzed: for each, valid samples, and a function that puts damaged bytes in place and reads them.

A target is made in a folder of its own. What it feeds either is read or raises `RagError`; anything else is a finding.
"""

from __future__ import annotations

import gzip
import hashlib
import json
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from rag_core.corpus.formats import CorpusFormat, Reject, read_rows
from rag_core.errors import RagError
from rag_core.storage.artifact import fingerprint_of_json, open_artifact, publish

Feed = Callable[[bytes], None]
PASSAGES = [("a", "Lyon", "Lyon is a city."), ("b", "", 'Grüße, "quoted"\tand 😀.'), ("c", "T", "two\nlines")]


@dataclass(frozen=True)
class Target:
    """A reader's samples, and what reads one damaged input."""

    samples: list[bytes]
    feed: Feed


def _corpus(format: CorpusFormat, name: str, samples: list[bytes], folder: Path) -> Target:
    file = folder / name

    def feed(data: bytes) -> None:
        file.write_bytes(data)
        try:
            for row in read_rows([file], format):
                # What is kept or reported must be fit to be written.
                text = row.found + row.reason if isinstance(row, Reject) else "".join(_texts(row.passage))
                text.encode("utf-8")
        except RagError as error:
            str(error).encode("utf-8")
            raise

    return Target(samples, feed)


def _texts(passage: Any) -> tuple[str, str, str]:
    return passage.id, passage.title, passage.text


def _jsonl() -> bytes:
    return "".join(
        json.dumps({"id": i, "title": t, "text": x}, ensure_ascii=False) + "\n" for i, t, x in PASSAGES
    ).encode()


JSONL = [_jsonl(), b'{"id": 7, "text": "one", "title": null}\r\n{"id": "x", "text": "\\u00fc"}']
TSV = [b'id\ttext\ttitle\n1\tone\tT\n2\t"two ""quoted""\nlines"\tT\n3\tthree\tT\n', b"text\tid\r\none\t1\r\ntwo\t2\r\n"]
QAS = [{"id": "1", "question": "q?", "answers": [{"text": "x", "answer_start": 0}]}, {"id": "2", "question": "r?"}]
SQUAD = [
    json.dumps(
        {"data": [{"title": "A", "paragraphs": [{"context": "c", "qas": QAS}, {"context": "d", "qas": []}]}]}
    ).encode(),
    b'{"version": "v2.0", "data": [{"title": "A", "paragraphs": [{"context": "y", "qas": [{"question": "s?"}]}]}, {"title": "B", "paragraphs": [{"context": "x", "qas": []}]}]}',
]
TEXT = [
    b"# Title #\n\none two. Three four!\n\n```sh\n# comment\n```\nfive six\n",
    "ein Satz.\r\n\r\nnoch „einer“.".encode(),
]
CTXS = [{"id": "p", "title": "T", "text": "t", "score": "81.5"}, {"id": 2, "text": "u", "score": -1}]
RECORDS = [
    {"id": 5, "question": "q?", "answers": ["a", "b"], "type": "2hop", "gold_passage_ids": ["p", 7]},
    {"question": "r?", "answer": "c", "ctxs": CTXS},
]
QUESTIONS_JSONL = [b"\n".join(json.dumps(one).encode() for one in RECORDS), json.dumps(RECORDS[1]).encode()]
QUESTIONS_LIST = [json.dumps(RECORDS).encode(), json.dumps(RECORDS[0]).encode()]
# One record of each layout, and the kinds in which its lists come.
LAYOUTS = [
    {"id": "t0", "question": "q?", "golden_answers": ["a", "b"], "metadata": {"type": "x"}},
    {"id": "k1", "input": "q?", "output": [
        {"answer": "a", "provenance": [{"wikipedia_id": "11", "start_paragraph_id": 1, "end_paragraph_id": 2}]},
        {"provenance": []}]},
    {"question": "q?", "answers": ["a"], "positive_ctxs": [{"title": "T", "text": "t", "passage_id": "7"}, {"psg_id": 8}]},
    {"id": "s1", "title": "T", "context": "c", "question": "q?", "answers": {"text": ["a", "a"], "answer_start": [0, 0]}},
    {"Question": "q?", "QuestionId": "tc_1", "Answer": {"Value": "a", "Aliases": ["b"], "NormalizedAliases": ["b"]}},
    {"question": "r?", "question_id": "tc_2", "answer": {"value": "a", "aliases": ["b", "c"]}},
    {"_id": "h1", "question": "q?", "answer": "a", "type": "bridge", "supporting_facts": [["T", 0], ["U", 1]]},
    {"id": "h2", "question": "q?", "answer": "a", "supporting_facts": {"title": ["T"], "sent_id": [0]}},
    {"example_id": 5, "question_text": "q?", "document_text": "one <P> two three", "annotations": [
        {"short_answers": [{"start_token": 0, "end_token": 3}], "yes_no_answer": "NONE"}, {"yes_no_answer": "YES"}]},
    {"id": "n1", "question": {"text": "q?"}, "annotations": {
        "short_answers": [{"text": ["a"], "start_token": [1]}], "yes_no_answer": [-1]}},
    {"_id": "b1", "text": "q?", "metadata": {}},
    {"question": "q?", "possible_answers": ["a"]},
    {"utterance": "q?", "targetValue": '(list (description "a b") (description c))'},
    {"question": "q?", "answers": ["a\\s?b", "(c|d){2,3}"], "answers_are": "regex"},
    {"question": "q?", "answers": [], "is_impossible": True},
]  # fmt: skip
LAYOUT_LINES = [json.dumps(one).encode() for one in LAYOUTS] + [b"\n".join(json.dumps(one).encode() for one in LAYOUTS)]
LAYOUT_OBJECTS = [
    json.dumps(LAYOUTS[2:6]).encode(),
    json.dumps({"Domain": "Web", "Data": [LAYOUTS[4]], "Version": 1.0}).encode(),
    json.dumps({"version": "x", "data": LAYOUTS[:3]}, indent=1).encode(),
    b'{"data": [{"paragraphs": [{"context": "c", "qas": [{"question": "q?", "answers": []}]}]}, {"title": "", "paragraphs": []}]}',
]
LAYOUT_CSV = [
    b'id,question,answers,type\n1,who?,"[\'a\', \'b\']",t\n2,"what, ""now""?","[""c""]",\n',
    b"question\tanswer\nwho?\ta\nwhat?\t['b', 'c']\n",
    b'301\twho?\n302\twhat "is" it?\n',
    b"question;answer;is_impossible\r\nwho?;a;False\r\nwhat?;;true\r\n",
]
QRELS = [b"query-id\tcorpus-id\tscore\nq1\td1\t1\nq1\td2\t0\nq2\td2\t2\n"]
QUESTIONS_CSV = [b'who?\t[\'Paris\', "it\'s"]\nwhere?\t["a\\u00fc"]\n"a ""b"""\t[]\n']


ROWS: tuple[dict[str, Any], ...] = (
    {"_id": "d1", "title": "Lyon", "text": "Lyon is a city.", "metadata": {}},
    {"id": "0", "contents": '"Lyon"\nLyon is a city.'},
    {
        "_id": "7",
        "wikipedia_id": "7",
        "wikipedia_title": "Lyon",
        "text": ["Lyon\n", "It is old.\n", "BULLET::::- one\n"],
    },
    {"id": "12", "title": "Lyon", "text": ["Lyon is a city.", " It is old."], "url": "u"},
    {"id": 3, "question": "q?", "context": [["Lyon", ["Lyon is a city."]], ["Oslo", ["One.", " Two."]]]},
    {"id": "q", "question": "q?", "context": {"title": ["Lyon", "Oslo"], "sentences": [["One.", " Two."], ["x"]]}},
    {"id": "q", "title": "Lyon", "question": "q?", "context": "Lyon is a city.", "answers": {"text": ["x"]}},
    {"docid": 5, "title": None, "text": "two\nlines"},
)
LAYOUTS_JSONL = [
    b"\n".join(json.dumps(row, ensure_ascii=number % 2 == 0).encode() for row in (one, one))
    for number, one in enumerate(ROWS)
]
LAYOUTS_JSON = [
    json.dumps(list(ROWS)).encode(),
    json.dumps({"data": ROWS[:1] * 2, "version": "1"}, indent=1).encode(),
    json.dumps({"version": "1", "data": [ROWS[6]]}).encode(),
    json.dumps({"d1": {"title": "T", "text": "x"}, "d2": {"text": "y"}}).encode(),
    json.dumps({"d1": "x", "d2": "Grüße 😀"}, indent=2).encode(),
    b"\n".join(json.dumps(row, indent=1).encode() for row in ROWS[:3]),
    *SQUAD,
]
LAYOUTS_TABLES = [
    b'id,text,title\r\n1,"one, two",T\r\n2,"two ""quoted""\r\nlines",T\r\n',
    b"_id;title;text\nd1;T;one\nd2;;two\n",
    b"0\tone two\n1\tthree\n",
    b'id\tcontents\n1\t"""Lyon""\nLyon is a city."\n',
    b"id,title,context,question\n1,T,Lyon is a city.,q?\n",
]


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
    columns = dict(zip(("id", "title", "text"), (list(one) for one in zip(*PASSAGES, strict=True)), strict=True))
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
    for number, rows in enumerate(([LAYOUTS[0]], LAYOUTS[3:4] * 2, LAYOUTS[7:8], LAYOUTS[9:10])):
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
    """Put a file in place, and its size and SHA-256 into the manifest: damage that no checksum tells."""
    (folder / name).write_bytes(data)
    manifest["files"][name] = {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    manifest["fingerprint"] = fingerprint_of_json({one: entry["sha256"] for one, entry in manifest["files"].items()})
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
            # What evaluation reads of a row.
            (row["id"] + row["question"] + row["answer"]).encode("utf-8")
            for one in row["passages"]:
                (one["id"] + one["title"] + one["text"]).encode("utf-8")

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
    columns = [list(one) for one in zip(*PASSAGES, strict=True)]
    write_passage_store([pa.table(columns, names=["id", "title", "text"])], file)
    sample = file.read_bytes()

    def feed(data: bytes) -> None:
        file.unlink()  # what is mapped must not be cut under who maps it
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
    """`name`, one of an index's files, behind a manifest that agrees with it."""
    import faiss
    import numpy as np

    from rag_core.index.passage_index import PassageIndex
    from rag_core.index.passage_store import write_passage_store

    faiss.omp_set_num_threads(1)  # searches are tiny: threads would only wait for one another
    rows, vectors_ND = range(300), np.random.default_rng(0).standard_normal((300, 8)).astype(np.float32)
    index = faiss.index_factory(8, factory, faiss.METRIC_INNER_PRODUCT)
    index.train(vectors_ND)
    index.add(vectors_ND)
    faiss.write_index(index, str(folder / "index.faiss"))
    np.save(folder / "vectors.npy", vectors_ND)
    texts = [f"p{row}" for row in rows]
    write_passage_store([pa.table([texts, texts, texts], names=["id", "title", "text"])], folder / "passages.arrow")
    files = {one: (folder / one).read_bytes() for one in ("index.faiss", "vectors.npy", "passages.arrow")}
    home = folder / "index"
    details = {"dim": 8, "encoder_fingerprint": "f", "factory": factory, "search_parameter": "", "search_value": 0}
    _small_artifact(home, "index", files, counts={"passages": 300}, details=details)
    manifest = json.loads((home / "manifest.json").read_bytes())

    def feed(data: bytes) -> None:
        (home / name).unlink()  # what is mapped must not be cut under who maps it
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


TARGETS: dict[str, Callable[[Path], Target]] = {
    "corpus-jsonl": partial(_corpus, "jsonl", "c.jsonl", JSONL),
    "corpus-dpr-tsv": partial(_corpus, "dpr-tsv", "c.tsv", TSV),
    "corpus-parquet": _parquet,
    "corpus-squad": partial(_corpus, "squad", "c.json", SQUAD),
    "layouts-jsonl": partial(_corpus, "auto", "c.jsonl", LAYOUTS_JSONL),
    "layouts-json": partial(_corpus, "auto", "c.json", LAYOUTS_JSON),
    "layouts-tables": partial(_corpus, "auto", "c.csv", LAYOUTS_TABLES),
    "layouts-parquet": _parquet_layouts,
    "layouts-anything": partial(_corpus, "auto", "c", [*LAYOUTS_JSONL, *LAYOUTS_JSON, *LAYOUTS_TABLES, *JSONL, *TSV]),
    "corpus-text": partial(_corpus, "text", "c.md", TEXT),
    "questions-jsonl": partial(_questions, "q.jsonl", QUESTIONS_JSONL),
    "questions-list": partial(_questions, "q.json", QUESTIONS_LIST),
    "questions-csv": partial(_questions, "q.csv", QUESTIONS_CSV),
    "questions-squad": partial(_questions, "q.json", SQUAD),
    "datasets-layouts": partial(_questions, "q.jsonl", LAYOUT_LINES),
    "datasets-objects": partial(_questions, "q.json", LAYOUT_OBJECTS),
    "datasets-columns": partial(_questions, "q.csv", LAYOUT_CSV),
    "datasets-gzip": partial(_questions, "q.jsonl.gz", [gzip.compress(one, mtime=0) for one in LAYOUT_LINES[-1:]]),
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
} | {"model-pytorch_model.bin": _pickled_weights}
