"""Known vulnerabilities in requirements.lock, by pip-audit; a notice instead where its database cannot be reached.

    python infra/audit.py [LOCK FILE]

Exit codes: 0 none known, or not checked, which is then said; 1 some are known.
pip-audit itself reports success when the index has none of the packages, so that case is told apart here.
"""

from __future__ import annotations

import json
import subprocess
import sys
import urllib.request
from pathlib import Path

# One small page of the database that pip-audit asks.
PROBE = "https://pypi.org/pypi/pip-audit/2.10.0/json"
PROBE_SECONDS = 5
SECONDS = 300


def main(lock: Path) -> int:
    """Print what was found; returns the exit code."""
    why = unreachable()
    if why:
        return not_checked(lock, why)
    options = ["--no-deps", "--disable-pip", "--progress-spinner", "off", "--format", "json"]
    command = [sys.executable, "-m", "pip_audit", "--requirement", str(lock), *options]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=SECONDS)
    except subprocess.TimeoutExpired:
        return not_checked(lock, f"no answer within {SECONDS} s")
    return judge(lock, done.returncode, done.stdout, done.stderr)


def judge(lock: Path, code: int, output: str, errors: str) -> int:
    """What pip-audit's answer means: its exit code, its JSON, and what it wrote to standard error."""
    try:
        packages = json.loads(output)["dependencies"]
    except (ValueError, KeyError):
        if "ServiceError" in errors or "ConnectionError" in errors:
            return not_checked(lock, errors.strip().splitlines()[-1][:200])
        print(f"pip-audit failed with exit code {code}:\n{errors}", file=sys.stderr)
        return 1
    found = [(package, known) for package in packages for known in package.get("vulns", [])]
    for package, known in found:
        mended = ", ".join(known["fix_versions"]) or "no release yet"
        print(f"{lock}: {package['name']} {package['version']} has {known['id']}; mended in {mended}", file=sys.stderr)
    skipped = [package["name"] for package in packages if "skip_reason" in package]
    if len(skipped) == len(packages):
        return not_checked(lock, "the index knows none of the packages")
    print(f"pip-audit: {len(packages) - len(skipped)} packages checked, {len(found)} known vulnerabilities.")
    if skipped:
        print(f"pip-audit: not in the database: {', '.join(skipped)}")
    return 1 if found else 0


def unreachable() -> str:
    """Why the database cannot be asked, or an empty string."""
    try:
        with urllib.request.urlopen(PROBE, timeout=PROBE_SECONDS) as answer:
            json.load(answer)
    except (OSError, ValueError) as error:
        return str(error)
    return ""


def not_checked(lock: Path, why: str) -> int:
    """The notice."""
    print(f"NOTICE: {lock} was not checked for known vulnerabilities: the advisory database cannot be reached ({why}).")
    return 0


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1] if len(sys.argv) > 1 else "requirements.lock")))
