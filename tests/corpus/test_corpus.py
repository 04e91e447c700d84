"""The corpus artifact: what is written, what is left out and counted, and what makes two corpora the same."""

from __future__ import annotations

import json
import random
import re
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from pydantic import ValidationError

from rag_core.corpus.corpus import (
    SCHEMA,
    Corpus,
    CorpusConfig,
    read_shard,
    refuse_many_rejects,
    source_files,
    source_fingerprint,
    write_corpus,
    write_passages,
)
from rag_core.corpus.formats.squad import paragraph_id
from rag_core.corpus.passages import Passage
from rag_core.errors import ArtifactError, InputError
from rag_core.storage.artifact import stage_key

XQUAD = Path(__file__).resolve().parents[3] / "shared/data/xquad.en.json"
JSONL = CorpusConfig(format="jsonl")
TOLERANT = CorpusConfig(format="jsonl", max_rejects_share=1)


def put(path: Path, *records: dict[str, Any] | str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join((r if isinstance(r, str) else json.dumps(r)) + "\n" for r in records), encoding="utf-8")
    return path


def row(id: str, text: str = "text") -> dict[str, str]:
    return {"id": id, "title": f"T{id}", "text": text}


def rejects_of(corpus: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (corpus / "rejects.jsonl").read_text(encoding="utf-8").splitlines()]


def test_a_corpus_reads_back_in_order_over_several_shards(tmp_path: Path) -> None:
    ids = [str(number) for number in range(25)]
    random.Random(0).shuffle(ids)
    source = put(tmp_path / "c.jsonl", *(row(id, f"text ü {id}") for id in ids))
    seen: list[int] = []
    config = CorpusConfig(format="jsonl", shard_rows=10)
    manifest = write_corpus([source], tmp_path / "out", config, on_progress=seen.append)
    corpus = Corpus.open(tmp_path / "out")
    assert list(corpus.iter_passages()) == [Passage(id, f"T{id}", f"text ü {id}") for id in ids]
    assert [path.name for path in corpus.shards] == [f"passages-0000{number}.parquet" for number in range(3)]
    assert (len(corpus), seen) == (25, [10, 20, 25])
    assert corpus.manifest == manifest
    assert manifest.counts == {"passages": 25, "rejects": 0}
    assert manifest.details["rejects_by_reason"] == {}
    assert rejects_of(tmp_path / "out") == []


def test_shards_are_zstd_parquet_with_three_string_columns(tmp_path: Path) -> None:
    out = tmp_path / "lang=en"
    write_corpus([put(tmp_path / "c.jsonl", row("a"))], out, JSONL)
    shard = Corpus.open(out).shards[0]
    assert read_shard(shard).schema.equals(SCHEMA)
    assert pq.ParquetFile(shard).metadata.row_group(0).column(2).compression == "ZSTD"


def test_duplicate_ids_are_rejected_with_file_and_line(tmp_path: Path) -> None:
    first = put(tmp_path / "1.jsonl", row("x"), row("a", "kept"))
    second = put(tmp_path / "2.jsonl", row("b"), row("c"), row("a", "dropped"))
    write_corpus([first, second], tmp_path / "out", TOLERANT)
    assert {p.id: p.text for p in Corpus.open(tmp_path / "out").iter_passages()}["a"] == "kept"
    reason = f"duplicate id: 'a' was first read from {first} line 2"
    assert rejects_of(tmp_path / "out") == [{"file": str(second), "line": 3, "reason": reason, "found": "dropped"}]


def test_rejects_are_counted_by_reason(tmp_path: Path) -> None:
    source = tmp_path / "c.jsonl"
    put(source, row("a"), row("a"), row("a"), row("b", " "), "{", "[1]", row("c"))
    with source.open("ab") as file:
        file.write(b'{"id": "d", "text": "\xff"}\n')
    manifest = write_corpus([source], tmp_path / "out", TOLERANT)
    assert manifest.counts == {"passages": 2, "rejects": 6}
    assert manifest.details["rejects_by_reason"] == {
        "broken JSON": 1,
        "duplicate id": 2,
        "empty text": 1,
        "undecodable": 1,
        "wrong type": 1,
    }
    assert [reject["line"] for reject in rejects_of(tmp_path / "out")] == [2, 3, 4, 5, 6, 8]


def test_a_corpus_without_any_passage_is_refused_with_the_first_reason(tmp_path: Path) -> None:
    source = put(tmp_path / "c.jsonl", row("a", ""), "{")
    with pytest.raises(InputError, match=r"2 of 2 rows .* were rejected.* The first: .*c\.jsonl line 1: empty text"):
        write_corpus([source], tmp_path / "out", TOLERANT)
    assert not (tmp_path / "out").exists()
    with pytest.raises(InputError, match="the input is empty"):
        write_corpus([put(tmp_path / "c.jsonl")], tmp_path / "out", JSONL)


def test_more_rejects_than_allowed_stop_the_run_and_are_kept_beside_the_older_corpus(tmp_path: Path) -> None:
    before = write_corpus([put(tmp_path / "c.jsonl", row("a"))], tmp_path / "out", JSONL)
    source = put(tmp_path / "c.jsonl", *(row(str(n)) for n in range(197)), row("5"), "{", row("x", ""))
    with pytest.raises(InputError) as caught:
        write_corpus([source], tmp_path / "out", CorpusConfig(format="jsonl", max_rejects_share=0.0149))
    kept = tmp_path / "out.rejects.jsonl"
    words = f"3 of 200 rows (1.5%) were rejected, more than the 1.5% .*{source} line 198: duplicate id.*{kept}.*--max-rejects"
    assert re.search(words.replace("(", "\\(").replace(")", "\\)"), str(caught.value))
    assert [json.loads(line)["line"] for line in kept.read_text().splitlines()] == [198, 199, 200]
    assert Corpus.open(tmp_path / "out").manifest == before
    assert sorted(path.name for path in tmp_path.iterdir() if "lock" not in path.name) == ["c.jsonl", "out", kept.name]

    manifest = write_corpus([source], tmp_path / "out", CorpusConfig(format="jsonl", max_rejects_share=0.015))
    assert manifest.counts == {"passages": 197, "rejects": 3}
    assert not kept.exists()


def test_the_allowed_share_of_rejects_does_not_change_the_key(tmp_path: Path) -> None:
    source = put(tmp_path / "c.jsonl", row("a"))
    strict, lax = (
        write_corpus([source], tmp_path / "out", CorpusConfig(format="jsonl", max_rejects_share=share))
        for share in (0.0, 1.0)
    )
    assert strict.key == lax.key


def test_an_existing_corpus_is_refused_if_fewer_rejects_are_allowed_now(tmp_path: Path) -> None:
    manifest = write_corpus([put(tmp_path / "c.jsonl", row("a"), "{")], tmp_path / "out", TOLERANT)
    refuse_many_rejects(manifest.counts, tmp_path / "out", 0.5)
    with pytest.raises(InputError, match=r"out was made with 1 of 2 rows left out \(50.0%\); at most 1.0%"):
        refuse_many_rejects(manifest.counts, tmp_path / "out", 0.01)


def test_a_failed_run_leaves_the_older_corpus(tmp_path: Path) -> None:
    before = write_corpus([put(tmp_path / "c.jsonl", row("a"))], tmp_path / "out", JSONL)
    pq.write_table(pa.table({"id": ["b"], "text": ["b"]}), tmp_path / "1.parquet")
    (tmp_path / "2.parquet").write_text("cut")
    sources = [tmp_path / "1.parquet", tmp_path / "2.parquet"]
    with pytest.raises(InputError, match=r"2\.parquet"):
        write_corpus(sources, tmp_path / "out", CorpusConfig(format="parquet"))
    assert Corpus.open(tmp_path / "out").manifest == before


def test_the_same_content_elsewhere_makes_the_same_corpus_with_the_same_key(tmp_path: Path) -> None:
    first = write_corpus([put(tmp_path / "x/c.jsonl", row("a"), row("b"))], tmp_path / "1", JSONL)
    same = write_corpus([put(tmp_path / "y/renamed.jsonl", row("a"), row("b"))], tmp_path / "2", JSONL)
    other = write_corpus([put(tmp_path / "z/c.jsonl", row("a"), row("c"))], tmp_path / "3", JSONL)
    assert (first.fingerprint, first.key) == (same.fingerprint, same.key)
    assert other.fingerprint != first.fingerprint
    assert other.key != first.key


def test_the_key_can_be_computed_before_the_run(tmp_path: Path) -> None:
    source = put(tmp_path / "c.jsonl", row("a"))
    made_from = {"sources": source_fingerprint([source], "jsonl")}
    assert write_corpus([source], tmp_path / "out", JSONL).key == stage_key("corpus", JSONL.decisive(), made_from)


def test_a_renamed_text_file_is_another_source_since_ids_come_from_names(tmp_path: Path) -> None:
    for folder, name in [("x", "a"), ("y", "a"), ("z", "b")]:
        put(tmp_path / folder / f"{name}.txt", "same words")
    x, y, z = (source_fingerprint([tmp_path / folder], "text") for folder in "xyz")
    assert x == y != z


def test_source_files_are_listed_in_reading_order(tmp_path: Path) -> None:
    late, early = put(tmp_path / "f/b.jsonl"), put(tmp_path / "f/a.jsonl")
    named = put(tmp_path / "z.jsonl")
    assert source_files([named, tmp_path / "f"], "jsonl") == [named, early, late]


def test_words_per_passage_reaches_the_text_reader(tmp_path: Path) -> None:
    put(tmp_path / "in/a.txt", "one two three four five")
    write_corpus([tmp_path / "in"], tmp_path / "out", CorpusConfig(format="text", words_per_passage=2))
    assert [p.text for p in Corpus.open(tmp_path / "out").iter_passages()] == ["one two", "three four", "five"]


def test_generated_passages_go_through_the_same_checks(tmp_path: Path) -> None:
    passages = [Passage("a", "", "one"), Passage("b", "T", " "), Passage("a", "", "two"), Passage("c", "T", "three")]
    made_from, config = {"generator": "f00"}, {"seed": 1}
    manifest = write_passages(
        iter(passages), tmp_path / "out", made_from=made_from, config=config, shard_rows=1, max_rejects_share=0.5
    )
    corpus = Corpus.open(tmp_path / "out")
    assert list(corpus.iter_passages()) == [passages[0], passages[3]]
    assert len(corpus.shards) == 2
    assert manifest.details["rejects_by_reason"] == {"duplicate id": 1, "empty text": 1}
    assert (manifest.made_from, manifest.config) == (made_from, config)


def test_a_damaged_shard_is_named_on_opening(tmp_path: Path) -> None:
    write_corpus([put(tmp_path / "c.jsonl", row("a"))], tmp_path / "out", JSONL)
    shard = tmp_path / "out/passages-00000.parquet"
    content = bytearray(shard.read_bytes())
    content[len(content) // 2] ^= 1
    shard.write_bytes(content)
    with pytest.raises(ArtifactError, match=r"passages-00000\.parquet was changed"):
        Corpus.open(tmp_path / "out")
    assert len(Corpus.open(tmp_path / "out", check_content=False)) == 1


def test_a_shard_with_other_columns_is_refused(tmp_path: Path) -> None:
    pq.write_table(pa.table({"id": [1]}), tmp_path / "x.parquet")
    with pytest.raises(ArtifactError, match=r"x\.parquet has the columns \['id'\]"):
        read_shard(tmp_path / "x.parquet")
    (tmp_path / "y.parquet").write_text("nothing")
    with pytest.raises(ArtifactError, match=r"y\.parquet cannot be read"):
        read_shard(tmp_path / "y.parquet")


@pytest.mark.parametrize("bad", [{"format": "xml"}, {"words": 3}, {"words_per_passage": 0}, {"shard_rows": 0}])
def test_unknown_or_senseless_settings_are_refused(bad: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        CorpusConfig(**({"format": "jsonl"} | bad))


def test_every_squad_paragraph_becomes_a_passage_under_its_paragraph_id(tmp_path: Path) -> None:
    if not XQUAD.is_file():
        pytest.skip(f"the shared test data is absent: {XQUAD}")
    manifest = write_corpus([XQUAD], tmp_path / "out", CorpusConfig(format="squad"))
    assert manifest.counts == {"passages": 240, "rejects": 0}
    assert list(Corpus.open(tmp_path / "out").iter_passages()) == [
        Passage(paragraph_id(article["title"], index), article["title"], paragraph["context"])
        for article in json.loads(XQUAD.read_text(encoding="utf-8"))["data"]
        for index, paragraph in enumerate(article["paragraphs"])
    ]
