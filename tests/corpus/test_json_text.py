"""JSON read in pieces equals JSON parsed whole; broken JSON and values that are too long are refused when reached."""

from __future__ import annotations

import io
import json
import random
from pathlib import Path
from typing import Any

import pytest

from rag_core.corpus.formats.containers import json_text
from rag_core.corpus.formats.containers.json_text import BrokenJsonError, JsonText, TooLongError
from rag_core.errors import InputError
from tests.fuzz.mutations import mutate

RECORDS: list[Any] = [
    {"question": 'who "is" \\ it?', "answers": ["ü😀\u2028", "b"], "n": [1, -2.5e3, None, True, {"x": {}}]},
    {"question": "what?", "answer": "x" * 40, "s": "😀 \\u0041"},
    12345678901234567890,
    "text",
    [],
    {},
]


def items_of(content: bytes, path: Path) -> list[Any]:
    text = JsonText(path, io.BytesIO(content), 10**6)
    items = list(text.items())
    text.end()
    return items


@pytest.mark.parametrize("chunk", [1, 2, 3, 7, 64, 2**20])
@pytest.mark.parametrize("indent", [None, 1])
def test_a_list_read_in_pieces_of_any_size_is_the_list(
    chunk: int, indent: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(json_text, "CHUNK_BYTES", chunk)
    for ascii_only in (True, False):
        content = json.dumps(RECORDS, indent=indent, ensure_ascii=ascii_only).encode()
        assert items_of(b"\xef\xbb\xbf" + content + b" \n", Path("q.json")) == RECORDS


def test_damaged_lists_are_read_or_refused_exactly_as_by_a_parser_of_whole_files(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    samples = [json.dumps(RECORDS).encode(), json.dumps(RECORDS[:2], indent=1).encode()]
    monkeypatch.setattr(json_text, "CHUNK_BYTES", 5)
    counts = {"read": 0, "refused": 0}
    for number in range(1500):
        data = mutate(random.Random(number), samples)
        try:
            whole = json.loads(data.decode("utf-8-sig"))
        except (ValueError, RecursionError):
            whole = None
        if whole is not None and not isinstance(whole, list):
            continue
        try:
            pieces = items_of(data, Path("q.json"))
        except InputError:
            pieces = None
        assert json.dumps(pieces) == json.dumps(whole), data
        counts["refused" if pieces is None else "read"] += 1
    assert min(counts.values()) > 50


class Counted(io.BytesIO):
    """A file that counts how often it is read."""

    reads = 0

    def read(self, size: int | None = -1) -> bytes:
        self.reads += 1
        return super().read(size)


def members_of(content: bytes) -> dict[str, Any]:
    text = JsonText(Path("q.json"), io.BytesIO(content), 10**6)
    members = {name: text.value() for name in text.names()}
    text.end()
    return members


@pytest.mark.parametrize("chunk", [1, 3, 64])
def test_an_object_read_in_pieces_of_any_size_is_the_object(chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(json_text, "CHUNK_BYTES", chunk)
    value = {f'name "{number}" \\ ü': record for number, record in enumerate(RECORDS)}
    for content in (json.dumps(value), json.dumps(value, indent=1, ensure_ascii=False), "{}", " { } "):
        assert members_of(content.encode()) == json.loads(content)


@pytest.mark.parametrize(
    "content", [b"{1: 2}", b'{"a" 1}', b'{"a": 1,}', b'{"a": 1', b'{"a": 1} 2', b'{["a"]: 1}', b"[]"]
)
def test_a_text_that_is_not_an_object_is_refused(content: bytes) -> None:
    with pytest.raises(BrokenJsonError, match=r"^q\.json line 1: broken JSON \(.*\. Correct the file\.$"):
        members_of(content)


def test_values_in_a_row_are_read_one_by_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(json_text, "CHUNK_BYTES", 3)
    content = "\n".join(json.dumps(record) for record in RECORDS)
    assert list(JsonText(Path("q.json"), io.BytesIO(content.encode()), 10**6).values()) == RECORDS


def test_broken_json_is_refused_at_once_with_its_line_and_item_whatever_follows() -> None:
    content = b'[{"a": 1},\n{"a" 2}' + b"]}, \n" * 10**6
    text = JsonText(Path("q.json"), file := io.BytesIO(content), 10**8)
    with pytest.raises(BrokenJsonError, match="line 2: broken JSON") as caught:
        list(text.items())
    assert (caught.value.within, caught.value.fault) == ("item 2", "Expecting ':' delimiter (line 2)")
    assert file.tell() == json_text.CHUNK_BYTES


def test_a_long_value_is_read_with_twice_the_text_each_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(json_text, "CHUNK_BYTES", 100)
    content = json.dumps(["x" * 10**6]).encode()
    assert list(JsonText(Path("q.json"), file := Counted(content), 10**7).items()) == ["x" * 10**6]
    assert file.reads < 20


def test_a_value_beyond_the_bound_is_refused_with_its_line_and_beginning(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(json_text, "CHUNK_BYTES", 100)
    content = json.dumps(["short", "\n", "yyy" + "x" * 10**6], indent=1).encode()
    with pytest.raises(
        TooLongError, match=r"^q\.json line 4: broken JSON \(a single value of .* 500 .*yyyxxx"
    ) as caught:
        list(JsonText(Path("q.json"), file := io.BytesIO(content), 500).items())
    assert caught.value.within == "item 3"
    assert file.tell() < 2000
