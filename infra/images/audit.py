"""Looks up known vulnerabilities of all pinned packages with pip-audit, and says so if no lookup was possible.

Exit codes: 0 without findings, 1 with findings, 3 if the advisory source could not be reached and nothing was checked.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

UNREACHABLE: Final = 3
TIMEOUT_S: Final = 600


def main() -> int:
    parser = argparse.ArgumentParser(prog="python infra/images/audit.py", description=__doc__.partition("\n\n")[0])
    parser.add_argument("constraints", type=Path, help="pinned packages with hashes")
    parser.add_argument("--pip-audit", default="pip-audit", help="program to run (default: %(default)s)")
    parser.add_argument("--source", default="osv", help="advisory source of pip-audit: osv or pypi (default: osv)")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.json"
        command = [options.pip_audit, "--requirement", str(options.constraints), "--disable-pip", "--require-hashes"]
        command += ["--vulnerability-service", options.source, "--progress-spinner", "off"]
        command += ["--format", "json", "--output", str(report)]
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=TIMEOUT_S)
        found = json.loads(report.read_text()) if report.exists() and report.stat().st_size else None
    if found is None:
        problem = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
        print(f"audit: nothing was checked: the advisory source {options.source!r} gave no answer: {problem}")
        print("audit: run `make audit` where the source is reachable, or select another one with AUDIT_SOURCE=pypi")
        return UNREACHABLE
    findings = vulnerabilities(found)
    print(
        "\n".join([*findings, f"audit: {len(found['dependencies'])} packages checked, {len(findings)} vulnerabilities"])
    )
    return 1 if findings else 0


def vulnerabilities(report: Mapping[str, Any]) -> list[str]:
    """Returns one line per finding of a report of pip-audit: package, id and fixed versions."""
    lines = []
    for package in report["dependencies"]:
        for one in package.get("vulns", ()):
            fixed = ", ".join(one["fix_versions"]) or "no version"
            lines.append(f"{package['name']} {package['version']}: {one['id']}, fixed in {fixed}")
    return sorted(lines)


if __name__ == "__main__":
    sys.exit(main())
