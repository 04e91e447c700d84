"""Corpus files as people have them: any layout in any container gives the same passages; what is not known is named."""

from __future__ import annotations

import csv
import gzip
import hashlib
import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from rag_core.corpus.corpus import Corpus, CorpusConfig, source_fingerprint, write_corpus
from rag_core.corpus.formats import CorpusFormat, Reading, Reject, Row, read_rows
from rag_core.corpus.formats.containers import json_file, json_text
from rag_core.corpus.formats.layouts import LAYOUTS
from rag_core.corpus.formats.squad import context_id
from rag_core.corpus.passages import Passage
from rag_core.errors import InputError
from rag_core.storage.artifact import stage_key

Rows = list[dict[str, Any]]
LYON, OSLO = "Lyon is a city.", "Oslo is not, it is\na capital."


def read(
    *files: Path, format: CorpusFormat = "auto", **options: Any
) -> tuple[list[Passage], list[tuple[int | None, str]]]:
    rows = list(read_rows(files, format, **options))
    rejects = [(row.line, row.reason) for row in rows if isinstance(row, Reject)]
    return [row.passage for row in rows if isinstance(row, Row)], rejects


def put(path: Path, content: str | bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def lines(rows: Rows) -> str:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def table(rows: Rows, delimiter: str) -> str:
    writer = csv.DictWriter(file := io.StringIO(), list(rows[0]), delimiter=delimiter)
    writer.writeheader()
    writer.writerows(rows)
    return file.getvalue()


def parquet(rows: Rows) -> bytes:
    pq.write_table(pa.Table.from_pylist(rows), file := io.BytesIO())
    return file.getvalue()


CONTAINERS: dict[str, Callable[[Rows], str | bytes]] = {
    "c.jsonl": lines,
    "c.ndjson": lines,
    "lines.json": lines,
    "no_suffix": lines,
    "c.jsonl.gz": lambda rows: gzip.compress(lines(rows).encode()),
    "list.json": json.dumps,
    "list.json.gz": lambda rows: gzip.compress(json.dumps(rows).encode()),
    "indented.json": lambda rows: "\ufeff" + json.dumps(rows, indent=2),
    "objects.json": lambda rows: "\n".join(json.dumps(row, indent=2) for row in rows),
    "data.json": lambda rows: json.dumps({"version": "1", "data": rows}),
    "c.parquet": parquet,
}
TABLES: dict[str, Callable[[Rows], str | bytes]] = {
    "c.csv": lambda rows: table(rows, ","),
    "semicolons.csv": lambda rows: table(rows, ";"),
    "c.tsv": lambda rows: table(rows, "\t"),
    "c.tsv.gz": lambda rows: gzip.compress(table(rows, "\t").encode()),
}
TITLED = [Passage("1", "Lyon", LYON), Passage("x", "", OSLO)]
FLAT_LAYOUTS: dict[str, tuple[Rows, list[Passage]]] = {
    "id-text": ([{"id": "1", "title": "Lyon", "text": LYON}, {"id": "x", "title": "", "text": OSLO}], TITLED),
    "beir": ([{"_id": "1", "title": "Lyon", "text": LYON}, {"_id": "x", "title": "", "text": OSLO}], TITLED),
    "docid": ([{"docid": "1", "title": "Lyon", "text": LYON}, {"docid": "x", "title": "", "text": OSLO}], TITLED),
    "contents": ([{"id": "1", "contents": f'"Lyon"\n{LYON}'}, {"id": "x", "contents": OSLO}], TITLED),
    "squad-rows": (
        [{"id": "q1", "title": "Lyon", "context": LYON, "question": f"{n}?"} for n in range(3)],
        [Passage(context_id("Lyon", LYON), "Lyon", LYON)],
    ),
}
LIST_LAYOUTS: dict[str, tuple[Rows, list[Passage]]] = {
    "kilt": (
        [{"_id": "7", "wikipedia_id": "7", "wikipedia_title": "Lyon",
          "text": ["Lyon\n", "Section::::History.\n", "", LYON, f"BULLET::::- {OSLO}\n"]}],
        [Passage("7:3", "Lyon", LYON), Passage("7:4", "Lyon", f"- {OSLO}")],
    ),
    "abstracts": (
        [{"id": "12", "title": "Lyon", "text": [LYON, " It is old.", "Very."], "url": "u"}],
        [Passage("Lyon", "Lyon", f"{LYON} It is old. Very.")],
    ),
    "2wiki-abstracts": (
        [{"id": "12", "title": "Lyon", "sentences": [LYON, "It is old."]}],
        [Passage("Lyon", "Lyon", f"{LYON} It is old.")],
    ),
    "id-sentences": ([{"id": "1", "text": [LYON, "It is old."]}], [Passage("1", "", f"{LYON} It is old.")]),
    "hotpotqa": (
        [
            {"_id": "q", "question": "q?", "context": {"title": ["Lyon", "Oslo"], "sentences": [[LYON, " Old."], [OSLO]]}},
            {"_id": "r", "question": "r?", "context": {"title": ["Oslo"], "sentences": [[OSLO]]}},
        ],
        [Passage("Lyon", "Lyon", f"{LYON} Old."), Passage("Oslo", "Oslo", OSLO)],
    ),
}  # fmt: skip


@pytest.mark.parametrize("layout", FLAT_LAYOUTS | LIST_LAYOUTS)
def test_a_layout_is_the_same_passages_in_every_container(tmp_path: Path, layout: str) -> None:
    rows, expected = (FLAT_LAYOUTS | LIST_LAYOUTS)[layout]
    containers = CONTAINERS | (TABLES if layout in FLAT_LAYOUTS else {})
    for name, write in containers.items():
        reading = Reading()
        assert read(put(tmp_path / name, write(rows)), reading=reading) == (expected, []), name
        (found,) = reading.layouts
        assert found.startswith(f"{layout} ("), name


def test_every_row_of_the_table_of_layouts_is_tried_here_and_told_in_the_documents() -> None:
    assert [layout.name for layout in LAYOUTS] == [
        "id-text", "beir", "docid", "contents", "kilt", "abstracts", "2wiki-abstracts", "id-sentences", "hotpotqa",
        "squad-rows",
    ]  # fmt: skip
    assert {layout.name for layout in LAYOUTS} == set(FLAT_LAYOUTS | LIST_LAYOUTS)
    page = (Path(__file__).parents[2] / "docs/formats.md").read_text(encoding="utf-8")
    assert not [layout.name for layout in LAYOUTS if f"| `{layout.name}` |" not in page]


@pytest.mark.parametrize(
    ("content", "passages"),
    [
        ('{"d1": {"title": "T", "text": "one"}, "d2": {"text": "two"}}', [("d1", "T", "one"), ("d2", "", "two")]),
        ('{"d1": {"_id": "own", "text": "one"}}', [("own", "", "one")]),
        ('{\n"1": "one",\n"2": "two"}\n', [("1", "", "one"), ("2", "", "two")]),
        ('{"7": {"contents": "\\"T\\"\\none"}}', [("7", "T", "one")]),
    ],
)
def test_an_object_of_records_by_their_ids_is_read(
    tmp_path: Path, content: str, passages: list[tuple[str, str, str]]
) -> None:
    assert read(put(tmp_path / "c.json", content)) == ([Passage(*passage) for passage in passages], [])


def test_a_collection_without_header_is_read_if_its_first_column_is_a_number(tmp_path: Path) -> None:
    file = put(tmp_path / "collection.tsv", '0\tone "quoted" word\n1\ttwo\n')
    assert read(file) == ([Passage("0", "", 'one "quoted" word'), Passage("1", "", "two")], [])


@pytest.mark.parametrize(
    ("contents", "title", "text"),
    [
        ('"Lyon"\nA city.', "Lyon", "A city."),
        ('"Lyon" \r\nA city.', "Lyon", "A city."),
        ('""Lyon" (song)"\nA song.', '"Lyon" (song)', "A song."),
        ("Lyon\nA city.", "", "Lyon\nA city."),
        ("A city.", "", "A city."),
        ('"Lyon\nA city.', "", '"Lyon\nA city.'),
        ('"Lyon" is a city.\nOld.', "", '"Lyon" is a city.\nOld.'),
        ('"Lyon"', "", '"Lyon"'),
    ],
)
def test_contents_begin_with_a_title_only_if_their_first_line_is_in_quotes(
    tmp_path: Path, contents: str, title: str, text: str
) -> None:
    assert read(put(tmp_path / "c.jsonl", lines([{"id": 0, "contents": contents}]))) == (
        [Passage("0", title, text)],
        [],
    )


def test_kilt_is_read_as_hugging_face_has_it_and_what_is_no_paragraph_is_counted_not_rejected(tmp_path: Path) -> None:
    page = {"kilt_id": "7", "wikipedia_id": "7", "wikipedia_title": "Lyon",
            "text": {"paragraph": ["Lyon\n", "Section::::Sights.\n", " \n", f"{LYON}\n"]}}  # fmt: skip
    reading = Reading()
    assert read(put(tmp_path / "c.parquet", parquet([page])), reading=reading) == ([Passage("7:3", "Lyon", LYON)], [])
    assert reading.skipped == {"heading": 2, "empty paragraph": 1}


def test_a_first_paragraph_that_is_not_the_title_and_paragraphs_that_are_no_text_are_no_headings(
    tmp_path: Path,
) -> None:
    page = {"_id": 7, "wikipedia_title": "Lyon", "text": [LYON, None, "a\0b", 5, OSLO]}
    passages, rejects = read(put(tmp_path / "c.jsonl", lines([page])))
    assert passages == [Passage("7:0", "Lyon", LYON), Passage("7:4", "Lyon", OSLO)]
    assert [reason for _, reason in rejects] == [
        "missing text item 1", "NUL character: in text item 2", "wrong type: text item 3 is int, expected a string",
    ]  # fmt: skip


@pytest.mark.parametrize(
    "context",
    [
        [["Lyon", [LYON]], ["Oslo", [OSLO]]],
        [{"title": "Lyon", "sentences": [LYON]}, {"title": "Oslo", "content": [OSLO]}],
        {"title": ["Lyon", "Oslo"], "sentences": [[LYON], [OSLO]]},
    ],
)
def test_contexts_of_hotpotqa_and_2wiki_are_passages_by_their_titles(tmp_path: Path, context: Any) -> None:
    rows = [{"_id": "q", "question": "q?", "context": context}]
    assert read(put(tmp_path / "c.json", json.dumps(rows))) == (
        [Passage("Lyon", "Lyon", LYON), Passage("Oslo", "Oslo", OSLO)],
        [],
    )


def test_a_passage_that_comes_again_with_another_question_is_skipped_and_another_text_of_its_title_rejected(
    tmp_path: Path,
) -> None:
    def question(*pairs: tuple[str, str]) -> dict[str, Any]:
        return {"question": "q?", "context": [[title, [text]] for title, text in pairs]}

    train = put(tmp_path / "train.jsonl", lines([question(("Lyon", LYON)), question(("Lyon", LYON), ("Oslo", OSLO))]))
    dev = put(tmp_path / "dev.json", json.dumps([question(("Oslo", OSLO), ("Lyon", "another"))]))
    manifest = write_corpus([train, dev], tmp_path / "out", CorpusConfig(max_rejects_share=1))
    assert [passage.id for passage in Corpus.open(tmp_path / "out").iter_passages()] == ["Lyon", "Oslo"]
    assert manifest.details["skipped_by_reason"] == {"passage of an earlier question": 2}
    assert manifest.details["rejects_by_reason"] == {"duplicate id": 1}


@pytest.mark.parametrize(
    ("context", "reason"),
    [
        ([["Lyon"]], "wrong type: an item of context is no pair of a title and its sentences"),
        ([["Lyon", ["a", None]]], "wrong type: context item 2 is NoneType, expected a string"),
        ([["Lyon", 5]], "wrong type: context is int, expected a list of strings"),
        ([["", ["a"]]], "empty title"),
        ([["Lyon", []]], "empty context"),
    ],
)
def test_a_bad_context_is_rejected_and_the_others_read(tmp_path: Path, context: Any, reason: str) -> None:
    rows = [{"question": "q?", "context": [*context, ["Oslo", [OSLO]]]}]
    assert read(put(tmp_path / "c.jsonl", lines(rows))) == ([Passage("Oslo", "Oslo", OSLO)], [(1, reason)])


def test_the_id_of_a_squad_row_is_its_title_and_a_hash_of_its_context() -> None:
    mark = hashlib.sha256(OSLO.encode()).hexdigest()[:12]
    assert context_id("Oslo", OSLO) == f"Oslo-{mark}"
    assert context_id(None, OSLO) == context_id("", OSLO) == context_id(" ", OSLO) == f"passage-{mark}"
    assert context_id("Oslo", OSLO + ".") != context_id("Oslo", OSLO)


def test_squad_rows_under_data_are_rows_and_articles_are_articles(tmp_path: Path) -> None:
    row = {"id": "q", "title": "Lyon", "context": LYON, "question": "q?"}
    rows = put(tmp_path / "rows.json", json.dumps({"version": "0.1.0", "data": [row]}))
    articles = put(
        tmp_path / "articles.json", json.dumps({"data": [{"title": "Lyon", "paragraphs": [{"context": LYON}]}]})
    )
    assert read(rows)[0] == [Passage(context_id("Lyon", LYON), "Lyon", LYON)]
    assert read(articles)[0] == [Passage("Lyon#0", "Lyon", LYON)]


def test_where_two_layouts_fit_the_first_of_the_table_is_taken(tmp_path: Path) -> None:
    both = {"id": "1", "_id": "other", "title": "T", "text": "text", "contents": '"U"\ncontents'}
    assert read(put(tmp_path / "c.jsonl", lines([both]))) == ([Passage("1", "T", "text")], [])


def test_the_layout_of_most_rows_is_the_files_and_rows_of_another_are_rejected(tmp_path: Path) -> None:
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
        ("c.jsonl", '{"contents": "x", "ID": "1"}', r"the layout contents .* did you mean `id` for `ID`\?"),
        ("c.json", '[{"_id": "1", "Text": "x"}]', r"layout beir .* did you mean `text` for `Text`\?"),
        ("c.json", '{"id": "1", "txet": "x"}', r"did you mean `text` for `txet`\?"),
        ("c.jsonl", '{"title": "T", "text": "x"}', r"the layout id-text .* `id` is missing"),
        ("c.jsonl", '{"id": "1", "text": {"a": 1}}', r"`text` is dict here"),
        ("c.jsonl", '{"wikipedia_id": "1", "text": ["x"]}', r"layout kilt .* `wikipedia_title` is missing"),
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
def test_a_file_of_no_known_layout_is_refused_with_its_keys_and_the_nearest(
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
def test_a_named_format_that_the_content_is_not_is_refused_with_what_it_is(
    tmp_path: Path, format: CorpusFormat, content: str | bytes, message: str
) -> None:
    with pytest.raises(InputError, match=message):
        read(put(tmp_path / "c", content), format=format)


@pytest.mark.parametrize("format", ["jsonl", "parquet", "dpr-tsv", "json", "csv"])
def test_under_a_named_format_the_layout_is_recognised_all_the_same(tmp_path: Path, format: CorpusFormat) -> None:
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


def test_names_count_for_text_alone(tmp_path: Path) -> None:
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


def test_beirs_queries_named_outright_are_no_corpus_unless_the_format_is_named(tmp_path: Path) -> None:
    file = put(tmp_path / "queries.jsonl", '{"_id": "q", "text": "q?"}\n')
    with pytest.raises(InputError, match=r"queries\.jsonl is BEIR's queries by its name: give it as --questions"):
        read(file)
    assert read(file, format="jsonl")[0] == [Passage("q", "", "q?")]


def test_of_a_folder_records_are_read_before_text_and_text_before_files_without_suffix(tmp_path: Path) -> None:
    put(tmp_path / "AA/wiki_00", '{"id": "1", "text": "without suffix"}\n')
    assert [passage.text for passage in read(tmp_path)[0]] == ["without suffix"]
    put(tmp_path / "a.txt", "text")
    assert [passage.text for passage in read(tmp_path)[0]] == ["text"]
    put(tmp_path / "a.json", '[{"id": "1", "text": "record"}]')
    assert [passage.text for passage in read(tmp_path)[0]] == ["record"]


def test_a_json_list_is_streamed_and_what_is_broken_behind_is_told_when_it_is_reached(tmp_path: Path) -> None:
    item = json.dumps({"id": "1", "text": "x" * 1000})
    file = put(tmp_path / "c.json", "[" + ", ".join([item] * 5_000) + ', {"id": ')
    rows = read_rows([file])
    assert isinstance(next(rows), Row)
    with pytest.raises(InputError, match=r"c\.json is not JSON: item 5001: Expecting .* \(line 1\)"):
        list(rows)


@pytest.mark.parametrize(
    "content", ['[{}, "x"', '[{"id": 1} {', '{"a": {"text": "x"}', '{"a": "x"} x', '[{"id": ' + "9" * 5000]
)
def test_broken_json_is_refused_by_name(tmp_path: Path, content: str) -> None:
    with pytest.raises(InputError, match=r"c\.json is not JSON"):
        read(put(tmp_path / "c.json", content), format="json")


def test_a_long_object_of_records_is_streamed_too_and_a_value_without_end_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(json_file, "MAX_LINE_BYTES", 2000)
    monkeypatch.setattr(json_text, "CHUNK_BYTES", 100)
    long = "x" * 500
    data = {"version": "1", "data": [{"id": number, "text": long} for number in range(20)]}
    assert [passage.id for passage in read(put(tmp_path / "c.json", json.dumps(data)))[0]] == [
        str(n) for n in range(20)
    ]
    members = {f"d{number}": {"text": long} for number in range(20)}
    assert [passage.id for passage in read(put(tmp_path / "c.json", json.dumps(members)))[0]] == list(members)
    with pytest.raises(InputError, match=r"c\.json: item 2 is longer than .* characters"):
        read(put(tmp_path / "c.json", json.dumps([{"id": "1", "text": "y"}, {"id": "2", "text": "x" * 9000}])))


@pytest.mark.parametrize(
    ("row", "passage", "reason"),
    [
        ('{"_id": 123456789012345678901234567890, "text": "t"}', Passage("123456789012345678901234567890", "", "t"), ""),
        ('{"_id": NaN, "text": "t"}', None, "wrong type: _id is float, expected a string"),
        ('{"_id": "a", "_id": "b", "text": "t"}', Passage("b", "", "t"), ""),
        ('{"_id": "a", "text": "\\u0000"}', None, "NUL character: in text"),
        ('{"_id": "a", "text": "\\ud83d\\ude00"}', Passage("a", "", "😀"), ""),
        ('{"_id": "a", "text": "\\ud83d"}', None, "undecodable: text holds half of a surrogate pair"),
        ('{"_id": "a", "text": ["t"]}', None, "wrong type: text is list, expected a string"),
        ('{"_id": "a", "text": "t", "metadata": ' + "[" * 300 + "]" * 300 + "}", Passage("a", "", "t"), ""),
    ],
)  # fmt: skip
def test_hostile_rows_are_read_or_rejected_under_the_names_of_their_layout(
    tmp_path: Path, row: str, passage: Passage | None, reason: str
) -> None:
    good = ['{"_id": "1", "text": "good"}'] * 2
    passages, rejects = read(put(tmp_path / "c.jsonl", "\n".join([*good, row])))
    assert passages[2:] == ([passage] if passage else [])
    assert rejects == ([(3, reason)] if reason else [])


def test_a_csv_field_may_hold_commas_and_many_line_ends_and_a_stray_quote_costs_one_row(tmp_path: Path) -> None:
    long = "\n".join(f'line {number}, "quoted"' for number in range(500))
    file = put(tmp_path / "c.csv", table([{"id": "1", "text": long}, {"id": "2", "text": "two"}], ","))
    assert read(file) == ([Passage("1", "", long), Passage("2", "", "two")], [])
    file = put(tmp_path / "c.csv", 'id,text\n1,"open\n2,two\n3,three\n')
    passages, rejects = read(file)
    assert [passage.id for passage in passages] == ["2", "3"]
    assert rejects == [(2, "broken row: a quoted field does not end as it should")]
