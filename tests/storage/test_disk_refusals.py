"""If the disk refuses a write (full, read-only, links that lead out), a message says so; the older artifact stands."""

from __future__ import annotations

import contextlib
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from rag_core.errors import ArtifactError
from rag_core.storage.artifact import MANIFEST, finished_file, open_artifact, publish

MEBIBYTE = 2**20


@contextlib.contextmanager
def mounted(folder: Path) -> Iterator[Path]:
    """A file system of one MiB in memory."""
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=1m", "none", str(folder)]
    if os.geteuid() or subprocess.run(command, capture_output=True).returncode:
        pytest.skip("a file system cannot be mounted here")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


def make(out: Path, content: bytes = b"first", resume: bool = False) -> None:
    with publish(out, "thing", resume=resume) as draft:
        (draft.folder / "data").write_bytes(content)


def write_plainly(file: Path) -> None:
    file.write_bytes(bytes(2 * MEBIBYTE))


def write_parquet(file: Path) -> None:
    with finished_file(file) as unfinished:
        numbers = np.random.default_rng(0).random(MEBIBYTE)
        pq.write_table(pa.table({"numbers": numbers}), unfinished)


def write_faiss(file: Path) -> None:
    import faiss

    index = faiss.IndexFlatIP(64)
    index.add(np.zeros((8192, 64), dtype=np.float32))
    faiss.write_index(index, str(file))


def write_safetensors(file: Path) -> None:
    import torch
    from safetensors.torch import save_file

    save_file({"weights": torch.zeros(MEBIBYTE)}, file)


@pytest.mark.parametrize("write", [write_plainly, write_parquet, write_faiss, write_safetensors])
def test_a_full_disk_is_named_and_the_older_artifact_stands(write, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    with mounted(tmp_path / "small") as small:
        make(small / "out")
        with (
            pytest.raises(ArtifactError, match=r"No space left on device.*Free some.*still stands"),
            publish(small / "out", "thing") as draft,
        ):
            write(draft.folder / "data.npy")
        assert open_artifact(small / "out", "thing")
        assert (small / "out" / "data").read_bytes() == b"first"
        assert [path.name for path in small.iterdir()] == ["out"]
        make(small / "out", b"after space was freed")


def test_finished_parts_survive_a_full_disk(tmp_path: Path) -> None:
    with mounted(tmp_path / "small") as small:

        def write_parts(sizes: list[int]) -> None:
            with publish(small / "out", "thing", resume=True) as draft:
                for number, size in enumerate(sizes):
                    with finished_file(draft.folder / f"part-{number}") as part:
                        part.write_bytes(bytes(size))

        with pytest.raises(ArtifactError, match="finished parts are kept"):
            write_parts([10, 2 * MEBIBYTE])
        with publish(small / "out", "thing", resume=True) as draft:
            assert [path.name for path in draft.folder.iterdir()] == ["part-0"]


def test_a_read_only_place_is_named_and_the_older_artifact_stands(tmp_path: Path) -> None:
    with mounted(tmp_path / "small") as small:
        make(small / "out")
        subprocess.run(["mount", "-o", "remount,ro", str(small)], check=True)
        for out in (small / "out", small / "deep" / "new"):
            with pytest.raises(ArtifactError, match=r"Read-only file system.*Give an --out where you may write"):
                make(out)
        assert open_artifact(small / "out", "thing")


def test_an_unreadable_input_is_not_blamed_on_the_output(tmp_path: Path) -> None:
    with pytest.raises(PermissionError), publish(tmp_path / "here" / "out", "thing"):
        raise PermissionError(13, "Permission denied", "/elsewhere/input")


def test_a_link_out_of_the_artifact_is_refused_in_writing_and_in_reading(tmp_path: Path) -> None:
    (tmp_path / "secret").write_text("secret")
    with pytest.raises(ArtifactError, match=r"is a link to .*secret, outside the artifact"):  # noqa: SIM117
        with publish(tmp_path / "out", "thing") as draft:
            (draft.folder / "data").symlink_to(tmp_path / "secret")
    assert not (tmp_path / "out").exists()
    make(tmp_path / "out", b"secret")
    (tmp_path / "out" / "data").unlink()
    (tmp_path / "out" / "data").symlink_to(tmp_path / "secret")
    with pytest.raises(ArtifactError, match="lies outside the folder"):
        open_artifact(tmp_path / "out", "thing")


def test_a_draft_that_is_a_link_is_replaced_and_nothing_is_written_through_it(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt), publish(tmp_path / "out", "thing", resume=True) as draft:
        raise KeyboardInterrupt
    (tmp_path / "victim").mkdir()
    draft.folder.rmdir()
    draft.folder.symlink_to(tmp_path / "victim")
    make(tmp_path / "out", resume=True)
    assert list((tmp_path / "victim").iterdir()) == []
    assert open_artifact(tmp_path / "out", "thing")


def test_publishing_at_a_link_writes_its_target_and_keeps_the_link(tmp_path: Path) -> None:
    (tmp_path / "large disk").mkdir()
    (tmp_path / "out").symlink_to(tmp_path / "large disk" / "out")
    for content in (b"first", b"second"):
        make(tmp_path / "out", content)
        assert (tmp_path / "out").is_symlink()
        assert open_artifact(tmp_path / "out", "thing")
    assert {path.name for path in (tmp_path / "large disk" / "out").iterdir()} == {"data", MANIFEST}
    assert [path.name for path in (tmp_path / "large disk").iterdir()] == ["out"]
