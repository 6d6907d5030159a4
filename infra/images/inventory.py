"""Prints what an image contains, as JSON: Python packages, Debian packages and their licences.

The script runs inside the image, read from standard input, and uses only the standard library.
"""

from __future__ import annotations

import json
import re
import sys
from importlib.metadata import Distribution, distributions
from pathlib import Path

DPKG_STATUS = Path("/var/lib/dpkg/status")
DOCUMENTS = Path("/usr/share/doc")
_LONGEST_NAME = 100
"""Longer ``License`` fields contain the licence's text instead of its name."""


def python_packages() -> list[dict[str, str]]:
    """Returns name, version and licence of every installed distribution."""
    found = {}
    for one in distributions():
        name = one.metadata["Name"]
        if name:
            found[re.sub(r"[-_.]+", "-", name).lower()] = {
                "name": name, "version": one.version, "licence": python_licence(one),
            }  # fmt: skip
    return [found[name] for name in sorted(found)]


def python_licence(distribution: Distribution) -> str:
    """Returns the SPDX expression or else the name of a distribution's licence; empty if it states none."""
    metadata = distribution.metadata
    if expression := metadata.get("License-Expression"):
        return str(expression)
    named = (metadata.get("License") or "").strip()
    if named and "\n" not in named and len(named) <= _LONGEST_NAME and named.upper() != "UNKNOWN":
        return str(named)
    prefix = "License :: "
    classifiers = [one for one in metadata.get_all("Classifier") or () if one.startswith(prefix)]
    names = [one.removeprefix(prefix).removeprefix("OSI Approved :: ") for one in classifiers]
    return " AND ".join(sorted(name for name in names if name != "OSI Approved"))


def debian_packages(status: Path = DPKG_STATUS, documents: Path = DOCUMENTS) -> list[dict[str, str]]:
    """Returns name, version, architecture and licences of every installed Debian package."""
    if not status.exists():
        return []
    packages = []
    for paragraph in status.read_text(encoding="utf-8", errors="replace").split("\n\n"):
        fields = dict(re.findall(r"^([A-Za-z-]+): (.*)$", paragraph, re.MULTILINE))
        if fields.get("Status") == "install ok installed":
            name = fields["Package"]
            packages.append({
                "name": name, "version": fields["Version"], "architecture": fields.get("Architecture", ""),
                "licence": debian_licence(documents / name / "copyright"),
            })  # fmt: skip
    return sorted(packages, key=lambda one: one["name"])


def debian_licence(copyright_file: Path) -> str:
    """Returns the licence names of a copyright file: its fields, or the common licences that a free text refers to."""
    try:
        text = copyright_file.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""
    fields = re.findall(r"^License:[ \t]*(\S.*)$", text, re.MULTILINE)
    referred = re.findall(r"/usr/share/common-licenses/([A-Za-z0-9.+-]*[A-Za-z0-9+])", text)
    return ", ".join(sorted({name.strip() for name in fields or referred}))


def debian_release() -> str:
    try:
        fields = dict(re.findall(r'^([A-Z_]+)="?([^"\n]*)"?$', Path("/etc/os-release").read_text(), re.MULTILINE))
    except OSError:
        return ""
    return fields.get("PRETTY_NAME", "")


if __name__ == "__main__":
    contents = {
        "system": debian_release(), "python_version": sys.version.split()[0],
        "python": python_packages(), "debian": debian_packages(),
    }  # fmt: skip
    json.dump(contents, sys.stdout)
