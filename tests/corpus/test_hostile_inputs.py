"""Bad input, case by case: what is refused, with a message that names place and remedy, and what only looks bad.

Each table is a list of cases: a name, the file's content, and the expected result. `test_there_are_sixty_cases` counts
them.
"""

from __future__ import annotations

import gzip
import io
import json
import re
import tarfile
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from rag_core.corpus.corpus import Corpus, CorpusConfig, rejects_beside, write_corpus
from rag_core.corpus.formats import CorpusFormat
from rag_core.corpus.passages import Passage
from rag_core.embeddings.embeddings import EmbedConfig, Embeddings, embed_shard, shard_name
from rag_core.embeddings.text_encoder import TextEncoder
from rag_core.errors import ConfigError, InputError, RagError
from rag_core.index.passage_index import IndexConfig, PassageIndex, build_index
from rag_core.questions.questions import Question, read_questions
from rag_core.reading.contexts import check_questions
from rag_core.reading.prompt import PromptConfig
from rag_core.storage.artifact import publish
from tests.support.small_corpus import make_encoder

GOOD = '{"id": "good", "text": "fine"}\n'
REMEDY = re.compile(
    r"\b(Correct|Convert|Copy|Give|Unpack|Write|Make|Embed|Add|Rename|Choose|Name|Remove|Build|Shorten|Ask|Install|Run)\b"
    r"|[Cc]orrect the|or choose|--trust-remote-code"
)


@dataclass(frozen=True)
class Case:
    """A file and the expected result: passages, rejects (line and reason), or an error. Patterns are regexes."""

    name: str
    file: str
    content: bytes
    passages: tuple[tuple[str, str], ...] = ()
    rejects: tuple[tuple[int | None, str], ...] = ()
    error: str = ""
    format: CorpusFormat = "jsonl"

    def __str__(self) -> str:
        return self.name


def _zip(name: str) -> bytes:
    with zipfile.ZipFile(buffer := io.BytesIO(), "w") as archive:
        archive.writestr(name, GOOD)
    return buffer.getvalue()


def _tar(name: str, link: str = "") -> bytes:
    with tarfile.open(fileobj=(buffer := io.BytesIO()), mode="w") as archive:
        member = tarfile.TarInfo(name)
        member.type, member.linkname = (tarfile.SYMTYPE, link) if link else (tarfile.REGTYPE, "")
        member.size = 0 if link else len(GOOD)
        archive.addfile(member, io.BytesIO(GOOD.encode()))
    return buffer.getvalue()


def _parquet(**columns: Any) -> bytes:
    pq.write_table(pa.table(columns), buffer := io.BytesIO())
    return buffer.getvalue()


def _json(**record: Any) -> bytes:
    return json.dumps(record).encode()


def _with_good(line: bytes) -> bytes:
    return GOOD.encode() + line + b"\n"


WHOLE_PARQUET = _parquet(id=[str(n) for n in range(500)], text=[f"text number {n}" for n in range(500)])
SQUAD = json.dumps({"data": [{"title": "A", "paragraphs": [{"context": "c"}]}]})
THE_GOOD = (("good", "fine"),)

FILES = [
    Case("empty", "c.jsonl", b"", error=r"c\.jsonl: no passage found .* the input is empty"),
    Case("only line ends", "c.jsonl", b"\n\r\n\n", error=r"c\.jsonl: no passage found .* the input is empty"),
    Case("binary", "c.jsonl", bytes(range(256)) * 4, error=r"5 of 5 rows \(100\.0%\) were rejected.*line 1: broken"),
    Case("UTF-16", "c.jsonl", GOOD.encode("utf-16"), error=r"c\.jsonl is text in UTF-16; .*iconv -f UTF-16 -t UTF-8"),
    Case("UTF-16 without mark", "c.jsonl", GOOD.encode("utf-16-le"), error=r"c\.jsonl line 1: broken JSON"),
    Case("UTF-32", "c.jsonl", GOOD.encode("utf-32"), error=r"c\.jsonl is text in UTF-32; .*iconv -f UTF-32"),
    Case("Latin-1", "c.jsonl", _with_good(b'{"id": "x", "text": "caf\xe9"}'), THE_GOOD, ((2, "undecodable: byte 24"),)),
    Case("UTF-16 SQuAD", "c.json", SQUAD.encode("utf-16"), error=r"c\.json is text in UTF-16", format="squad"),
    Case("UTF-16 table", "c.tsv", "id\ttext\n".encode("utf-16"), error=r"c\.tsv is text in UTF-16", format="dpr-tsv"),
    Case("UTF-16 text", "c.txt", "one".encode("utf-16"), error=r"c\.txt is text in UTF-16", format="text"),
    Case("byte order mark", "c.jsonl", b"\xef\xbb\xbf" + GOOD.encode(), THE_GOOD),
    Case("byte order mark inside", "c.jsonl", _with_good(b"\xef\xbb\xbf{}"), THE_GOOD, ((2, "broken JSON"),)),
    Case("CRLF", "c.jsonl", GOOD.replace("\n", "\r\n").encode() * 1, THE_GOOD),
    Case("line of 100 MB", "c.jsonl", b'{"id": "x", "text": "' + b"x" * 10**8 + b'"}\n' + GOOD.encode(), THE_GOOD,
         ((1, "line too long: more than 16777216 bytes"),)),
    Case("text in one line of 100 MB", "c.txt", b"word " * (2 * 10**7), error=r"line 1: line too long", format="text"),
    Case("NUL bytes", "c.jsonl", _with_good(b"\0\0\0"), THE_GOOD, ((2, "broken JSON"),)),
    Case("NUL in a string", "c.jsonl", _with_good(_json(id="x", text="a\0b")), THE_GOOD, ((2, "NUL character: in text"),)),
    Case("lone surrogate", "c.jsonl", _with_good(b'{"id": "x", "text": "\\ud800"}'), THE_GOOD,
         ((2, "undecodable: text holds half of a surrogate pair"),)),
    Case("surrogate in UTF-8", "c.jsonl", _with_good(b'{"id": "x", "text": "\xed\xa0\x80"}'), THE_GOOD,
         ((2, "undecodable"),)),
    Case("surrogate pair", "c.jsonl", b'{"id": "x", "text": "\\ud83d\\ude00"}', (("x", "😀"),)),
    Case("object for a string", "c.jsonl", _with_good(_json(id="x", text={"a": 1})), THE_GOOD,
         ((2, "wrong type: text is dict, expected a string"),)),
    Case("list for an id", "c.jsonl", _with_good(_json(id=["x"], text="a")), THE_GOOD, ((2, "wrong type: id is list"),)),
    Case("nested too deeply", "c.jsonl", _with_good(b"[" * 10**5), THE_GOOD, ((2, "broken JSON"),)),
    Case("number of 5,000 digits", "c.jsonl", _with_good(b'{"id": ' + b"9" * 5000 + b"}"), THE_GOOD, ((2, "broken JSON"),)),
    Case("duplicate id", "c.jsonl", _with_good(_json(id="good", text="other")), THE_GOOD,
         ((2, r"duplicate id: 'good' was first read from .*c\.jsonl line 1"),)),
    Case("missing id", "c.jsonl", _with_good(_json(text="a")), THE_GOOD, ((2, "missing id"),)),
    Case("empty text", "c.jsonl", _with_good(_json(id="x", text=" ")), THE_GOOD, ((2, "empty text"),)),
    Case("path traversal in an id", "c.jsonl", _json(id="../../etc/passwd", text="a"), (("../../etc/passwd", "a"),)),
    Case("right to left", "c.jsonl", _json(id="ليون", text="ليون مدينة في فرنسا"), (("ليون", "ليون مدينة في فرنسا"),)),
    Case("Chinese", "c.jsonl", _json(id="里昂", text="里昂是法国的城市。"), (("里昂", "里昂是法国的城市。"),)),
    Case("Japanese text", "c.txt", "リヨンはフランスの都市です。".encode(), (("c.txt#0", "リヨンはフランスの都市です。"),), format="text"),
    Case("emoji", "c.jsonl", _json(id="👩‍🔬", text="👩‍🔬🇫🇷"), (("👩‍🔬", "👩‍🔬🇫🇷"),)),
    Case("line separator", "c.jsonl", '{"id": "x", "text": "a\u2028b\x85c"}'.encode(), (("x", "a\u2028b\x85c"),)),
    Case("one passage", "c.jsonl", GOOD.encode(), THE_GOOD),
    Case("gzip", "c.jsonl.gz", gzip.compress(GOOD.encode()), THE_GOOD),
    Case("gzip by another name", "c.jsonl", gzip.compress(GOOD.encode()), THE_GOOD),
    Case("gzip table", "c.tsv.gz", gzip.compress(b"id\ttext\ngood\tfine\n"), THE_GOOD, format="dpr-tsv"),
    Case("cut gzip", "c.jsonl.gz", gzip.compress(GOOD.encode() * 99)[:-20], error=r"gz is cut or damaged gzip .*`gzip -t`"),
    Case("gzip with a wrong checksum", "c.jsonl.gz", gzip.compress(GOOD.encode())[:-8] + b"x" * 8, error="damaged gzip"),
    Case("gzip bomb", "c.jsonl.gz", gzip.compress(b"0" * 2 * 10**8 + b"\n" + GOOD.encode(), 1), THE_GOOD,
         ((1, "line too long"),)),
    Case("zip", "c.jsonl", _zip("c.jsonl"), error=r"c\.jsonl is a zip archive; .*Unpack it"),
    Case("zip that leads outside", "c.jsonl", _zip("../../evil.jsonl"), error=r"c\.jsonl is a zip archive"),
    Case("tar that leads outside", "c.jsonl", _tar("../../evil.jsonl"), error=r"c\.jsonl is a tar archive; .*Unpack it"),
    Case("tar with a link outside", "c.json", _tar("a", "/etc/passwd"), error=r"c\.json is a tar archive", format="squad"),
    Case("bzip2", "c.txt", b"BZh91AY&SY\0\0", error=r"c\.txt is compressed with bzip2; .*Unpack it", format="text"),
    Case("gzip SQuAD", "c.json", gzip.compress(SQUAD.encode()), error=r"is compressed with gzip; .*Unpack", format="squad"),
    Case("not Parquet", "c.parquet", GOOD.encode(), error=r"c\.parquet cannot be read as Parquet after row 0", format="parquet"),
    Case("Parquet without text", "c.parquet", _parquet(id=["a"]), error="has the keys id; .*`text` is missing", format="parquet"),
    Case("Parquet with lists", "c.parquet", _parquet(id=["a", "good"], text=pa.array(["x", "fine"])), (("a", "x"), *THE_GOOD),
         format="parquet"),
    Case("Parquet with nulls", "c.parquet", _parquet(id=[None, "good"], text=["x", "fine"]), THE_GOOD, ((1, "missing id"),),
         format="parquet"),
    *(
        Case(f"Parquet cut at {share}%", "c.parquet", WHOLE_PARQUET[: len(WHOLE_PARQUET) * share // 100],
             error=r"c\.parquet cannot be read as Parquet after row \d+: .*Write the file again", format="parquet")
        for share in range(0, 100, 10)
    ),
    Case("table without header", "c.tsv", b"1\tone\n", error=r"c\.tsv line 1: a header .*Add the header", format="dpr-tsv"),
    Case("unclosed quote", "c.tsv", b'id\ttext\n1\t"open\ngood\tfine\n', THE_GOOD, ((2, "broken row"),), format="dpr-tsv"),
]  # fmt: skip


@pytest.mark.parametrize("case", FILES, ids=str)
def test_a_corpus_file(case: Case, tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    file, out = tmp_path / "in" / case.file, tmp_path / "out"
    file.write_bytes(case.content)
    config = CorpusConfig(format=case.format, max_rejects_share=1)
    if case.error:
        with pytest.raises(InputError, match=case.error) as caught:
            write_corpus([file], out, config)
        assert_place_and_remedy(caught.value, file)
        assert not out.exists()
    else:
        write_corpus([file], out, config)
        assert [(passage.id, passage.text) for passage in Corpus.open(out).iter_passages()] == list(case.passages)
        rejects = [json.loads(line) for line in (out / "rejects.jsonl").read_text(encoding="utf-8").splitlines()]
        assert [(reject["file"], reject["line"]) for reject in rejects] == [
            (str(file), line) for line, _ in case.rejects
        ]
        for reject, (_, reason) in zip(rejects, case.rejects, strict=True):
            assert re.match(reason, reject["reason"])
    others = {path.name for path in tmp_path.iterdir()} - {"in", "out", rejects_beside(out).name, ".out.lock"}
    assert others == set(), "nothing is written elsewhere"


def assert_place_and_remedy(error: Exception, *places: object) -> None:
    """Check that the message is one paragraph, names the places, and says what to do."""
    message = str(error)
    assert "\n" not in message.strip(), message
    for place in places:
        assert str(place) in message, f"{place} is not in: {message}"
    assert REMEDY.search(message), f"no remedy in: {message}"


QUESTIONS = [
    Case("no question", "q.jsonl", b"", error=r"q\.jsonl is empty or holds no question"),
    Case("UTF-16 questions", "q.jsonl", '{"question": "q"}'.encode("utf-16"), error=r"q\.jsonl is text in UTF-16; .*iconv"),
    Case("zipped questions", "q.json", _zip("q.json"), error=r"q\.json is a zip archive; .*Unpack"),
    Case("gzipped questions", "q.csv.gz", gzip.compress(b"q\t['a']\n"), (("1", "q"),)),
    Case("cut gzip of questions", "q.jsonl.gz", gzip.compress(b'{"question": "q"}')[:-9],
         error=r"q\.jsonl\.gz is cut or damaged gzip"),
    Case("binary questions", "q.jsonl", b"\xff\0" * 99, error=r"q\.jsonl line 1: undecodable.*Convert the file"),
    Case("answer that is empty", "q.jsonl", _json(question="q", answers=[""]), error=r"q\.jsonl line 1: empty answers"),
    Case("answer that is a space", "q.jsonl", _json(question="q", answers=[" "]), error=r"line 1: empty answers"),
    Case("answer that is an object", "q.jsonl", _json(question="q", answers=[{"a": 1}]), error="answers is dict"),
    Case("bytes among Python's answers", "q.csv", b"q\t{b'a': 1}\n", error=r"q\.csv line 1: the second column is not a list"),
    Case("bytes as an answer", "q.csv", b"q\t[b'a']\n", error=r"q\.csv line 1: .*answers"),
    Case("lone surrogate in a question", "q.jsonl", b'{"question": "\\udc00"}', error=r"line 1: undecodable"),
    Case("id that occurs twice", "q.jsonl", b'{"id": 1, "question": "q"}\n{"id": "1", "question": "r"}',
         error=r"q\.jsonl line 2: the id '1' was already used at .*line 1"),
    Case("questions nested too deeply", "q.json", b"[" * 10**5, error=r"q\.json: broken JSON"),
    Case("question in Hebrew", "q.jsonl", _json(question="איפה ליון?", answers=["צרפת"]), (("1", "איפה ליון?"),)),
    Case("question with emoji", "q.csv", "🇫🇷?\t['😀']\n".encode(), (("1", "🇫🇷?"),)),
    Case("questions with CRLF and mark", "q.jsonl", b'\xef\xbb\xbf{"question": "q"}\r\n', (("1", "q"),)),
]  # fmt: skip


@pytest.mark.parametrize("case", QUESTIONS, ids=str)
def test_a_question_file(case: Case, tmp_path: Path) -> None:
    file = tmp_path / case.file
    file.write_bytes(case.content)
    if case.error:
        with pytest.raises(InputError, match=case.error) as caught:
            read_questions(file)
        assert_place_and_remedy(caught.value, file)
    else:
        assert [(question.id, question.question) for question in read_questions(file)] == list(case.passages)


@dataclass(frozen=True)
class VectorCase:
    """The content of a shard of embeddings for the passages a, b and c, and the expected error."""

    name: str
    embedding: Callable[[], pa.Array]
    error: str
    id: tuple[str | None, ...] = ("a", "b", "c")

    def __str__(self) -> str:
        return self.name


def _vectors(**changed: float) -> Callable[[], pa.Array]:
    def make() -> pa.Array:
        vectors_ND = np.ones((3, 4), dtype=np.float32)
        for name, value in changed.items():
            vectors_ND[int(name[1:])] = value
        return _fixed(vectors_ND)

    return make


def _fixed(vectors_ND: np.ndarray) -> pa.Array:
    return pa.FixedSizeListArray.from_arrays(pa.array(vectors_ND.reshape(-1)), vectors_ND.shape[1])


ONES = np.ones((3, 4), dtype=np.float32)
VECTORS = [
    VectorCase("NaN", _vectors(r1=np.nan), r"row 2 \(id 'b'\): the vector is not finite"),
    VectorCase("infinity", _vectors(r2=-np.inf), r"row 3 \(id 'c'\): the vector is not finite"),
    VectorCase("zeros", _vectors(r0=0), r"row 1 \(id 'a'\): the vector is all zeros"),
    VectorCase("wrong dimension", lambda: _fixed(np.ones((3, 5), dtype=np.float32)), r"\[5\].*4 dimensions of float32"),
    VectorCase("wrong type", lambda: _fixed(ONES.astype(np.float64)), r"double.*4 dimensions of float32"),
    VectorCase("half precision", lambda: _fixed(ONES.astype(np.float16)), r"halffloat.*4 dimensions of float32"),
    VectorCase("lists of any length", lambda: pa.array(ONES.tolist()), r"list<.*4 dimensions of float32"),
    VectorCase("strings", lambda: pa.array(["x", "y", "z"]), r"embedding \(string\).*4 dimensions of float32"),
    VectorCase("missing vector", lambda: pa.array([[1.0] * 4, None, [1.0] * 4], pa.list_(pa.float32(), 4)),
               "cannot be read|is missing"),
    VectorCase("vector without id", _vectors(), r"rows 1 to 3: an id or a vector is missing", id=("a", None, "c")),
]  # fmt: skip


@pytest.mark.parametrize("case", VECTORS, ids=str)
def test_a_shard_of_embeddings(case: VectorCase, tmp_path: Path) -> None:
    with publish(tmp_path / "embeddings", "embeddings") as draft:
        shard = draft.folder / "embeddings-00000.parquet"
        pq.write_table(pa.table({"id": pa.array(case.id, pa.string()), "embedding": case.embedding()}), shard)
        draft.counts, draft.details = {"passages": 3}, {"dim": 4, "dtype": "float32"}
    with pytest.raises(RagError, match=case.error) as caught:
        list(Embeddings.open(tmp_path / "embeddings").iter_vectors())
    assert_place_and_remedy(caught.value, tmp_path / "embeddings" / "embeddings-00000.parquet")


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> TextEncoder:
    return TextEncoder.from_pretrained(make_encoder(tmp_path_factory.mktemp("models") / "encoder"))


def test_a_question_longer_than_the_limit_is_named_before_anything_is_read(encoder: TextEncoder) -> None:
    questions = [Question("q1", "who?"), Question("q2", "which river flows through Lyon " * 3)]
    prompt = PromptConfig(max_context_tokens=12)
    with pytest.raises(
        InputError, match=r"'q2' takes \d+ tokens .*max_context_tokens is 12 \(it begins 'which"
    ) as caught:
        check_questions(encoder.tokenizer, prompt, questions, "dev.jsonl", learnt=True)
    assert_place_and_remedy(caught.value, "dev.jsonl")
    check_questions(encoder.tokenizer, prompt, questions[:1], "dev.jsonl", learnt=True)


def test_an_answer_without_tokens_is_named_where_it_is_to_be_learnt(encoder: TextEncoder) -> None:
    questions = [Question("q1", "who?", ("Lyon",)), Question("q2", "who?", ("\u200d\x7f",))]
    with pytest.raises(InputError, match=r"train\.jsonl: question 'q2' has an answer without tokens") as caught:
        check_questions(encoder.tokenizer, PromptConfig(), questions, "train.jsonl", learnt=True)
    assert_place_and_remedy(caught.value, "train.jsonl")
    check_questions(encoder.tokenizer, PromptConfig(), questions, "test.jsonl", learnt=False)


def test_a_passage_longer_than_the_encoders_limit_is_embedded_by_what_fits(encoder: TextEncoder) -> None:
    beginning = "the river of Lyon is the Rhone . " * 20
    cut, short, long = encoder.encode([beginning, "the river of Lyon", beginning + "people live in Oslo " * 1000])
    np.testing.assert_array_equal(cut, long)
    assert np.isfinite(long).all()
    assert not np.array_equal(cut, short)


def test_a_corpus_of_one_passage_is_indexed_and_found_and_two_are_not(tmp_path: Path, encoder: TextEncoder) -> None:
    (tmp_path / "c.jsonl").write_text(GOOD)
    write_corpus([tmp_path / "c.jsonl"], tmp_path / "corpus", CorpusConfig(format="jsonl"))
    corpus = Corpus.open(tmp_path / "corpus")
    with publish(tmp_path / "vectors", "embeddings", made_from={"corpus": corpus.manifest.fingerprint}) as draft:
        embed_shard(encoder, corpus.shards[0], draft.folder / shard_name(0), EmbedConfig(encoder="e"))
        draft.counts["passages"] = 1
        draft.details = {"dim": 32, "dtype": "float32", "encoder": "e", "encoder_fingerprint": encoder.fingerprint()}
    build_index(Embeddings.open(tmp_path / "vectors"), corpus, tmp_path / "index", IndexConfig())
    index, queries_BD = PassageIndex.open(tmp_path / "index"), encoder.encode(["who?"])
    assert index.passages_of(index.search(queries_BD, 1).rows_BK) == [[Passage("good", "", "fine")]]
    with pytest.raises(ConfigError, match=r"2 passages .* holds 1\. Ask for 1 to 1\."):
        index.search(queries_BD, 2)


def test_there_are_sixty_cases() -> None:
    cases = [str(case) for table in (FILES, QUESTIONS, VECTORS) for case in table]
    assert len(set(cases)) == len(cases) >= 60


def test_a_passage_is_only_data_whatever_its_id(tmp_path: Path) -> None:
    ids = ["../../../tmp/x", "/etc/passwd", "a/b", "con", "-rf", "$(touch x)", "%s%n", "<script>", "'; drop table"]
    (tmp_path / "in.jsonl").write_text("".join(json.dumps({"id": id, "text": "t"}) + "\n" for id in ids))
    write_corpus([tmp_path / "in.jsonl"], tmp_path / "out", CorpusConfig(format="jsonl"))
    assert list(Corpus.open(tmp_path / "out").iter_passages()) == [Passage(id, "", "t") for id in ids]
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "manifest.json", "passages-00000.parquet", "rejects.jsonl",
    ]  # fmt: skip
