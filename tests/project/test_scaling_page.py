"""docs/scaling.md holds what its program prints, for the rates that the page states."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def test_every_computed_row_of_the_page_is_what_the_formulas_give(tmp_path: Path) -> None:
    page = (ROOT / "docs" / "scaling.md").read_text(encoding="utf-8")
    stated = re.search(r"float32 (\d+) GFLOP/s, bfloat16 (\d+) GFLOP/s", page)
    assert stated, "the page must state the rates that it was computed with"
    machine = {"gflops_float32": float(stated[1]), "gflops_bfloat16": float(stated[2])}
    (tmp_path / "results.json").write_text(json.dumps({"machine": machine}), encoding="utf-8")
    command = [sys.executable, "-m", "benchmarks.stages.scaling", "--results", str(tmp_path / "results.json")]
    printed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    rows = [line for line in printed.splitlines() if line.startswith("| ")]
    assert len(rows) > 12
    assert [row for row in rows if row not in page] == []
