"""`make lint` fails when a locked package has a known vulnerability, and says so when that could not be looked up."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import pytest

from tests.support.servers.processes import free_port

ROOT = Path(__file__).resolve().parents[2]
spec = importlib.util.spec_from_file_location("audit", ROOT / "infra" / "audit.py")
assert spec
assert spec.loader
audit = importlib.util.module_from_spec(spec)
spec.loader.exec_module(audit)

LOCK = Path("requirements.lock")
SOUND = {"name": "sound", "version": "1.0", "vulns": []}
UNKNOWN = {"name": "unknown", "skip_reason": "Dependency not found on PyPI and could not be audited: unknown (1.0)"}
BAD = {"name": "bad", "version": "1.0", "vulns": [{"id": "PYSEC-2026-1", "fix_versions": ["1.1"]}]}


def answer(*packages: dict[str, object]) -> str:
    return json.dumps({"dependencies": packages, "fixes": []})


def test_a_known_vulnerability_fails_and_names_package_and_remedy(capsys: pytest.CaptureFixture[str]) -> None:
    assert audit.judge(LOCK, 1, answer(SOUND, BAD, UNKNOWN), "Found 1 known vulnerability") == 1
    assert "bad 1.0 has PYSEC-2026-1; fixed in 1.1" in capsys.readouterr().err


def test_sound_packages_pass_and_those_not_found_are_listed(capsys: pytest.CaptureFixture[str]) -> None:
    assert audit.judge(LOCK, 0, answer(SOUND, UNKNOWN), "") == 0
    out = capsys.readouterr().out
    assert "1 packages checked, 0 known" in out
    assert "unknown" in out


def test_an_index_that_knows_no_package_is_no_clean_bill(capsys: pytest.CaptureFixture[str]) -> None:
    assert audit.judge(LOCK, 0, answer(UNKNOWN), "No known vulnerabilities found") == 0
    assert "NOTICE: requirements.lock was not checked" in capsys.readouterr().out


def test_a_fault_of_pip_audit_fails(capsys: pytest.CaptureFixture[str]) -> None:
    assert audit.judge(LOCK, 2, "", "unrecognized arguments: --formt") == 1
    assert "unrecognized" in capsys.readouterr().err


def test_without_a_network_the_notice_comes_at_once(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(audit, "PROBE", f"http://127.0.0.1:{free_port()}/pypi/pip-audit/json")
    monkeypatch.setattr(audit.subprocess, "run", lambda *_, **__: pytest.fail("pip-audit tries for minutes"))
    assert audit.main(LOCK) == 0
    assert "NOTICE" in capsys.readouterr().out
