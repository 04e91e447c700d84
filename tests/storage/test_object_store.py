"""Artifacts at s3:// keep the guarantees of local ones: whole, checked, one writer. Uses a real server process."""

from __future__ import annotations

import gzip
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import boto3
import pytest
from pydantic import BaseModel

from rag_core.corpus.corpus import Corpus, CorpusConfig, write_corpus
from rag_core.errors import ArtifactError, ConfigError, InputError
from rag_core.questions.questions import files_of_questions, read_questions
from rag_core.storage import object_store, stored_artifact
from rag_core.storage.artifact import find_finished, finish_publishing, local_file, open_artifact, publish
from rag_core.storage.places import ArtifactPath, ObjectPath, absolute, as_place
from rag_core.storage.stored_artifact import work_folder
from tests.support.servers.processes import free_port
from tests.support.servers.s3_server import BUCKET, CREDENTIALS, s3_server

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    with s3_server(tmp_path_factory.mktemp("s3") / "log") as environment:
        yield environment


@pytest.fixture
def place(server: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ObjectPath:
    """A new place in the store, and a new cache."""
    for name, value in {**server, "RAG_CACHE": str(tmp_path / "cache")}.items():
        monkeypatch.setenv(name, value)
    object_store._filesystem_of.cache_clear()
    place = as_place(f"s3://{BUCKET}/{tmp_path.name}/out")
    assert isinstance(place, ObjectPath)
    return place


@pytest.fixture
def s3(server: dict[str, str], place: ObjectPath) -> Any:
    """A separate client to list and damage objects."""
    return boto3.client("s3")


def make(place: Path, files: dict[str, str], **settings: Any) -> None:
    with publish(place, "thing", **settings) as draft:
        for name, text in files.items():
            (draft.folder / name).parent.mkdir(exist_ok=True)
            (draft.folder / name).write_text(text)
        draft.counts["files"] = len(files)


def keys(s3: Any, place: ObjectPath) -> list[str]:
    objects = s3.list_objects_v2(Bucket=place.bucket, Prefix=place.prefix + "/").get("Contents", [])
    return sorted(item["Key"].removeprefix(place.prefix + "/") for item in objects)


def contents(place: Path) -> dict[str, str]:
    """Texts of the artifact's files by name, read through the cache."""
    from rag_core.storage.artifact import local_copy

    folder = local_copy(place)
    names = open_artifact(folder, "thing").files
    return {name: (folder / name).read_text() for name in names}


def another_machine(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    monkeypatch.setenv("RAG_CACHE", str(folder))


def test_a_place_keeps_its_two_slashes_through_paths_settings_and_workers() -> None:
    class Settings(BaseModel):
        out: ArtifactPath

    for spelling in ("s3://bucket/a/b", Path("s3://bucket/a/b"), Path("s3:/bucket/a/b"), ObjectPath("s3://bucket/a/b")):
        out = Settings.model_validate({"out": spelling}).out
        assert isinstance(out, ObjectPath)
        assert (str(out / "c"), out.bucket, out.prefix) == ("s3://bucket/a/b/c", "bucket", "a/b")
        assert str(Path(absolute(Path(str(out))))) == "s3:/bucket/a/b"
        assert absolute(spelling) == str(out.parent / "b") == "s3://bucket/a/b"
    assert Settings.model_validate_json('{"out": "s3://bucket/a"}').model_dump_json() == '{"out":"s3://bucket/a"}'
    assert Settings(out=Path("runs/s3")).out == Path("runs/s3")


def test_what_is_published_is_read_on_another_machine(
    place: ObjectPath, s3: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make(place, {"data.txt": "one", "part/more.txt": "two"}, config={"a": 1})
    fingerprint = open_artifact(place, "thing").fingerprint[:16]
    assert keys(s3, place) == [f"files-{fingerprint}/data.txt", f"files-{fingerprint}/part/more.txt", "manifest.json"]
    another_machine(monkeypatch, tmp_path / "elsewhere")
    assert contents(place) == {"data.txt": "one", "part/more.txt": "two"}
    assert find_finished(place, "thing", {"a": 1}, {}) is not None
    assert find_finished(place, "thing", {"a": 2}, {}) is None


def test_a_newer_artifact_replaces_the_older_and_its_files(place: ObjectPath, s3: Any) -> None:
    make(place, {"data.txt": "one"})
    make(place, {"data.txt": "two"})
    assert contents(place) == {"data.txt": "two"}
    assert len(keys(s3, place)) == 2


def test_files_are_fetched_once_and_the_copy_is_shared(
    place: ObjectPath, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    make(place, {"data.txt": "one"})
    another_machine(monkeypatch, tmp_path / "elsewhere")
    contents(place)
    monkeypatch.setattr(stored_artifact, "download", lambda *_: pytest.fail("fetched again"))
    assert contents(place) == {"data.txt": "one"}


def test_an_exception_leaves_the_older_artifact(place: ObjectPath, s3: Any) -> None:
    make(place, {"data.txt": "one"})
    before = keys(s3, place)
    with pytest.raises(KeyboardInterrupt), publish(place, "thing"):
        raise KeyboardInterrupt
    assert keys(s3, place) == before


def test_a_place_with_somebody_elses_objects_is_refused(place: ObjectPath, s3: Any) -> None:
    s3.put_object(Bucket=place.bucket, Key=f"{place.prefix}/holiday.jpg", Body=b"precious")
    with pytest.raises(ArtifactError, match=r"already holds 'holiday\.jpg' and no manifest"):
        make(place, {"data.txt": "one"})
    assert keys(s3, place) == ["holiday.jpg"]


@pytest.mark.parametrize("copy", [True, False], ids=["with a copy", "on another machine"])
def test_a_cut_and_a_missing_object_are_named(
    place: ObjectPath, s3: Any, copy: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make(place, {"data.txt": "one"})
    if not copy:
        another_machine(monkeypatch, tmp_path / "elsewhere")
    (key,) = [f"{place.prefix}/{name}" for name in keys(s3, place) if name != "manifest.json"]
    s3.put_object(Bucket=place.bucket, Key=key, Body=b"on")
    with pytest.raises(ArtifactError, match=rf"s3://{BUCKET}/.*data\.txt has 2 bytes, the manifest says 3.*rag verify"):
        open_artifact(place, "thing")
    s3.delete_object(Bucket=place.bucket, Key=key)
    with pytest.raises(ArtifactError, match=rf"s3://{BUCKET}/.*data\.txt is missing"):
        open_artifact(place, "thing")
    assert find_finished(place, "thing", {}, {}) is None


def test_a_changed_object_of_the_same_size_is_named(
    place: ObjectPath, s3: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make(place, {"data.txt": "one"})
    another_machine(monkeypatch, tmp_path / "elsewhere")
    (key,) = [f"{place.prefix}/{name}" for name in keys(s3, place) if name != "manifest.json"]
    s3.put_object(Bucket=place.bucket, Key=key, Body=b"two")
    with pytest.raises(ArtifactError, match=r"data\.txt was changed since it was published"):
        open_artifact(place, "thing")
    make(place, {"data.txt": "one"})
    assert contents(place) == {"data.txt": "one"}, "publishing the same again repairs it"


def test_a_reader_whose_artifact_was_replaced_reads_the_new_one(
    place: ObjectPath, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make(place, {"data.txt": "one"})
    old = stored_artifact.read_stored_manifest(place)
    make(place, {"data.txt": "two"})
    another_machine(monkeypatch, tmp_path / "elsewhere")
    answers = [old, stored_artifact.read_stored_manifest(place)]
    monkeypatch.setattr(stored_artifact, "read_stored_manifest", lambda _: answers.pop(0))
    assert contents(place) == {"data.txt": "two"}


PUBLISHER = """
import os, signal, sys, time
from pathlib import Path
from rag_core.storage.artifact import find_finished, finish_publishing, publish
from rag_core.errors import ArtifactError
from rag_core.storage import stored_artifact
place, text, go, files, last = Path(sys.argv[1]), sys.argv[2], Path(sys.argv[3]), int(sys.argv[4]), int(sys.argv[5])
upload = stored_artifact.upload

def upload_until_killed(*arguments):
    global last
    upload(*arguments)
    last -= 1
    if not last:
        os.kill(os.getpid(), signal.SIGKILL)

stored_artifact.upload = upload_until_killed
try:
    if not (find_finished(place, "thing", {}, {}) or finish_publishing(place, "thing", {}, {})):
        with publish(place, "thing", resume=True) as draft:
            Path(str(go) + "." + text).touch()
            while not go.exists():
                time.sleep(0.001)
            for number in range(files):
                (draft.folder / f"part-{number:03}").write_text(text * 1000)
        print("made")
except ArtifactError as error:
    print(error)
    sys.exit(2)
"""


def start(
    place: ObjectPath, text: str, go: Path, files: int, cache: Path, killed_after: int = 0
) -> subprocess.Popen[str]:
    """A process that publishes as soon as `go` exists, and is killed after `killed_after` uploads (0: never)."""
    command = [sys.executable, "-c", PUBLISHER, str(place), text, str(go), str(files), str(killed_after)]
    environment = os.environ | {"RAG_CACHE": str(cache), "PYTHONPATH": str(ROOT)}
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def wait_for(condition: Any, seconds: float = 240) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it took too long"
        time.sleep(0.005)


@pytest.mark.parametrize("there", [False, True], ids=["new", "replacing"])
def test_one_of_two_simultaneous_publishers_wins_and_the_other_names_it(
    place: ObjectPath, s3: Any, there: bool, tmp_path: Path
) -> None:
    if there:
        make(place, {"data.txt": "older"}, config={"other": "work"})
    go = tmp_path / "go"
    publishers = [start(place, text, go, 3, tmp_path / text) for text in ("left", "right")]
    wait_for(lambda: all(Path(f"{go}.{text}").exists() for text in ("left", "right")))
    go.touch()
    outputs = [publisher.communicate(timeout=240)[0] for publisher in publishers]
    codes = [publisher.returncode for publisher in publishers]
    assert sorted(codes) == [0, 2], outputs
    (winner,) = [text for code, text in zip(codes, ("left", "right"), strict=True) if code == 0]
    (refusal,) = [output for code, output in zip(codes, outputs, strict=True) if code == 2]
    assert contents(place) == {f"part-{number:03}": winner * 1000 for number in range(3)}
    fingerprint = open_artifact(place, "thing").fingerprint[:16]
    assert f"{place} was published by another run in the meantime (the artifact there is {fingerprint}" in refusal
    # If the loser's command is run again, it finds the same work done.
    assert find_finished(place, "thing", {}, {}) is not None


def test_a_killed_upload_continues_with_the_missing_files(place: ObjectPath, s3: Any, tmp_path: Path) -> None:
    go = tmp_path / "go"
    go.touch()
    process = start(place, "x", go, 20, tmp_path / "cache", killed_after=5)
    process.communicate()
    assert process.returncode == -signal.SIGKILL
    stored = s3.list_objects_v2(Bucket=place.bucket, Prefix=place.prefix)["Contents"]
    assert len(stored) == 5
    assert "manifest.json" not in keys(s3, place)
    with pytest.raises(ArtifactError, match="has no manifest"):
        open_artifact(place, "thing")
    assert work_folder(place).is_dir(), "what was made is kept"
    assert finish_publishing(place, "thing", {}, {}) is not None, "nothing is made again"
    objects = s3.list_objects_v2(Bucket=place.bucket, Prefix=place.prefix)["Contents"]
    modified = {item["Key"]: item["LastModified"] for item in objects}
    assert [modified[item["Key"]] for item in stored] == [item["LastModified"] for item in stored]
    assert contents(place) == {f"part-{number:03}": "x" * 1000 for number in range(20)}
    assert not work_folder(place).exists()


def test_question_files_are_read_from_a_store(place: ObjectPath, s3: Any) -> None:
    s3.put_object(Bucket=place.bucket, Key=f"{place.prefix}.jsonl", Body=b'{"question": "who?"}\n')
    (question,) = read_questions(Path(f"{place}.jsonl"))
    assert question.question == "who?"


def test_a_split_of_beir_is_read_from_a_store_with_its_queries(place: ObjectPath, s3: Any) -> None:
    judgements = b"query-id\tcorpus-id\tscore\nq1\td1\t1\n"
    s3.put_object(Bucket=place.bucket, Key=f"{place.prefix}/qrels/test.tsv", Body=judgements)
    with pytest.raises(InputError, match=rf"there is no queries\.jsonl in {place} or {place}/qrels"):
        read_questions(place / "qrels/test.tsv")
    queries = b'{"_id": "q1", "text": "who?"}\n{"_id": "q2", "text": "what?"}\n'
    s3.put_object(Bucket=place.bucket, Key=f"{place.prefix}/queries.jsonl.gz", Body=gzip.compress(queries))
    (question,) = read_questions(Path(f"{place}/qrels/test.tsv"))
    assert (question.question, question.gold_passage_ids) == ("who?", ("d1",))
    assert [file.name for file in files_of_questions(place / "qrels/test.tsv")] == ["test.tsv", "queries.jsonl.gz"]


def test_a_folder_of_sources_is_read_from_a_store_and_a_name_that_leads_out_of_it_is_refused(
    place: ObjectPath, s3: Any, tmp_path: Path
) -> None:
    for name in ("a.txt", "deep/b.txt"):
        s3.put_object(Bucket=place.bucket, Key=f"{place.prefix}/{name}", Body=name.encode())
    folder = local_file(place)
    assert {str(path.relative_to(folder)) for path in folder.rglob("*.txt")} == {"a.txt", "deep/b.txt"}
    s3.put_object(Bucket=place.bucket, Key=f"{place.prefix}/../../../evil.txt", Body=b"evil")
    with pytest.raises(ArtifactError, match="whose name leads out of the folder"):
        local_file(place)
    assert not list(tmp_path.rglob("evil.txt"))


def test_corpus_files_in_a_store_are_recognised_as_on_a_disk(place: ObjectPath, s3: Any, tmp_path: Path) -> None:
    page = {"wikipedia_id": "7", "wikipedia_title": "Lyon", "text": ["Lyon", "It is a city."]}
    files = {
        "beir/corpus.jsonl.gz": gzip.compress(b'{"_id": "d1", "text": "one"}\n'),
        "kilt.json": json.dumps([page]).encode(),
    }
    for name, content in files.items():
        s3.put_object(Bucket=place.bucket, Key=f"{place.prefix}/{name}", Body=content)
    sources = [local_file(place / "beir"), local_file(place / "kilt.json")]
    manifest = write_corpus(sources, tmp_path / "corpus", CorpusConfig())
    assert [passage.id for passage in Corpus.open(tmp_path / "corpus").iter_passages()] == ["d1", "7:1"]
    assert sorted(manifest.details["layouts"]) == ["beir (BEIR), JSON Lines", "kilt (KILT's knowledge source), JSON"]


def test_a_missing_bucket_and_a_store_that_is_down_are_named_without_any_secret(
    place: ObjectPath, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ArtifactError, match="there is no bucket 'nowhere'"):
        open_artifact(Path("s3://nowhere/out"), "thing")
    address = f"http://127.0.0.1:{free_port()}"
    monkeypatch.setenv("AWS_ENDPOINT_URL", address)
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
    object_store._filesystem_of.cache_clear()
    with pytest.raises(ConfigError, match=rf"{address} \(AWS_ENDPOINT_URL\) does not answer") as refusal:
        open_artifact(place, "thing")
    assert not any(secret in str(refusal.value) for secret in CREDENTIALS.values())
    object_store._filesystem_of.cache_clear()


def test_verify_reads_every_object_and_repair_replaces_the_damaged_ones(
    place: ObjectPath, s3: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from rag_core.verification.repair import repair
    from rag_core.verification.verification import artifacts_below, verify
    from tests.support.small_corpus import write_passages_jsonl

    source = write_passages_jsonl(tmp_path / "passages.jsonl")
    write_corpus([source], place, CorpusConfig(format="jsonl", shard_rows=4))
    assert artifacts_below(place.parent) == [place]
    assert verify(place).findings == []

    def read(name: str) -> bytes:
        content: bytes = s3.get_object(Bucket=place.bucket, Key=f"{place.prefix}/{name}")["Body"].read()
        return content

    stored = {name: read(name) for name in keys(s3, place)}
    gone, changed, cut = [name for name in stored if "passages-" in name]
    s3.delete_object(Bucket=place.bucket, Key=f"{place.prefix}/{gone}")
    s3.put_object(Bucket=place.bucket, Key=f"{place.prefix}/{changed}", Body=stored[changed][::-1])
    s3.put_object(Bucket=place.bucket, Key=f"{place.prefix}/{cut}", Body=stored[cut][:-1])
    s3.put_object(Bucket=place.bucket, Key=f"{place.prefix}/notes.txt", Body=b"mine")
    expected = [(gone, "missing"), (changed, "content"), (cut, "size"), ("notes.txt", "foreign")]
    assert [(finding.file, finding.state) for finding in verify(place).findings] == expected
    another_machine(monkeypatch, tmp_path / "elsewhere")  # it has no local copy
    assert repair(place) == [Path(name).name for name in (gone, changed, cut)]
    assert [finding.file for finding in verify(place).findings] == ["notes.txt"]
    assert {name: read(name) for name in stored} == stored
