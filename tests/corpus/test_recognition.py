"""Recognition: which files a source means, what each file is, and the messages for files of no known kind."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from rag_core.corpus.corpus import Corpus, CorpusConfig, source_fingerprint, write_corpus
from rag_core.corpus.formats import CorpusFormat
from rag_core.corpus.passages import Passage
from rag_core.errors import InputError
from rag_core.storage.artifact import stage_key
from tests.corpus.layout_samples import CONTAINERS, FLAT_LAYOUTS, TABLES, TITLED, lines, parquet, put, read


def test_if_two_layouts_fit_the_first_in_the_table_is_used(tmp_path: Path) -> None:
    both = {"id": "1", "_id": "other", "title": "T", "text": "text", "contents": '"U"\ncontents'}
    assert read(put(tmp_path / "c.jsonl", lines([both]))) == ([Passage("1", "T", "text")], [])


def test_a_file_has_the_layout_of_most_of_its_rows_and_other_rows_are_rejected(tmp_path: Path) -> None:
    rows = [{"id": "1", "text": "odd"}, *({"_id": str(n), "text": "t"} for n in range(3))]
    passages, rejects = read(put(tmp_path / "c.jsonl", lines(rows)))
    assert ([passage.id for passage in passages], rejects) == (["0", "1", "2"], [(1, "missing _id")])


def test_each_file_of_several_is_recognised_by_itself(tmp_path: Path) -> None:
    files = [
        put(tmp_path / "beir.jsonl", lines(FLAT_LAYOUTS["beir"][0][:1])),
        put(tmp_path / "c.parquet", parquet([{"id": 2, "contents": '"Oslo"\ncity'}])),
        put(tmp_path / "notes.txt", "some words"),
    ]
    manifest = write_corpus(files, tmp_path / "out", CorpusConfig())
    assert manifest.details["layouts"] == {
        "beir (BEIR), JSON Lines": 1, "contents (pyserini, FlashRAG), Parquet": 1, "plain text": 1,
    }  # fmt: skip
    assert [passage.id for passage in Corpus.open(tmp_path / "out").iter_passages()] == ["1", "2", "notes.txt#0"]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("c.jsonl", '{"contnets": "x", "id": "1"}', r"keys contnets, id; .* did you mean `contents` for `contnets`\?"),
        ("c.jsonl", '{"contents": "x", "ID": "1"}', r"nearest layout is contents .* did you mean `id` for `ID`\?"),
        ("c.json", '[{"_id": "1", "Text": "x"}]', r"layout is beir .* did you mean `text` for `Text`\?"),
        ("c.json", '{"id": "1", "txet": "x"}', r"did you mean `text` for `txet`\?"),
        ("c.jsonl", '{"title": "T", "text": "x"}', r"nearest layout is id-text .* `id` is missing"),
        ("c.jsonl", '{"id": "1", "text": {"a": 1}}', r"`text` is dict here"),
        ("c.jsonl", '{"wikipedia_id": "1", "text": ["x"]}', r"layout is kilt .* `wikipedia_title` is missing"),
        ("c.jsonl", '{"body": "x", "name": "1"}', r"keys body, name; no known layout .* id, title and text are always read"),
        ("c.jsonl", "{}", r"has no key; no known layout"),
        ("c.jsonl", '{"id": "1", "question": "q?", "answers": ["a"]}', r"those of questions: give the file as --questions"),
        ("c.json", '{"id": {"0": "a"}, "text": {"0": "b"}}', r"pandas: to_json\(orient='records', lines=True\)"),
        ("c.csv", "id,txt\n1,x\n", r"line 1: a header .* did you mean `text` for `txt`\?"),
        ("c.tsv", "1\tx\tT\n", r"line 1: a header .* found '1.tx.tT'.* Add the header or correct it"),
        ("c.csv", "prose, not a table.\n", r"plain text is read from files that end in \.txt or \.md"),
        ("paper", b"%PDF-1.7", r" is a PDF; .*Convert it to text first"),
        ("data.arrow", b"\xff\xff\xff\xff\x00", r"is an Arrow stream, .*to_parquet"),
        ("c.pkl", b"\x80\x04\x95abc", r"is a pickle, which is never opened"),
        ("c.jsonl", '{"k\\ney\\ud800": "x"}', r"has the keys k ey\\ud800;"),
    ],
)  # fmt: skip
def test_a_file_of_no_known_layout_is_refused_with_its_keys_and_the_nearest_layout(
    tmp_path: Path, name: str, content: str | bytes, message: str
) -> None:
    with pytest.raises(InputError, match=rf"{name}.*{message}") as refusal:
        read(put(tmp_path / name, content))
    str(refusal.value).encode()
    assert "\n" not in str(refusal.value)


LIST = json.dumps([{"_id": "1", "text": "x"}])


@pytest.mark.parametrize(
    ("format", "content", "message"),
    [
        ("jsonl", LIST, r"By its content it is beir \(BEIR\), JSON: leave the format out, or name the format json"),
        ("jsonl", json.dumps({"_id": "1", "text": "x"}, indent=1), r"it is beir \(BEIR\), JSON: leave the format out"),
        ("jsonl", parquet([{"id": "1", "text": "x"}]), r"it is id-text .*, Parquet: .* name the format parquet"),
        ("jsonl", "id\ttext\n1\tx\n", r"tab-separated: leave the format out, or name the format dpr-tsv"),
        ("json", "id,text\n1,x\n", r"is not JSON: it starts with 'i'.* CSV: leave the format out, or name the format csv"),
        ("parquet", LIST, r"cannot be read as Parquet .*JSON: leave the format out, or name the format json"),
        ("dpr-tsv", "id,text,title\n1,x,T\n", r"line 1: a header .*CSV: leave the format out, or name the format csv"),
        ("csv", LIST, r"line 1: a header .*JSON: leave the format out, or name the format json"),
        ("squad", lines([{"id": "1", "contents": "x"}]), r"contents .*JSON Lines: leave the format out, or name .* jsonl"),
        ("squad", LIST, r"is not SQuAD JSON.*beir \(BEIR\), JSON: leave the format out, or name the format json"),
    ],
)  # fmt: skip
def test_a_file_that_is_not_in_the_named_format_is_refused_with_the_format_that_it_has(
    tmp_path: Path, format: CorpusFormat, content: str | bytes, message: str
) -> None:
    with pytest.raises(InputError, match=message):
        read(put(tmp_path / "c", content), format=format)


@pytest.mark.parametrize("format", ["jsonl", "parquet", "dpr-tsv", "json", "csv"])
def test_the_layout_is_recognised_also_if_the_format_is_named(tmp_path: Path, format: CorpusFormat) -> None:
    rows, expected = FLAT_LAYOUTS["beir"]
    writers = CONTAINERS | TABLES
    name = {"jsonl": "c.jsonl", "parquet": "c.parquet", "dpr-tsv": "c.tsv", "json": "list.json", "csv": "c.csv"}[format]
    assert read(put(tmp_path / name, writers[name](rows)), format=format) == (expected, [])


def test_a_corpus_made_under_a_named_format_keeps_its_key() -> None:
    keys = {
        "jsonl": "fe13afd6bc760d26c44fea5b97e7fe1c0194e2bbc21eeecc9c30b73c8ef7058d",
        "dpr-tsv": "62464bedbc13992a82f038485a3d24dcc37699c6453ab122b7d2dcf9a0653717",
        "parquet": "fabda92c0ba81e3adbe9e36118b2e3c031a02010678f51255ba19a47d0638578",
        "squad": "86153072b2e8680809546e264c526b4e02eff29e34ba3186c40a119b0cee98ab",
        "text": "f037362deed0e09d58e50472ff516b2077c6ddfed2a98f7332288526e972738a",
    }
    made_from = {"sources": "s" * 64}
    assert {name: stage_key("corpus", CorpusConfig(format=name).decisive(), made_from) for name in keys} == keys  # type: ignore[arg-type]


def test_file_names_are_part_of_the_fingerprint_for_text_only(tmp_path: Path) -> None:
    def fingerprint(name: str, content: str) -> str:
        return source_fingerprint([put(tmp_path / name, content)], "auto")

    assert fingerprint("a.jsonl", "x") == fingerprint("b.jsonl", "x")
    assert fingerprint("a.txt", "x") != fingerprint("b.txt", "x")


def test_of_a_beir_folder_only_the_corpus_is_read(tmp_path: Path) -> None:
    put(tmp_path / "corpus.jsonl", lines(FLAT_LAYOUTS["beir"][0]))
    put(tmp_path / "queries.jsonl", '{"_id": "q", "text": "q?"}\n')
    put(tmp_path / "qrels/test.tsv", "query-id\tcorpus-id\tscore\nq\t1\t1\n")
    put(tmp_path / "README.md", "no passage")
    assert read(tmp_path)[0] == TITLED


def test_beirs_queries_are_refused_as_a_corpus_unless_the_format_is_named(tmp_path: Path) -> None:
    file = put(tmp_path / "queries.jsonl", '{"_id": "q", "text": "q?"}\n')
    with pytest.raises(InputError, match=r"queries\.jsonl is BEIR's queries by its name: give it as --questions"):
        read(file)
    assert read(file, format="jsonl")[0] == [Passage("q", "", "q?")]


def test_a_folder_means_its_records_else_its_text_else_its_files_without_suffix(tmp_path: Path) -> None:
    put(tmp_path / "AA/wiki_00", '{"id": "1", "text": "without suffix"}\n')
    assert [passage.text for passage in read(tmp_path)[0]] == ["without suffix"]
    put(tmp_path / "a.txt", "text")
    assert [passage.text for passage in read(tmp_path)[0]] == ["text"]
    put(tmp_path / "a.json", '[{"id": "1", "text": "record"}]')
    assert [passage.text for passage in read(tmp_path)[0]] == ["record"]
