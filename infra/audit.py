"""Check requirements.lock for known vulnerabilities with pip-audit. If its database is unreachable, print a notice.

    python infra/audit.py [LOCK FILE]

Exit codes: 0 none known, or not checked (the notice says so); 1 some are known, or pip-audit failed.
pip-audit itself reports success if the index knows none of the packages; this script reports that as not checked.
"""

from __future__ import annotations

import json
import subprocess
import sys
import urllib.request
from pathlib import Path

# A small page of the database that pip-audit queries.
PROBE = "https://pypi.org/pypi/pip-audit/2.10.0/json"
PROBE_SECONDS = 5
SECONDS = 300


def main(lock: Path) -> int:
    """Print the known vulnerabilities; returns the exit code."""
    reason = unreachable()
    if reason:
        return not_checked(lock, reason)
    options = ["--no-deps", "--disable-pip", "--progress-spinner", "off", "--format", "json"]
    command = [sys.executable, "-m", "pip_audit", "--requirement", str(lock), *options]
    try:
        result = subprocess.run(command, capture_output=True, text=True, timeout=SECONDS)
    except subprocess.TimeoutExpired:
        return not_checked(lock, f"no answer within {SECONDS} s")
    return judge(lock, result.returncode, result.stdout, result.stderr)


def judge(lock: Path, code: int, output: str, errors: str) -> int:
    """Interpret pip-audit's exit code, its JSON output, and its standard error; returns our exit code."""
    try:
        packages = json.loads(output)["dependencies"]
    except (ValueError, KeyError):
        if "ServiceError" in errors or "ConnectionError" in errors:
            return not_checked(lock, errors.strip().splitlines()[-1][:200])
        print(f"pip-audit failed with exit code {code}:\n{errors}", file=sys.stderr)
        return 1
    vulnerabilities = [(package, entry) for package in packages for entry in package.get("vulns", [])]
    for package, entry in vulnerabilities:
        fixed = ", ".join(entry["fix_versions"]) or "no release yet"
        print(f"{lock}: {package['name']} {package['version']} has {entry['id']}; fixed in {fixed}", file=sys.stderr)
    skipped = [package["name"] for package in packages if "skip_reason" in package]
    if len(skipped) == len(packages):
        return not_checked(lock, "the index knows none of the packages")
    print(f"pip-audit: {len(packages) - len(skipped)} packages checked, {len(vulnerabilities)} known vulnerabilities.")
    if skipped:
        print(f"pip-audit: not in the database: {', '.join(skipped)}")
    return 1 if vulnerabilities else 0


def unreachable() -> str:
    """Why the database cannot be reached, or an empty string."""
    try:
        with urllib.request.urlopen(PROBE, timeout=PROBE_SECONDS) as response:
            json.load(response)
    except (OSError, ValueError) as error:
        return str(error)
    return ""


def not_checked(lock: Path, reason: str) -> int:
    """Print the notice that nothing was checked; returns exit code 0."""
    print(
        f"NOTICE: {lock} was not checked for known vulnerabilities: the advisory database cannot be reached ({reason})."
    )
    return 0


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1] if len(sys.argv) > 1 else "requirements.lock")))
