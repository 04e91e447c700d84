"""`rag verify` finds every kind of damage and names it; `--repair` makes the damaged files again, byte for byte."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from typer.testing import CliRunner

from flows.cli.main import app
from rag_core.errors import ArtifactError
from rag_core.evaluation.predictions import join_parts, write_part
from rag_core.storage.artifact import MANIFEST, Draft, open_artifact, publish
from rag_core.storage.inputs import GivenInputs
from rag_core.verification.repair import repair
from rag_core.verification.verification import artifacts_below, verify
from tests.support.small_corpus import make_encoder, make_index

KINDS = ("corpus", "embeddings", "index", "predictions")


def write_predictions(draft: Draft) -> None:
    """Five rows in parts of two; a row contains Unicode line breaks, on which naive line readers fail."""
    for part in range(3):
        rows = [
            {
                "id": str(row),
                "question": f"line {row}\u2028or\x85two?",
                "answer": "Zürich 東京",
                "log_prob": -0.1 * row,
                "candidates": [{"answer": "Zürich 東京", "log_prob": -0.1 * row}],
                "passages": [{"id": "a", "title": "", "text": "…", "prior": 1 / 3, "posterior": 1e-300}],
            }
            for row in range(2 * part, min(2 * part + 2, 5))
        ]
        write_part(rows, draft.folder / f"part-{part}.jsonl")
    parts = sorted(draft.folder.glob("part*"))
    draft.counts["questions"] = join_parts(parts, draft.folder)
    draft.details["shard_questions"] = 2
    for part_file in parts:
        part_file.unlink()


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with one artifact of each repairable kind, laid out as by a pipeline."""
    folder = tmp_path_factory.mktemp("made")
    make_index(folder, make_encoder(folder / "encoder"))
    # As `rag embed` publishes them, with the key's settings.
    embeddings = folder / "embeddings" / MANIFEST
    content = json.loads(embeddings.read_text())
    content["config"] = {"dtype": "float32", "precision": "auto", "batch_tokens": None}
    content["made_from"]["encoder"] = content["details"]["encoder_fingerprint"]
    embeddings.write_text(json.dumps(content))
    with publish(folder / "predictions", "predictions") as draft:
        write_predictions(draft)
    return folder


@pytest.fixture
def folder(made: Path, tmp_path: Path) -> Path:
    """A copy to damage. Sources and inputs are found where they were made, or beside it."""
    shutil.copytree(made, tmp_path / "runs", ignore=shutil.ignore_patterns("encoder"))
    return tmp_path / "runs"


def cut(file: Path) -> None:
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2] or b"longer")  # rejects.jsonl may be empty


def flip(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


DAMAGES = {"missing": Path.unlink, "size": cut, "content": flip}


def files_of(folder: Path, kind: str) -> list[str]:
    return sorted(open_artifact(folder / kind, kind).files)


def bytes_of(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_whole_artifacts_have_no_findings_and_all_below_a_folder_are_found(folder: Path) -> None:
    paths = artifacts_below(folder)
    assert [path.name for path in paths] == list(KINDS), "in the order in which they are made"
    for path in paths:
        assert verify(path).findings == []


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("state", DAMAGES)
def test_every_damaged_file_is_found_and_made_again_with_the_same_bytes(folder: Path, kind: str, state: str) -> None:
    path = folder / kind
    whole = bytes_of(path)
    for name in [file for file in files_of(folder, kind) if whole[file] or state != "content"]:
        DAMAGES[state](path / name)
        (finding,) = verify(path).findings
        assert (finding.file, finding.state) == (name, state)
        with pytest.raises(ArtifactError, match=f"{re.escape(name)} .*rag verify --repair"):
            open_artifact(path, kind)
        assert repair(path) == [name]
        assert bytes_of(path) == whole
    assert verify(path).findings == []
    assert not list(folder.glob(".*draft*"))


def test_all_files_of_an_index_and_of_embeddings_are_made_again_at_once(folder: Path) -> None:
    for kind in ("corpus", "embeddings", "index"):
        whole = bytes_of(folder / kind)
        for name in files_of(folder, kind):
            (folder / kind / name).unlink()
        assert repair(folder / kind) == files_of_manifest(folder / kind)
        assert bytes_of(folder / kind) == whole


def files_of_manifest(path: Path) -> list[str]:
    return list(json.loads((path / MANIFEST).read_text())["files"])


def test_whole_shards_are_not_made_again(folder: Path) -> None:
    path = folder / "embeddings"
    before = {name: (path / name).stat().st_mtime_ns for name in files_of(folder, "embeddings")}
    flip(path / "embeddings-00001.parquet")
    repair(path)
    changed = [name for name, time in before.items() if (path / name).stat().st_mtime_ns != time]
    assert changed == ["embeddings-00001.parquet"]


def test_foreign_files_and_links_are_findings_and_are_left_alone(folder: Path) -> None:
    path = folder / "corpus"
    (path / "notes.txt").write_text("mine")
    (path / "shortcut").symlink_to(folder / "index")
    findings = [(finding.file, finding.state) for finding in verify(path).findings]
    assert findings == [("notes.txt", "foreign"), ("shortcut", "foreign")]
    assert repair(path) == []
    assert (path / "notes.txt").read_text() == "mine"


def test_a_damaged_manifest_is_a_finding_and_is_never_rewritten(folder: Path) -> None:
    manifest = folder / "embeddings" / MANIFEST
    text = manifest.read_text()
    changed = text.replace(json.loads(text)["fingerprint"], "0" * 64)
    for content, state in ((text[:-40], "manifest"), (changed, "manifest")):
        manifest.write_text(content)
        assert [finding.state for finding in verify(folder / "embeddings").findings] == [state]
        with pytest.raises(ArtifactError):
            repair(folder / "embeddings")
        assert manifest.read_text() == content


def test_a_published_artifact_that_lost_its_manifest_is_found_below_a_folder(folder: Path) -> None:
    (folder / "index" / MANIFEST).unlink()
    (folder / ".index.mlflow-run").write_text("run")
    assert folder / "index" in artifacts_below(folder)
    (finding,) = verify(folder / "index").findings
    assert "has no manifest.json" in finding.found


def test_content_that_does_not_fit_the_counts_is_found_though_every_checksum_is_right(folder: Path) -> None:
    for kind, path in (
        ("corpus", folder / "corpus"),
        ("embeddings", folder / "embeddings"),
        ("index", folder / "index"),
    ):
        manifest = path / MANIFEST
        manifest.write_text(manifest.read_text().replace('"passages": 9', '"passages": 10'))
        if kind == "embeddings":
            content = json.loads(manifest.read_text())
            content["counts"]["passages"] = 10
            manifest.write_text(json.dumps(content))
        findings = verify(path).findings
        assert any("9 passages" in finding.found and "10 passages" in finding.expected for finding in findings), kind


def test_vectors_in_another_order_than_the_corpus_are_found(folder: Path) -> None:
    shards = [folder / "embeddings" / f"embeddings-0000{number}.parquet" for number in (0, 1)]
    first, second = (pq.read_table(shard) for shard in shards)
    made_from = open_artifact(folder / "embeddings", "embeddings")
    with publish(folder / "embeddings", "embeddings", made_from=made_from.made_from) as draft:
        for number, table in enumerate((second, first, pq.read_table(folder / "embeddings/embeddings-00002.parquet"))):
            pq.write_table(table, draft.folder / f"embeddings-0000{number}.parquet")
        draft.counts, draft.details = made_from.counts, made_from.details
    (finding,) = verify(folder / "embeddings").findings
    assert "row 1 has id 'lyon:country'" in finding.expected
    assert finding.found == "id 'oslo:people'"


def damaged_corpus(folder: Path) -> str:
    flip(folder / "corpus" / "passages-00000.parquet")
    return "corpus"


def changed_sources(folder: Path) -> tuple[str, GivenInputs, str]:
    other = folder / "other.jsonl"
    other.write_text('{"id": "1", "text": "another"}\n')
    return damaged_corpus(folder), GivenInputs(sources=(other,)), "have changed since"


def absent_sources(folder: Path) -> tuple[str, GivenInputs, str]:
    return damaged_corpus(folder), GivenInputs(sources=(folder / "gone",)), "gone does not exist. Give them: --source"


def another_corpus(folder: Path) -> tuple[str, GivenInputs, str]:
    flip(folder / "embeddings" / "embeddings-00000.parquet")
    with publish(folder / "another", "corpus"):
        pass
    return "embeddings", GivenInputs(corpus=folder / "another"), "is not the corpus that .* was made from"


def another_encoder(folder: Path) -> tuple[str, GivenInputs, str]:
    flip(folder / "embeddings" / "embeddings-00000.parquet")
    manifest = folder / "embeddings" / MANIFEST
    other = make_encoder(folder / "other-encoder", seed=5)
    encoder = json.loads(manifest.read_text())["details"]["encoder"]
    manifest.write_text(manifest.read_text().replace(encoder, str(other)))
    return "embeddings", GivenInputs(), "is not the encoder that made these embeddings"


def other_bytes(folder: Path) -> tuple[str, GivenInputs, str]:
    # The same rows with other bytes, as another processor might write them.
    path = folder / "predictions"
    rows = pq.read_table(path / "predictions.parquet")
    manifest = open_artifact(path, "predictions")
    with publish(path, "predictions") as draft:
        (draft.folder / "predictions.jsonl").write_bytes((path / "predictions.jsonl").read_bytes())
        pq.write_table(rows, draft.folder / "predictions.parquet", compression="zstd")
        draft.counts, draft.details = manifest.counts, manifest.details
    (path / "predictions.parquet").unlink()
    return "predictions", GivenInputs(), "not byte for byte"


def both_lost(folder: Path) -> tuple[str, GivenInputs, str]:
    for name in ("predictions.parquet", "predictions.jsonl"):
        flip(folder / "predictions" / name)
    return "predictions", GivenInputs(), "both .* are damaged.*rag infer --model MODEL"


@pytest.mark.parametrize(
    "case", [changed_sources, absent_sources, another_corpus, another_encoder, other_bytes, both_lost]
)
def test_a_repair_that_would_make_something_else_is_refused_and_changes_nothing(
    case: Callable[[Path], tuple[str, GivenInputs, str]], folder: Path
) -> None:
    kind, inputs, message = case(folder)
    before = bytes_of(folder / kind)
    with pytest.raises(ArtifactError, match=message):
        repair(folder / kind, inputs)
    assert bytes_of(folder / kind) == before
    assert not list(folder.glob(".*draft*"))


def test_the_command_lists_all_findings_repairs_them_and_ends_with_the_right_code(folder: Path) -> None:
    run = CliRunner().invoke
    assert run(app, ["verify", str(folder)]).exit_code == 0
    for kind, name in (("corpus", "passages-00001.parquet"), ("index", "vectors.npy")):
        flip(folder / kind / name)
    result = run(app, ["verify", str(folder), "--json"])
    assert result.exit_code == 2
    output = json.loads(result.stdout)
    assert not output["ok"]
    assert {report["kind"]: [finding["file"] for finding in report["findings"]] for report in output["artifacts"]} == {
        "corpus": ["passages-00001.parquet"],
        "embeddings": [],
        "index": ["vectors.npy"],
        "predictions": [],
    }
    assert "rag verify --repair" in output["artifacts"][0]["findings"][0]["remedy"]
    table = run(app, ["verify", str(folder)])
    assert table.exit_code == 2
    assert "1 findings" in table.stdout
    repaired = run(app, ["verify", "--repair", str(folder)])
    assert repaired.exit_code == 0, repaired.stdout
    assert "rebuilt, byte for byte: vectors.npy" in repaired.stdout


def test_a_model_that_is_damaged_is_not_repaired_and_the_command_that_makes_it_is_named(tmp_path: Path) -> None:
    with publish(tmp_path / "rag-token", "rag-model", config={"variant": "token"}) as draft:
        (draft.folder / "weights").write_text("weights")
        draft.details["inputs"] = {"index": "/runs/index", "questions": "/q.jsonl", "dev": "/d.jsonl"}
    flip(tmp_path / "rag-token" / "weights")
    command = "rag train --variant token --index /runs/index --questions /q.jsonl --dev /d.jsonl --config FILE --out "
    with pytest.raises(ArtifactError, match=command):
        repair(tmp_path / "rag-token")
    report = verify(tmp_path / "rag-token")
    assert command in report.remedy(report.findings[0])


def test_a_folder_without_artifacts_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match="holds no artifact"):
        artifacts_below(tmp_path)
    with pytest.raises(ArtifactError, match="There is no folder"):
        artifacts_below(tmp_path / "nowhere")
