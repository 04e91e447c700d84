"""Publishing and opening artifacts: a reader never sees half an artifact, whatever happens to writer or disk."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from rag_core.errors import ArtifactError
from rag_core.storage.artifact import MANIFEST, Manifest, find_finished, fingerprint_of_files, open_artifact, publish


def make(out: Path, text: str = "one", kind: str = "thing", **settings: dict[str, str]) -> Manifest:
    with publish(out, kind, **settings) as draft:
        (draft.folder / "part").mkdir()
        (draft.folder / "part" / "data.txt").write_text(text)
        draft.counts["rows"] = 3
        draft.details["note"] = ["x"]
    return open_artifact(out, kind)


def test_what_is_published_can_be_opened_with_its_counts_and_files(tmp_path: Path) -> None:
    manifest = make(tmp_path / "deep" / "out", config={"a": "b"}, made_from={"source": "f"})
    assert (manifest.counts, manifest.details, manifest.config) == ({"rows": 3}, {"note": ["x"]}, {"a": "b"})
    assert list(manifest.files) == ["part/data.txt"]
    assert manifest.files["part/data.txt"].bytes == 3


def test_publishing_is_atomic_nothing_is_at_the_target_before_the_end(tmp_path: Path) -> None:
    out = tmp_path / "out"
    with publish(out, "thing") as draft:
        (draft.folder / "data.txt").write_text("x")
        assert not out.exists()
        assert draft.folder.parent == tmp_path
    assert {path.name for path in out.iterdir()} == {"data.txt", MANIFEST}
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_an_exception_leaves_the_older_artifact_and_no_leftovers(tmp_path: Path, error: type[BaseException]) -> None:
    def fail(out: Path) -> None:
        with publish(out, "thing") as draft:
            (draft.folder / "data.txt").write_text("half")
            raise error

    before = make(tmp_path / "out")
    with pytest.raises(error):
        fail(tmp_path / "out")
    assert open_artifact(tmp_path / "out", "thing") == before
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_an_exception_of_a_first_publish_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError), publish(tmp_path / "out", "thing"):
        raise RuntimeError
    assert list(tmp_path.iterdir()) == []


def test_a_newer_artifact_replaces_the_older_with_all_its_files(tmp_path: Path) -> None:
    make(tmp_path / "out", "old")
    with publish(tmp_path / "out", "thing") as draft:
        (draft.folder / "new.txt").write_text("new")
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"new.txt", MANIFEST}
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_foreign_folder_is_refused_and_left_alone(tmp_path: Path) -> None:
    (tmp_path / "holiday.jpg").write_text("precious")
    with pytest.raises(ArtifactError, match="not made by this program"):
        make(tmp_path)
    assert (tmp_path / "holiday.jpg").read_text() == "precious"


def test_a_file_as_target_is_refused(tmp_path: Path) -> None:
    (tmp_path / "out").write_text("x")
    with pytest.raises(ArtifactError, match="is a file"):
        make(tmp_path / "out")


def test_an_empty_folder_as_target_is_used(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    assert make(tmp_path / "out").kind == "thing"


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    make(tmp_path / "out")
    (tmp_path / "out/part/data.txt").unlink()
    with pytest.raises(ArtifactError, match=r"part/data\.txt is missing"):
        open_artifact(tmp_path / "out", "thing")


def test_a_cut_file_is_named_even_without_the_content_check(tmp_path: Path) -> None:
    make(tmp_path / "out")
    (tmp_path / "out/part/data.txt").write_text("on")
    with pytest.raises(ArtifactError, match=r"part/data\.txt has 2 bytes, the manifest says 3"):
        open_artifact(tmp_path / "out", "thing", check_content=False)


def test_a_changed_file_of_the_same_size_is_named_by_the_content_check(tmp_path: Path) -> None:
    make(tmp_path / "out")
    (tmp_path / "out/part/data.txt").write_text("two")
    with pytest.raises(ArtifactError, match=r"part/data\.txt was changed"):
        open_artifact(tmp_path / "out", "thing")


def test_a_path_outside_the_folder_is_refused(tmp_path: Path) -> None:
    make(tmp_path / "out")
    (tmp_path / "secret.txt").write_text("one")
    manifest = tmp_path / "out" / MANIFEST
    manifest.write_text(manifest.read_text().replace("part/data.txt", "../secret.txt"))
    with pytest.raises(ArtifactError, match="outside the folder"):
        open_artifact(tmp_path / "out", "thing")


def test_an_artifact_of_another_kind_is_refused(tmp_path: Path) -> None:
    make(tmp_path / "out", kind="index")
    with pytest.raises(ArtifactError, match="holds 'index', but 'corpus' was expected"):
        open_artifact(tmp_path / "out", "corpus")


def test_another_schema_version_is_refused(tmp_path: Path) -> None:
    make(tmp_path / "out")
    manifest = tmp_path / "out" / MANIFEST
    manifest.write_text(json.dumps(json.loads(manifest.read_text()) | {"schema_version": 99}))
    with pytest.raises(ArtifactError, match="schema version 99"):
        open_artifact(tmp_path / "out", "thing")


def test_no_folder_no_manifest_and_a_broken_manifest_have_different_messages(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match="no such folder"):
        open_artifact(tmp_path / "nowhere", "thing")
    with pytest.raises(ArtifactError, match=f"it has no {MANIFEST}"):
        open_artifact(tmp_path, "thing")
    (tmp_path / MANIFEST).write_text('{"kind": ')
    with pytest.raises(ArtifactError, match="cannot be read"):
        open_artifact(tmp_path, "thing")


def test_the_key_finds_the_same_work_and_no_other(tmp_path: Path) -> None:
    config, made_from = {"size": "small", "lang": "en"}, {"source": "abc"}
    made = make(tmp_path / "out", config=config, made_from=made_from)
    assert find_finished(tmp_path / "out", "thing", dict(reversed(config.items())), made_from) == made
    assert find_finished(tmp_path / "out", "thing", config | {"size": "large"}, made_from) is None
    assert find_finished(tmp_path / "out", "thing", config, {"source": "abd"}) is None
    assert find_finished(tmp_path / "out", "other", config, made_from) is None
    (tmp_path / "out/part/data.txt").unlink()
    assert find_finished(tmp_path / "out", "thing", config, made_from) is None


def test_the_fingerprint_follows_the_content_and_not_the_work(tmp_path: Path) -> None:
    first = make(tmp_path / "a", config={"x": "1"})
    same = make(tmp_path / "b", config={"x": "2"})
    other = make(tmp_path / "c", "two", config={"x": "1"})
    assert first.fingerprint == same.fingerprint != other.fingerprint
    assert first.key == other.key != same.key


def test_the_fingerprint_of_sources_ignores_their_names_but_not_their_order(tmp_path: Path) -> None:
    for name, text in [("a", "1"), ("b", "2"), ("renamed", "1")]:
        (tmp_path / name).write_text(text)
    a, b, renamed = tmp_path / "a", tmp_path / "b", tmp_path / "renamed"
    assert fingerprint_of_files([a, b]) == fingerprint_of_files([renamed, b])
    assert fingerprint_of_files([a, b]) != fingerprint_of_files([b, a])
