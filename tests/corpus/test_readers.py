"""Corpus readers: which passages come through unchanged, which rows are rejected, and which files are refused."""

from __future__ import annotations

import csv
import json
import random
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from rag_core.corpus.formats import CorpusFormat, Reject, read_passages, rows
from rag_core.corpus.formats import squad as squad_reader
from rag_core.corpus.formats.containers import delimited
from rag_core.corpus.formats.text import split_text
from rag_core.corpus.passages import Passage
from rag_core.errors import ConfigError, InputError


def read(path: Path, format: CorpusFormat, **options: int) -> tuple[list[Passage], list[Reject]]:
    results = list(read_passages([path], format, **options))
    return [r for r in results if isinstance(r, Passage)], [r for r in results if isinstance(r, Reject)]


def put(path: Path, content: str | bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def squad(*articles: tuple[str, list[Any]]) -> str:
    return json.dumps({"data": [{"title": title, "paragraphs": paragraphs} for title, paragraphs in articles]})


def test_jsonl_passages_come_through_with_integer_ids_as_strings_and_title_optional(tmp_path: Path) -> None:
    file = put(tmp_path / "c.jsonl", '{"id": 7, "text": " Zoë\\n", "other": 1}\n\n{"id":"x","title":"T","text":"t"}')
    assert read(file, "jsonl") == ([Passage("7", "", " Zoë\n"), Passage("x", "T", "t")], [])


def test_byte_order_marks_and_windows_line_ends_are_not_content(tmp_path: Path) -> None:
    file = put(tmp_path / "c.jsonl", b'\xef\xbb\xbf{"id":"a","text":"1"}\r\n{"id":"b","text":"2"}\r\n')
    assert read(file, "jsonl") == ([Passage("a", "", "1"), Passage("b", "", "2")], [])
    file = put(tmp_path / "c.tsv", b"\xef\xbb\xbfid\ttext\ttitle\r\n1\tone\tT\r\n")
    assert read(file, "dpr-tsv") == ([Passage("1", "T", "one")], [])
    file = put(tmp_path / "c.txt", b"\xef\xbb\xbfone\r\ntwo\r\n")
    assert read(file, "text") == ([Passage("c.txt#0", "c", "one\ntwo")], [])


@pytest.mark.parametrize(
    ("line", "category"),
    [
        (b'{"id": "a", "text": "caf\xe9"}', "undecodable"),
        (b'{"id": "a", "text": "cut', "broken JSON"),
        (b"[" * 100_000, "broken JSON"),
        (b'{"id": ' + b"9" * 5000 + b', "text": "t"}', "broken JSON"),
        (b'["a", "t"]', "wrong type"),
        (b'{"id": "a"}', "missing text"),
        (b'{"id": "a", "text": null}', "missing text"),
        (b'{"text": "t"}', "missing id"),
        (b'{"id": "a", "text": " \\n"}', "empty text"),
        (b'{"id": "", "text": "t"}', "empty id"),
        (b'{"id": "a", "text": 5}', "wrong type"),
        (b'{"id": true, "text": "t"}', "wrong type"),
        (b'{"id": 1.5, "text": "t"}', "wrong type"),
        (b'{"id": "a", "text": "t", "title": ["x"]}', "wrong type"),
        (b'{"id": "a", "text": "nul\\u0000"}', "NUL character"),
        (b'{"id": "a", "text": "half \\ud800"}', "undecodable"),
    ],
)
def test_a_bad_jsonl_line_is_rejected_with_file_and_line_and_reading_goes_on(
    tmp_path: Path, line: bytes, category: str
) -> None:
    file = put(tmp_path / "c.jsonl", b'{"id":"1","text":"one"}\n' + line + b'\n{"id":"3","text":"three"}\n')
    passages, rejects = read(file, "jsonl")
    assert [passage.id for passage in passages] == ["1", "3"]
    assert [(reject.file, reject.line, reject.category) for reject in rejects] == [(str(file), 2, category)]
    assert 0 < len(rejects[0].found) <= 200
    assert rejects[0].found[:5] == line[:5].decode()
    rejects[0].found.encode()


def test_an_endless_line_is_rejected_and_the_next_one_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rows, "MAX_LINE_BYTES", 100)
    content = '{"id":"1","text":"' + "x" * 1000 + '"}\n{"id":"2","text":"two"}\n'
    passages, rejects = read(put(tmp_path / "c.jsonl", content), "jsonl")
    assert ([p.id for p in passages], [(r.line, r.category) for r in rejects]) == (["2"], [(1, "line too long")])


def test_dpr_tsv_reads_back_what_a_csv_writer_wrote(tmp_path: Path) -> None:
    texts = ["plain", 'he said "hi"', '"quoted"', "tab\there", "two\nlines", '"', 'odd " one', "back\\slash", "it's"]
    path = tmp_path / "psgs_w100.tsv"
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, delimiter="\t")
        writer.writerow(["id", "text", "title"])
        writer.writerows([number, text, f'T "{number}"'] for number, text in enumerate(texts, 1))
    expected = [Passage(str(number), f'T "{number}"', text) for number, text in enumerate(texts, 1)]
    assert read(path, "dpr-tsv") == (expected, [])


def test_dpr_tsv_takes_fields_longer_than_the_csv_modules_default_limit(tmp_path: Path) -> None:
    long = 'a "b" ' * 50_000
    quoted = long.replace('"', '""')
    file = put(tmp_path / "c.tsv", f'id\ttext\ttitle\n1\t"{quoted}"\tT\n')
    assert read(file, "dpr-tsv") == ([Passage("1", "T", long)], [])


def test_a_stray_quote_in_dpr_tsv_costs_one_line_and_not_the_rest_of_the_file(tmp_path: Path) -> None:
    good = [f"{number}\ttext {number}\tT" for number in range(2, 300)]
    file = put(tmp_path / "c.tsv", "\n".join(["id\ttext\ttitle", '1\t"open\tT', *good, '300\t"open\tT']))
    passages, rejects = read(file, "dpr-tsv")
    assert [passage.id for passage in passages] == [str(number) for number in range(2, 300)]
    assert [(reject.line, reject.category) for reject in rejects] == [(2, "broken row"), (301, "broken row")]


def test_two_stray_quotes_in_dpr_tsv_do_not_fuse_the_rows_between_them(tmp_path: Path) -> None:
    file = put(tmp_path / "c.tsv", 'id\ttext\ttitle\n1\t"begins here\tT\n2\tbetween\tT\n3\tends here"\tT\n')
    passages, rejects = read(file, "dpr-tsv")
    assert [passage.text for passage in passages] == ["between", 'ends here"']
    assert [(reject.line, reject.category) for reject in rejects] == [(2, "broken row")]


def test_an_unclosed_quote_in_dpr_tsv_looks_only_some_lines_ahead(tmp_path: Path) -> None:
    after = delimited.MAX_ROW_LINES + 50
    file = put(tmp_path / "c.tsv", 'id\ttext\ttitle\n1\t"open\tT\n' + "x\n" * after + 'shut"\tT\n')
    passages, rejects = read(file, "dpr-tsv")
    assert (passages, [reject.line for reject in rejects]) == ([], list(range(2, after + 4)))


@pytest.mark.parametrize(
    ("line", "category"),
    [
        (b"2\tonly two", "broken row"),
        (b"2\ta\tb\tc", "broken row"),
        (b'2\t"shut" early\tT', "broken row"),
        (b"2\tcaf\xe9\tT", "undecodable"),
        (b"2\t \tT", "empty text"),
        (b"\ttext\tT", "empty id"),
        (b"2\tnul\x00\tT", "NUL character"),
    ],
)
def test_a_bad_dpr_row_is_rejected_with_its_line(tmp_path: Path, line: bytes, category: str) -> None:
    file = put(tmp_path / "c.tsv", b"id\ttext\ttitle\n1\tone\tT\n" + line + b"\n3\tthree\tT\n")
    passages, rejects = read(file, "dpr-tsv")
    assert [passage.id for passage in passages] == ["1", "3"]
    assert [(reject.line, reject.category) for reject in rejects] == [(3, category)]


@pytest.mark.parametrize("content", ["", "1\tone\tT\n", "id,text,title\n1,one,T\n", b"\x7fELF\x02\x00\xff\n"])
def test_a_tsv_without_header_is_refused_by_name(tmp_path: Path, content: str | bytes) -> None:
    file = put(tmp_path / "c.tsv", content)
    with pytest.raises(InputError, match=r"c\.tsv line 1: a header .* id, text and title was expected, found"):
        read(file, "dpr-tsv")


def test_parquet_reads_every_string_type_and_integer_ids(tmp_path: Path) -> None:
    for number, kind in enumerate(
        [pa.string(), pa.large_string(), pa.dictionary(pa.int32(), pa.string()), pa.binary()]
    ):
        text = pa.array(["one", "zwölf"]).cast(kind)
        table = pa.table({"vector": [[1.0], [2.0]], "text": text, "id": [10**12, 2], "title": ["T", None]})
        pq.write_table(table, tmp_path / f"{number}.parquet")
        expected = [Passage("1000000000000", "T", "one"), Passage("2", "", "zwölf")]
        assert read(tmp_path / f"{number}.parquet", "parquet") == (expected, [])


@pytest.mark.parametrize("dictionary", [False, True])
def test_a_bad_parquet_row_is_rejected_with_its_row_across_batches(tmp_path: Path, dictionary: bool) -> None:
    binary = pa.array([b"ok", b"caf\xe9", b" "], pa.binary())
    values = pa.Array.from_buffers(pa.string(), len(binary), binary.buffers())
    codes = pa.array([1] + [0] * 1499 + [None] + [0] * 1498 + [2], pa.int32())
    broken = pa.DictionaryArray.from_arrays(codes, values) if dictionary else values.take(codes)
    pq.write_table(pa.table({"id": [str(n) for n in range(3000)], "text": broken}), tmp_path / "c.parquet")
    passages, rejects = read(tmp_path / "c.parquet", "parquet")
    assert len(passages) == 2997
    assert [(r.line, r.category) for r in rejects] == [(1, "undecodable"), (1501, "missing text"), (3000, "empty text")]


def test_parquet_values_that_are_no_text_are_rejected(tmp_path: Path) -> None:
    pq.write_table(pa.table({"id": ["a"], "text": [5]}), tmp_path / "c.parquet")
    passages, rejects = read(tmp_path / "c.parquet", "parquet")
    assert (passages, [(r.line, r.category) for r in rejects]) == ([], [(1, "wrong type")])


def test_a_missing_parquet_column_is_named_with_the_columns_found(tmp_path: Path) -> None:
    pq.write_table(pa.table({"id": ["a"], "body": ["x"]}), tmp_path / "c.parquet")
    with pytest.raises(InputError, match=r"c\.parquet \(Parquet\) has the keys id, body; .*`text` is missing"):
        read(tmp_path / "c.parquet", "parquet")


def test_two_parquet_columns_with_the_same_name_are_refused_if_they_are_read(tmp_path: Path) -> None:
    columns = [pa.array(["a"]), pa.array(["x"]), pa.array([0.5]), pa.array([0.5])]
    pq.write_table(pa.table(columns, names=["id", "text", "vector", "vector"]), tmp_path / "c.parquet")
    assert read(tmp_path / "c.parquet", "parquet") == ([Passage("a", "", "x")], [])
    pq.write_table(pa.table(columns, names=["id", "text", "text", "vector"]), tmp_path / "c.parquet")
    with pytest.raises(
        InputError, match=r"c\.parquet has two columns with the same name among id, text, text\. Rename"
    ):
        read(tmp_path / "c.parquet", "parquet")


@pytest.mark.parametrize("between", [",", "\t"])
def test_two_columns_with_the_same_name_in_a_table_are_refused_if_they_are_read(between: str, tmp_path: Path) -> None:
    def table(*rows: str) -> Path:
        return put(tmp_path / "c.csv", "".join(row.replace(",", between) + "\n" for row in rows))

    assert read(table("id,text,vector,vector", "a,x,1,2"), "csv") == ([Passage("a", "", "x")], [])
    assert read(table("id,text,,", "a,x,,"), "csv") == ([Passage("a", "", "x")], [])
    with pytest.raises(InputError, match=r"c\.csv line 1: two columns with the same name \(text\)\. Rename"):
        read(table("id,text,text", "a,x,y"), "csv")


@pytest.mark.parametrize("content", [b"", b"no parquet at all", b"PAR1 cut"])
def test_a_file_that_is_not_parquet_is_refused_by_name(tmp_path: Path, content: bytes) -> None:
    with pytest.raises(InputError, match=r"c\.parquet cannot be read as Parquet"):
        read(put(tmp_path / "c.parquet", content), "parquet")


def test_a_bad_squad_paragraph_is_rejected_and_the_ids_of_the_others_stay(tmp_path: Path) -> None:
    file = put(tmp_path / "s.json", squad(("A", [{"context": "a"}, {"context": ""}, "no object", {"context": "d"}])))
    passages, rejects = read(file, "squad")
    assert [passage.id for passage in passages] == ["A#0", "A#3"]
    assert [(reject.category, reject.found[:3]) for reject in rejects] == [
        ("empty text", "A#1"),
        ("missing text", "A#2"),
    ]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "is not JSON"),
        (b'{"data": "\xff"}', "is not JSON"),
        ("[]", "found list"),
        ('{"articles": []}', "keys \\['articles'\\]"),
        ('{"data": [{"title": "A"}]}', "article 1: expected an object"),
        ('{"data": [{"title": 5, "paragraphs": []}]}', "article 1: expected an object"),
    ],
)
def test_json_that_is_not_squad_is_refused_by_name(tmp_path: Path, content: str | bytes, message: str) -> None:
    with pytest.raises(InputError, match=rf"s\.json .*{message}"):
        read(put(tmp_path / "s.json", content), "squad")


def test_squad_articles_without_a_unique_title_get_numbered_ids_and_the_others_keep_theirs(
    tmp_path: Path,
) -> None:
    titles = ["A", "B", "A", "", None, "A-3", " ", "Zoë"]
    articles = [{"title": title, "paragraphs": [{"context": "c"}] * 2} for title in titles]
    del articles[4]["title"]
    passages, rejects = read(put(tmp_path / "s.json", json.dumps({"data": articles})), "squad")
    names = ["A-1", "B", "A-3-3", "article-4", "article-5", "A-3", "article-7", "Zoë"]
    assert [passage.id for passage in passages] == [f"{name}#{index}" for name in names for index in (0, 1)]
    assert [passage.title for passage in passages[::2]] == ["A", "B", "A", "", "", "A-3", "", "Zoë"]
    assert rejects == []


def test_a_squad_file_above_the_size_limit_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = put(tmp_path / "s.json", squad(("A", [{"context": "a"}])))
    monkeypatch.setattr(squad_reader, "MAX_BYTES", 10)
    with pytest.raises(
        InputError, match=r"s\.json has 60 bytes; SQuAD JSON is read whole, so at most 10 were expected"
    ):
        read(file, "squad")


def test_text_ids_come_from_relative_paths_and_titles_from_headings_or_file_names(tmp_path: Path) -> None:
    put(tmp_path / "b.txt", "# no heading in plain text")
    put(tmp_path / "sub/a.md", "```sh\n# a comment\n```\nintro\n\n## The *title* ##\nbody")
    put(tmp_path / "sub/untitled.MD", "just text")
    put(tmp_path / "sub/notes.rst", "not read")
    put(tmp_path / ".git/x.md", "not read")
    passages, rejects = read(tmp_path, "text")
    ids = [("b.txt#0", "b"), ("sub/a.md#0", "The *title*"), ("sub/untitled.MD#0", "untitled")]
    assert ([(passage.id, passage.title) for passage in passages], rejects) == (ids, [])


def test_splitting_keeps_every_word_in_order_within_the_limit() -> None:
    rng = random.Random(0)
    for _ in range(300):
        gaps = [" ", "  ", "\n", "\n\n", " \n \n", ". ", "! ", ".\n\n", '." ', "\t"]
        text = "".join(f"w{n}{rng.choice(gaps)}" for n in range(rng.randrange(60)))
        limit = rng.randint(1, 12)
        passages = split_text(text, limit)
        assert [word for passage in passages for word in passage.split()] == text.split()
        assert all(1 <= len(passage.split()) <= limit for passage in passages)
        assert all(passage in text and passage == passage.strip() for passage in passages)


def test_splitting_cuts_at_paragraphs_then_sentences_then_words() -> None:
    assert split_text("a b c d\n\ne f g h", 6) == ["a b c d", "e f g h"]
    assert split_text("a b c\n\nd e. f g", 6) == ["a b c", "d e. f g"]
    assert split_text("a b\n\nc d", 6) == ["a b\n\nc d"]
    assert split_text("Title\n\nOne two three. Four five six.", 5) == ["Title\n\nOne two three.", "Four five six."]
    assert split_text("a b c d e. f", 4) == ["a b c d", "e. f"]


def test_bad_text_lines_and_empty_files_are_rejected_and_the_text_around_kept(tmp_path: Path) -> None:
    file = put(tmp_path / "c.txt", b"one\ncaf\xe9\nnul\x00\nfour")
    passages, rejects = read(file, "text")
    assert [passage.text for passage in passages] == ["one\nfour"]
    assert [(reject.line, reject.category) for reject in rejects] == [(2, "undecodable"), (3, "NUL character")]
    passages, rejects = read(put(tmp_path / "c.txt", "\n \n"), "text")
    assert (passages, [reject.category for reject in rejects]) == ([], ["empty text"])


def test_equal_names_in_two_text_sources_are_refused_since_ids_would_clash(tmp_path: Path) -> None:
    sources = [put(tmp_path / "x/n.txt", "1"), put(tmp_path / "y/n.txt", "2")]
    with pytest.raises(InputError, match=r"x/n\.txt and .*y/n\.txt would both"):
        read_passages(sources, "text")


def test_a_folder_means_its_files_with_the_formats_suffix_sorted_by_name(tmp_path: Path) -> None:
    for name in ("b", "a", "sub/c"):
        put(tmp_path / f"{name}.jsonl", json.dumps({"id": name, "text": "t"}))
    put(tmp_path / "d.json", "{")
    assert [passage.id for passage in read(tmp_path, "jsonl")[0]] == ["a", "b", "sub/c"]


@pytest.mark.parametrize("format", ["auto", "jsonl", "json", "dpr-tsv", "csv", "parquet", "squad", "text"])
def test_missing_sources_and_folders_without_fitting_files_are_refused_by_name(
    tmp_path: Path, format: CorpusFormat
) -> None:
    with pytest.raises(InputError, match=r"nowhere does not exist"):
        read_passages([tmp_path / "nowhere"], format)
    put(tmp_path / "picture.jpg", "x")
    with pytest.raises(InputError, match=rf"{tmp_path.name} holds no \.\w+ "):
        read_passages([tmp_path], format)
    with pytest.raises(InputError, match="No source"):
        read_passages([], format)


def test_a_pdf_an_unknown_format_and_passages_of_no_words_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"paper\.pdf is not a \.txt or \.md file"):
        read_passages([put(tmp_path / "paper.pdf", "%PDF")], "text")
    with pytest.raises(
        ConfigError, match="'xml' is unknown; the known ones are auto, jsonl, json, dpr-tsv, csv, parquet, squad, text"
    ):
        read_passages([tmp_path], "xml")  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="words_per_passage is 0"):
        read_passages([put(tmp_path / "c.txt", "x")], "text", words_per_passage=0)
