"""The file that keeps unsent writes: whole lines, in order, sent once, by any process that finds it."""

from __future__ import annotations

import multiprocessing
import threading
from pathlib import Path
from typing import Any

import pytest

from rag_core.errors import ArtifactError
from tasks.tracking import journal as tracking_journal
from tasks.tracking.journal import Journal, UnreachableError, read_journal
from tests.support.clock import Clock

HEADER = {"do": "open", "run": "r1"}


class Server:
    """A server that is up or down, and remembers the entries that it received."""

    def __init__(self, *, up: bool = False) -> None:
        self.up = up
        self.received: list[dict[str, Any]] = []

    def __call__(self, header: dict[str, Any], entries: list[dict[str, Any]], hurry: bool) -> None:
        if not self.up:
            raise UnreachableError("It does not answer.")
        self.received += entries


def steps(entries: list[dict[str, Any]]) -> list[int]:
    return [entry["step"] for entry in entries]


def point(step: int) -> dict[str, Any]:
    return {"do": "metrics", "step": step, "metrics": {"loss": 1.0}}


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    """The journal's clock, which the test moves."""
    clock = Clock()
    monkeypatch.setattr(tracking_journal, "time", clock)
    return clock


def test_writes_queue_behind_older_ones_and_keep_their_order(tmp_path: Path, clock: Clock) -> None:
    server = Server()
    journal = Journal(tmp_path / "r1.jsonl", HEADER, server)
    for step in range(3):
        journal.write(point(step))
    server.up = True
    journal.write(point(3))
    assert server.received == [], "while the pause lasts the server is not asked"
    clock.now += tracking_journal.FIRST_PAUSE
    journal.write(point(4))
    assert steps(server.received) == [0, 1, 2, 3, 4]
    assert not journal.file.exists()


def test_a_line_cut_off_by_a_kill_is_not_joined_to_the_next(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "r1.jsonl", HEADER, Server())
    journal.write(point(0))
    with journal.file.open("ab") as file:
        file.write(b'{"do": "metrics", "st')
    journal.write(point(1))
    assert steps(read_journal(journal.file)[1]) == [0, 1]


def test_an_entry_that_the_server_refuses_stays_in_the_file_with_all_later_ones(tmp_path: Path) -> None:
    class Refusing(Server):
        def __call__(self, header: dict[str, Any], entries: list[dict[str, Any]], hurry: bool) -> None:
            if self.up and entries[0]["step"] == 1:
                raise ValueError("no such metric")
            super().__call__(header, entries, hurry)

    server = Refusing()
    journal = Journal(tmp_path / "r1.jsonl", HEADER, server)
    for step in range(3):
        journal.write(point(step) | {"metrics": {str(n): 0.0 for n in range(900)}})
    server.up = True
    assert journal.send(60) == "line 3 was refused: no such metric"
    assert steps(server.received) == [0]
    assert steps(read_journal(journal.file)[1]) == [1, 2]


def test_a_damaged_line_is_named_and_nothing_is_sent_past_it(tmp_path: Path) -> None:
    server = Server()
    journal = Journal(tmp_path / "r1.jsonl", HEADER, server)
    journal.write(point(0))
    journal.file.write_bytes(journal.file.read_bytes() + b"}{\n")
    server.up = True
    assert f"{journal.file}, line 3 is not JSON" in journal.send(60)
    assert server.received == []
    with pytest.raises(ArtifactError, match="line 3"):
        read_journal(journal.file)


def test_a_kept_file_travels_with_its_entry_and_is_deleted_after(tmp_path: Path) -> None:
    server = Server()
    journal = Journal(tmp_path / "r1.jsonl", HEADER, server)
    journal.write({"do": "file", "path": "plots/loss.png", "content": b"\x89PNG"})
    journal.write({"do": "file", "path": "empty.txt", "content": b""})
    assert b"PNG" not in journal.file.read_bytes(), "the journal stays readable"
    server.up = True
    assert journal.send(60) == ""
    assert [entry["content"] for entry in server.received] == [b"\x89PNG", b""]
    assert list(tmp_path.iterdir()) == []


def test_a_slow_catch_up_does_not_hold_up_a_step(tmp_path: Path, clock: Clock) -> None:
    class Slow(Server):
        def __call__(self, header: dict[str, Any], entries: list[dict[str, Any]], hurry: bool) -> None:
            super().__call__(header, entries, hurry)
            clock.now += 0.4

    server = Slow()
    journal = Journal(tmp_path / "r1.jsonl", HEADER, server)
    for step in range(6):
        journal.write({"do": "tags", "step": step})
    server.up = True
    journal.pause.end()
    before = clock.now
    journal.write({"do": "tags", "step": 6})
    assert clock.now - before < 2
    assert 0 < len(server.received) < 6
    journal.send(60)
    assert steps(server.received) == list(range(7))


def append(file: Path, name: int) -> None:
    journal = Journal(file, HEADER, Server())
    for number in range(100):
        journal.write({"do": "tags", "writer": name, "step": number})


def test_entries_written_while_others_send_arrive_once_and_in_order(tmp_path: Path) -> None:
    file, server = tmp_path / "r1.jsonl", Server(up=True)
    context = multiprocessing.get_context("spawn")
    writers = [context.Process(target=append, args=(file, name)) for name in range(3)]
    for writer in writers:
        writer.start()

    def send() -> None:
        while any(writer.is_alive() for writer in writers):
            Journal(file, HEADER, server).send(0.001)

    # An open file holds the lock, so two threads exclude each other as two processes do.
    senders = [threading.Thread(target=send) for _ in range(2)]
    for sender in senders:
        sender.start()
    for sender in senders:
        sender.join()
    Journal(file, HEADER, server).send(60)
    assert [writer.exitcode for writer in writers] == [0, 0, 0]
    assert list(tmp_path.iterdir()) == []
    for name in range(3):
        assert steps([entry for entry in server.received if entry["writer"] == name]) == list(range(100))
