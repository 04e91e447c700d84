"""The house: no import circles, small rooms, files that can be read in one sitting, one spelling."""

from __future__ import annotations

import ast
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
CODE = ("rag_core", "demo_data", "tasks", "flows")
ALL_CODE = (*CODE, "tests", "benchmarks", "infra")
MOST_MODULES, MOST_LINES, MOST_LINES_OF_A_FUNCTION = 10, 400, 60
# Old data and old programs may use the former spelling: the alias, registered models, and this test.
FORMER_SPELLING = {"rag_core/__init__.py", "CHANGELOG.md", "tests/project/test_rooms.py"}


def modules() -> dict[str, Path]:
    """All modules by their dotted names."""
    named = {}
    for path in (path for folder in CODE for path in (ROOT / folder).rglob("*.py")):
        parts = path.relative_to(ROOT).with_suffix("").parts
        named[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return named


def imports_of(source: str, known: set[str]) -> set[str]:
    """The modules that a source imports, at its top, inside functions, or for type checking."""
    imported = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            imported |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            submodules = {f"{node.module}.{alias.name}" for alias in node.names} & known
            imported |= submodules or {node.module}
    return imported & known


def circles(imports: dict[str, set[str]]) -> Iterator[list[str]]:
    """Each module that can be reached from itself, with the way."""
    for start in imports:
        ways = [[start, after] for after in sorted(imports[start])]
        seen = set()
        while ways:
            way = ways.pop()
            if way[-1] == start:
                yield way
                break
            if way[-1] not in seen:
                seen.add(way[-1])
                ways += [[*way, after] for after in sorted(imports[way[-1]])]


def test_a_circle_is_found() -> None:
    known = {"a", "b", "c.d"}
    sources = {"a": "import b", "b": "def f():\n    from c import d", "c.d": "import a"}
    imports = {name: imports_of(source, known) for name, source in sources.items()}
    assert next(iter(circles(imports))) == ["a", "b", "c.d", "a"]


def test_no_module_imports_itself_by_way_of_others() -> None:
    named = modules()
    # The names at the top of the library are loaded on first use: nothing below asks for them.
    imports = {
        name: imports_of(path.read_text(encoding="utf-8"), set(named))
        for name, path in named.items()
        if name != "rag_core"
    }
    imports["rag_core"] = set()
    assert [" -> ".join(circle) for circle in circles(imports)] == []


@pytest.mark.parametrize("top", ALL_CODE)
def test_no_folder_has_more_modules_than_can_be_taken_in_at_a_glance(top: str) -> None:
    for folder in [ROOT / top, *(path for path in (ROOT / top).rglob("*") if path.is_dir())]:
        names = [path.name for path in folder.glob("*.py") if path.name != "__init__.py"]
        assert len(names) <= MOST_MODULES, f"{folder.relative_to(ROOT)} holds {len(names)} modules: {sorted(names)}"


@pytest.mark.parametrize("top", ALL_CODE)
def test_files_and_functions_can_be_read_in_one_sitting(top: str) -> None:
    too_long = []
    for path in (ROOT / top).rglob("*.py"):
        source = path.read_text(encoding="utf-8")
        name, lines = path.relative_to(ROOT), source.count("\n")
        too_long += [f"{name}: {lines} lines"] if lines > MOST_LINES else []
        for node in ast.walk(ast.parse(source)):
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)) and node.end_lineno:
                lines = node.end_lineno - node.lineno + 1
                too_long += [f"{name}, {node.name}: {lines} lines"] if lines > MOST_LINES_OF_A_FUNCTION else []
    assert too_long == []


def test_the_spelling_is_that_of_the_tools_beside_us() -> None:
    if not (ROOT / ".git").exists():
        pytest.skip("not a git checkout")
    command = ["git", "grep", "--untracked", "--ignore-case", "--files-with-matches", "artefact"]
    files = subprocess.run(command, cwd=ROOT, capture_output=True, text=True).stdout.split()
    assert set(files) <= FORMER_SPELLING
