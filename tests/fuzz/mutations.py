"""Damage valid samples: cut, flip and splice bytes, and insert values that parsers are known to fail on.

Every choice is drawn from one `random.Random`. With a seeded one, the code makes a hundred thousand inputs a minute,
each reproducible from its number. With `st.randoms(use_true_random=False)`, Hypothesis can shrink the input.
"""

from __future__ import annotations

import contextlib
import json
import random
from collections.abc import Callable, Sequence
from typing import Any

NASTY = (
    b"\xef\xbb\xbf",
    b"\xff\xfe",
    b"\x00",
    b"\xff",
    b"\xc3",
    b"\xed\xa0\x80",
    b"\xe2\x80\xa8",
    b"\xc2\x85",
    b"\r",
    b"\r\n",
    b"\n",
    b"\n\n",
    b"\t",
    b'"',
    b'""',
    b"'",
    b"\\",
    b"\\u0000",
    b"\\ud800",
    b"\\udfff",
    b"{",
    b"}",
    b"[",
    b"]",
    b",",
    b":",
    b"[" * 200,
    b'{"a":' * 200,
    b"null",
    b"true",
    b"NaN",
    b"-Infinity",
    b"1e999999",
    b"-0.0",
    b"-1",
    b"9" * 400,
    b"9" * 5000,
    b"0x1f",
    b"1.5",
    b"[]",
    b"{}",
    b'{"id": "a", "id": 2}',
    b'["a", {"b": null}]',
    b"\xf0\x9f\x98\x80",
    b"\xd8\xa7\xd9\x84",
    b"../../etc/passwd",
    b"/dev/null",
    b"a" * 1000,
    b"&a [*a]",
    b"!!python/object/apply:os.system [x]",
    b"!!timestamp 2001-99-99",
    b"2001-99-99",
    b"!!int x",
    b"<<: *a",
    b"? ",
    b"# ",
    b"```",
    b"__class__",
    b"\x7f\xff\xff\xff",
    b"\xff\xff\xff\x7f",
    b"\xff\xff\xff\xff\xff\xff\xff\xff",
    b"\x80\x00\x00\x00\x00\x00\x00\x00",
)
# Replacements for values in JSON that stays well-formed.
NASTY_VALUES: tuple[Any, ...] = (
    None, True, 0, -1, 1.5, 2**63, 10**400, float("nan"), float("inf"), "", " ", "\0", "\ud800", "\ufeff", "é😀", "x" * 300,
    "../../x", [], {}, [[]], [None], ["a", 1], [{}], {"": None}, {"id": "a"}, {"text": ["x"]}, {"bytes": -1, "sha256": ""},
)  # fmt: skip
# A longer input would test the disk more than the reader.
MOST_BYTES = 500_000

Operation = Callable[[random.Random, bytearray, Sequence[bytes]], None]


def mutate(rng: random.Random, samples: Sequence[bytes]) -> bytes:
    """Apply one to four operations to one of the samples."""
    data = bytearray(rng.choice(samples))
    for _ in range(rng.choice((1, 1, 1, 2, 2, 3, 4))):
        rng.choice(OPERATIONS)(rng, data, samples)
    return bytes(data[:MOST_BYTES])


def numbered(seed: int, number: int, samples: Sequence[bytes]) -> bytes:
    """Input `number` of a seed; it does not depend on earlier inputs."""
    return mutate(random.Random(seed << 32 | number), samples)


def _slice(rng: random.Random, data: bytearray) -> tuple[int, int]:
    start = rng.randrange(len(data) + 1)
    return start, min(len(data), start + rng.choice((1, 1, 2, 4, 8, 30, 200)))


def _flip_bits(rng: random.Random, data: bytearray, samples: Sequence[bytes]) -> None:
    for _ in range(rng.choice((1, 1, 2, 8))):
        if data:
            data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)


def _set_byte(rng: random.Random, data: bytearray, samples: Sequence[bytes]) -> None:
    if data:
        data[rng.randrange(len(data))] = rng.choice((0, 1, 0x7F, 0x80, 0xFF, 0x22, 0x0A, 0x09, rng.randrange(256)))


def _cut(rng: random.Random, data: bytearray, samples: Sequence[bytes]) -> None:
    del data[rng.randrange(len(data) + 1) :]


def _cut_front(rng: random.Random, data: bytearray, samples: Sequence[bytes]) -> None:
    del data[: rng.randrange(len(data) + 1)]


def _drop(rng: random.Random, data: bytearray, samples: Sequence[bytes]) -> None:
    start, end = _slice(rng, data)
    del data[start:end]


def _repeat(rng: random.Random, data: bytearray, samples: Sequence[bytes]) -> None:
    start, end = _slice(rng, data)
    data[start:start] = data[start:end] * rng.choice((1, 2, 50))


def _insert(rng: random.Random, data: bytearray, samples: Sequence[bytes]) -> None:
    start = rng.randrange(len(data) + 1)
    data[start:start] = rng.choice(NASTY)


def _replace(rng: random.Random, data: bytearray, samples: Sequence[bytes]) -> None:
    start, end = _slice(rng, data)
    data[start:end] = rng.choice(NASTY)


def _replace_value(rng: random.Random, data: bytearray, samples: Sequence[bytes]) -> None:
    """Replace the text between two delimiters of a text format with an entry of `NASTY`."""
    marks = [place for place, byte in enumerate(data[:2000]) if byte in b':,[]{}"\t\n']
    if len(marks) > 1:
        at = rng.randrange(len(marks) - 1)
        data[marks[at] + 1 : marks[at + 1]] = rng.choice(NASTY)


def _change_node(rng: random.Random, data: bytearray, samples: Sequence[bytes]) -> None:
    """Change, rename, drop or duplicate a value in JSON or in one line of JSON Lines."""
    lines = [bytes(data)] if rng.randrange(2) else bytes(data).split(b"\n")
    at = rng.randrange(len(lines))
    with contextlib.suppress(ValueError, RecursionError):
        tree = json.loads(lines[at])
        nodes = _containers(tree)
        if nodes:
            _change(rng, rng.choice(nodes))
            lines[at] = json.dumps(tree, ensure_ascii=rng.random() < 0.5).encode("utf-8", "surrogatepass")
            data[:] = b"\n".join(lines)


def _containers(tree: Any) -> list[Any]:
    """All non-empty lists and objects of a JSON tree."""
    children = tree.values() if isinstance(tree, dict) else tree if isinstance(tree, list) else ()
    return ([tree] if children else []) + [node for child in children for node in _containers(child)]


def _change(rng: random.Random, node: Any) -> None:
    keys = list(node) if isinstance(node, dict) else list(range(len(node)))
    key, way = rng.choice(keys), rng.randrange(6)
    if way == 0:
        del node[key]
    elif way == 1 and isinstance(node, list):
        node.append(node[key])
    elif way == 1:
        node[str(rng.choice(NASTY_VALUES))] = node.pop(key)
    elif way == 2:
        node[key] = [node[key]]
    elif way == 3:
        node[key] = node[rng.choice(keys)]
    else:
        node[key] = rng.choice(NASTY_VALUES)


def _insert_noise(rng: random.Random, data: bytearray, samples: Sequence[bytes]) -> None:
    start = rng.randrange(len(data) + 1)
    data[start:start] = bytes(rng.randrange(256) for _ in range(rng.choice((1, 4, 16))))


def _splice(rng: random.Random, data: bytearray, samples: Sequence[bytes]) -> None:
    other = rng.choice(samples)
    data[rng.randrange(len(data) + 1) :] = other[rng.randrange(len(other) + 1) :]


def _whole_of_another(rng: random.Random, data: bytearray, samples: Sequence[bytes]) -> None:
    start = rng.randrange(len(data) + 1)
    data[start:start] = rng.choice(samples)


OPERATIONS: tuple[Operation, ...] = (
    _flip_bits,
    _set_byte,
    _cut,
    _cut_front,
    _drop,
    _repeat,
    _insert,
    _replace,
    _replace_value,
    _change_node,
    _change_node,
    _change_node,
    _insert_noise,
    _splice,
    _whole_of_another,
)
