"""`rag verify`: check artifacts on disk, and repair what is damaged, without Prefect, Ray or MLflow."""

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
    paths: Annotated[list[Path], typer.Argument(help="Artifacts, or folders that hold some.", metavar="PATH…")],
    repair: Annotated[
        bool, typer.Option("--repair", help="Make damaged files again from the inputs, byte for byte.")
    ] = False,
    source: Annotated[
        list[Path] | None, typer.Option(help="Source of a corpus, where it is not where it was; may be repeated.")
    ] = None,
    corpus: Annotated[Path | None, typer.Option(help="The corpus, where it is not where it was.")] = None,
    embeddings: Annotated[Path | None, typer.Option(help="The embeddings, where they are not where they were.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Check artifacts completely: manifest, every file, foreign files, content. Exit code 2 if anything is wrong.

    --repair makes only the damaged files again: shards of a corpus, of
    embeddings and of an index, and either file of predictions. A file takes
    its place only if it is byte for byte what was published.
    """
    from rag_core.storage.inputs import GivenInputs
    from rag_core.verification.verification import artifacts_below

    given = GivenInputs(tuple(source or ()), corpus, embeddings)
    found = list(dict.fromkeys(artifact for path in paths for artifact in artifacts_below(path)))
    reports = [_examine(path, given, repair) for path in found]
    if as_json:
        typer.echo(json.dumps(as_json_object(reports), ensure_ascii=False))
    else:
        for report in reports:
            _print(report)
    if any(report.findings for report in reports):
        raise typer.Exit(2)


def _examine(path: Path, given: GivenInputs, repair: bool) -> Report:
    from rag_core.verification.repair import repair as make_again
    from rag_core.verification.verification import verify as examine

    report = examine(path, given)
    if not (repair and report.manifest and report.findings):
        return report
    repaired, refusal = [], ""
    try:
        repaired = make_again(path, given)
    except RagError as error:
        refusal = str(error)
    report = examine(path, given)
    report.repaired = repaired
    if refusal:
        report.notes.append(refusal)
    return report


def as_json_object(reports: list[Report]) -> dict[str, Any]:
    """All findings, as `--json` prints them."""
    artifacts = [
        {
            "path": str(report.path),
            "kind": report.manifest.kind if report.manifest else None,
            "fingerprint": report.manifest.fingerprint if report.manifest else None,
            "models": _models(report),
            "findings": [
                {
                    "file": one.file,
                    "state": one.state,
                    "expected": one.expected,
                    "found": one.found,
                    "remedy": report.remedy(one),
                }
                for one in report.findings
            ],
            "repaired": report.repaired,
            "notes": report.notes,
        }
        for report in reports
    ]
    return {"ok": not any(report.findings for report in reports), "artifacts": artifacts}


def _models(report: Report) -> dict[str, str]:
    """The models that an artifact was made with, by role: a hub's with its commit."""
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
        console.print(f"  made again, byte for byte: {', '.join(report.repaired)}")
    if report.findings:
        table = Table("file", "expected", "found", "how to repair")
        for one in report.findings:
            table.add_row(*(_short(cell) for cell in (one.file, one.expected, one.found, report.remedy(one))))
        console.print(table)
    for note in report.notes:
        console.print(f"  {note}", style="yellow", soft_wrap=True)


def _short(cell: str) -> str:
    """A SHA-256 by its beginning, for the table."""
    is_sha = len(cell) == 64 and set(cell) <= set("0123456789abcdef")
    return f"SHA-256 {cell[:12]}…" if is_sha else cell
