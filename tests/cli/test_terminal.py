"""Users' text is printed as it is: never as markup, as an emoji's name, or as a control sequence."""

from __future__ import annotations

import ast
import io
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from rich.progress import Progress
from rich.table import Table

from rag_core.corpus.passages import Passage
from rag_core.evaluation.scores import by_type
from rag_core.model.reader import Answer, Candidate, ReadPassage
from tasks.markdown import code_cell, table, text_cell
from tasks.results import StageResult
from tasks.terminal import Terminal, printable, say, text_column

ROOT = Path(__file__).resolve().parents[2]
HOSTILE = [
    "runs/a[/b]",
    "[red]x",
    "[link=http://x]y[/link]",
    "[/]",
    ":smile:",
    "[bold]a[/bold]",
    "\\[x]",
    "[@click=f]z",
]


@pytest.fixture
def printed(monkeypatch: pytest.MonkeyPatch) -> io.StringIO:
    """The output of the commands' console, which is wide enough to break no line."""
    import flows.cli.commands.artifacts
    import flows.cli.commands.exchange
    import flows.cli.printing

    written = io.StringIO()
    for module in (flows.cli.printing, flows.cli.commands.artifacts, flows.cli.commands.exchange):
        monkeypatch.setattr(module, "console", Terminal(file=written, width=400))
    return written


@pytest.mark.parametrize("text", HOSTILE)
def test_the_commands_print_paths_types_answers_and_ids_as_they_are(printed: io.StringIO, text: str) -> None:
    from flows.cli.printing import print_answer, print_pages, print_pipeline, print_scores, print_stage

    stage = StageResult(
        stage=text, path=Path(text), fingerprint="0", run_id=text, counts={"contexts": 9, "contexts_cut": 9}
    )
    print_stage(stage)
    evaluation = by_type([(text, {"em": 1.0})])
    print_scores(evaluation)
    print_pipeline(SimpleNamespace(scores={text: evaluation}, stages=[stage]))  # type: ignore[arg-type]
    passage = ReadPassage(Passage(text, text, text), 0.5, 0.5)
    print_answer(Answer(text, -1.0, (Candidate(text, -1.0), Candidate(text, -2.0)), (passage,)))
    in_its_folder = str(Path(text)) == text  # a path has no two slashes in a row
    assert printed.getvalue().count(text) == 11 + in_its_folder
    print_pages()


@pytest.mark.parametrize("text", HOSTILE)
def test_findings_of_verify_are_printed_as_they_are(printed: io.StringIO, text: str) -> None:
    from flows.cli.commands.artifacts import _print

    finding = SimpleNamespace(file=text, state="", expected=text, found=text)
    report = SimpleNamespace(
        path=text, manifest=None, repaired=[text], findings=[finding], notes=[text], remedy=lambda finding: text
    )
    _print(report)  # type: ignore[arg-type]
    assert printed.getvalue().count(text) == 7


@pytest.mark.parametrize("text", HOSTILE)
def test_errors_warnings_and_progress_are_printed_as_they_are(
    text: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    import flows.cli.main
    from tasks.notices import warn

    monkeypatch.setenv("COLUMNS", "300")
    with pytest.raises(SystemExit):
        flows.cli.main.fail(f"{text}: wrong")
    warn(f"{text} warned")
    say(f"{text} said", style="yellow")
    written = io.StringIO()
    with Progress(
        text_column("{task.description}"), console=Terminal(file=written, force_terminal=True, width=200)
    ) as bar:
        bar.add_task(text, total=1)
    shown = capsys.readouterr().err
    assert f"Error: {text}: wrong" in shown
    assert f"{text} warned" in shown
    assert f"{text} said" in shown
    assert text in written.getvalue()


@pytest.mark.parametrize("text", HOSTILE)
def test_a_setting_that_the_command_line_refuses_is_quoted_as_it_is(
    text: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from flows.cli.main import app, run

    monkeypatch.setenv("COLUMNS", "300")
    monkeypatch.setattr(sys, "argv", ["rag", "retrieve", "--index", "i", "--questions", "q", "--match", text])
    with pytest.raises(SystemExit) as ended:
        run()
    assert ended.value.code == 2
    assert repr(text) in capsys.readouterr().err
    monkeypatch.setattr(sys, "argv", ["rag", text])
    with pytest.raises(SystemExit) as ended:
        app()
    assert ended.value.code == 2
    assert f"No such command {text!r}" in capsys.readouterr().err


def test_a_terminal_reads_no_markup_even_where_it_is_asked_to() -> None:
    written = io.StringIO()
    console = Terminal(file=written, width=200, force_terminal=True)
    inside = Table("[b]head[/b]", title="[i]title[/i]", caption=":smile:")
    inside.add_row("[/row]")
    console.print("[red]x[/red] :smile:", inside, markup=True, emoji=True, highlight=True)
    for text in ("[red]x[/red] :smile:", "[b]head[/b]", "[i]title[/i]", "[/row]"):
        assert text in written.getvalue()


def test_control_characters_appear_as_escapes() -> None:
    written = io.StringIO()
    Terminal(file=written, width=200).print("a\x1b[31mb\rc\x07d\u202ee\x9bf", "g\nh")
    assert written.getvalue() == "a\\x1b[31mb\\x0dc\\x07d\\u202ee\\x9bf g\nh\n"
    assert printable("東京 é 😀") == "東京 é 😀"


def test_consoles_and_markup_are_made_in_one_module_alone() -> None:
    """All output goes through `tasks/terminal.py`; this finds consoles, progress bars and markup elsewhere."""
    forbidden = {
        "Console",
        "TextColumn",
        "escape",
        "from_markup",
        "render_markup",
        "print",
        "rprint",
        "get_console",
        "Prompt",
    }
    violations = []
    for file in [*(ROOT / "flows").rglob("*.py"), *(ROOT / "tasks").rglob("*.py"), *(ROOT / "rag_core").rglob("*.py")]:
        if file == ROOT / "tasks/terminal.py":
            continue
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            names = {alias.name for alias in node.names} if isinstance(node, ast.ImportFrom) else set()
            names |= {node.attr} if isinstance(node, ast.Attribute) else set()
            of_rich = not isinstance(node, ast.ImportFrom) or (node.module or "").startswith("rich")
            if of_rich and names & forbidden - ({"escape", "print"} if isinstance(node, ast.Attribute) else set()):
                violations.append(f"{file.relative_to(ROOT)}:{node.lineno} {names & forbidden}")
            if isinstance(node, ast.keyword) and node.arg == "markup":
                violations.append(f"{file.relative_to(ROOT)}:{node.value.lineno} markup=")
    assert violations == []


@pytest.mark.parametrize(
    ("text", "cell", "code"),
    [
        ("a|b", r"a\|b", r"`a\|b`"),
        ("`x`", r"\`x\`", "`` `x` ``"),
        ("<b>[y](z)</b>", r"\<b\>\[y\](z)\</b\>", "`<b>[y](z)</b>`"),
        ("one\ntwo", r"one\\ntwo", r"`one\ntwo`"),
        ("runs/a[/b]", r"runs/a\[/b\]", "`runs/a[/b]`"),
    ],
)
def test_a_cell_of_a_markdown_table_holds_any_text(text: str, cell: str, code: str) -> None:
    assert (text_cell(text), code_cell(text)) == (cell, code)
    rows = table(["", ""], [[text_cell(text), code_cell(text)], ["plain | pipe", "two\nlines"]]).split("\n")
    assert rows[2:] == [f"| {cell} | {code} |", r"| plain \| pipe | two lines |"]
