"""`rag verify`: checks artifacts and repairs damaged files, without Prefect, Ray or MLflow."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table
from rich.text import Text

from flows.cli.printing import console
from rag_core.errors import RagError
from tasks.terminal import printable, styled

if TYPE_CHECKING:
    from rag_core.storage.inputs import GivenInputs
    from rag_core.verification.verification import Report


def add_to(app: typer.Typer) -> None:
    """Register the command."""
    app.command(rich_help_panel="Ask and inspect")(verify)


def verify(
    paths: Annotated[list[Path], typer.Argument(help="Artifacts, or folders that contain artifacts.", metavar="PATH…")],
    repair: Annotated[
        bool, typer.Option("--repair", help="Rebuild damaged files from the inputs, byte for byte.")
    ] = False,
    source: Annotated[
        list[Path] | None, typer.Option(help="A corpus's source, if it has moved; may be repeated.")
    ] = None,
    corpus: Annotated[Path | None, typer.Option(help="The corpus, if it has moved.")] = None,
    embeddings: Annotated[Path | None, typer.Option(help="The embeddings, if they have moved.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Check artifacts completely: manifest, every file, foreign files, content. Exit code 2 if anything is wrong.

    --repair rebuilds only the damaged files: shards of a corpus, of
    embeddings and of an index, and either file of predictions. A rebuilt file
    is put in place only if it equals the published file byte for byte.
    """
    from rag_core.storage.inputs import GivenInputs
    from rag_core.verification.verification import artifacts_below

    inputs = GivenInputs(tuple(source or ()), corpus, embeddings)
    artifacts = list(dict.fromkeys(artifact for path in paths for artifact in artifacts_below(path)))
    reports = [_examine(path, inputs, repair) for path in artifacts]
    if as_json:
        typer.echo(json.dumps(as_json_object(reports), ensure_ascii=False))
    else:
        for report in reports:
            _print(report)
    if any(report.findings for report in reports):
        raise typer.Exit(2)


def _examine(path: Path, inputs: GivenInputs, repair: bool) -> Report:
    """Verify an artifact; if `repair`, repair it and verify it again."""
    from rag_core.verification.repair import repair as repair_files
    from rag_core.verification.verification import verify as examine

    report = examine(path, inputs)
    if not (repair and report.manifest and report.findings):
        return report
    repaired, refusal = [], ""
    try:
        repaired = repair_files(path, inputs)
    except RagError as error:
        refusal = str(error)
    report = examine(path, inputs)
    report.repaired = repaired
    if refusal:
        report.notes.append(refusal)
    return report


def as_json_object(reports: list[Report]) -> dict[str, Any]:
    """The reports as the object that `--json` prints."""
    artifacts = [
        {
            "path": str(report.path),
            "kind": report.manifest.kind if report.manifest else None,
            "fingerprint": report.manifest.fingerprint if report.manifest else None,
            "models": _models(report),
            "findings": [
                {
                    "file": finding.file,
                    "state": finding.state,
                    "expected": finding.expected,
                    "found": finding.found,
                    "remedy": report.remedy(finding),
                }
                for finding in report.findings
            ],
            "repaired": report.repaired,
            "notes": report.notes,
        }
        for report in reports
    ]
    return {"ok": not any(report.findings for report in reports), "artifacts": artifacts}


def _models(report: Report) -> dict[str, str]:
    """The models that an artifact was made with, by role; a hub's model has its commit in the name."""
    details = report.manifest.details if report.manifest else {}
    roles = {"encoder": "encoder", "hf_rag": "checkpoint", "model": "model"}
    roles |= {"question_encoder": "question encoder", "generator": "generator"}
    return {role: str(details[name]) for name, role in roles.items() if name in details}


def _print(report: Report) -> None:
    kind = report.manifest.kind if report.manifest else "not readable"
    files = f", {len(report.manifest.files)} files" if report.manifest else ""
    state = styled(f"{len(report.findings)} findings", "red") if report.findings else styled("whole", "green")
    console.print(Text.assemble(printable(f"{report.path} ({kind}{files}): "), state), soft_wrap=True)
    for role, name in _models(report).items():
        console.print(f"  {role}: {name}", soft_wrap=True)
    if report.repaired:
        console.print(f"  rebuilt, byte for byte: {', '.join(report.repaired)}")
    if report.findings:
        table = Table("file", "expected", "found", "how to repair")
        for finding in report.findings:
            cells = (finding.file, finding.expected, finding.found, report.remedy(finding))
            table.add_row(*map(_short, cells))
        console.print(table)
    for note in report.notes:
        console.print(f"  {note}", style="yellow", soft_wrap=True)


def _short(cell: str) -> str:
    """Shorten a SHA-256 to its first digits, for the table."""
    is_sha = len(cell) == 64 and set(cell) <= set("0123456789abcdef")
    return f"SHA-256 {cell[:12]}…" if is_sha else cell
