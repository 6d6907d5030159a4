"""Prints the third-party requirements of members, from which an image's dependency layers are built.

``python dependencies.py platform[cluster,s3] serving`` reads each folder's ``pyproject.toml``, follows members that
require each other, and prints one requirement per line. With ``--shared-with MEMBER...`` it prints only
requirements that both groups have: two images store and pull that layer once. The script uses only the standard
library.
"""

from __future__ import annotations

import argparse
import re
import tomllib
from collections.abc import Iterable
from pathlib import Path

_REQUIREMENT = re.compile(r"^(?P<name>[A-Za-z0-9._-]+)(?:\[(?P<extras>[^\]]*)\])?(?P<versions>.*)$")
_MEMBER = "reelway-"


def requirements(members: Iterable[str], root: Path) -> list[str]:
    """Returns the third-party requirements of the members, sorted and unique.

    Raises:
        SystemExit: if a member or an extra does not exist.
    """
    found: set[str] = set()
    waiting, visited = [_parse_member(member) for member in members], set[tuple[str, str]]()
    while waiting:
        folder, extras = waiting.pop()
        project = tomllib.loads((root / folder / "pyproject.toml").read_text())["project"]
        selected = list(project["dependencies"]) if (folder, "") not in visited else []
        visited.add((folder, ""))
        for extra in extras - {extra for name, extra in visited if name == folder}:
            if extra not in project.get("optional-dependencies", {}):
                raise SystemExit(f"{folder} has no extra {extra!r}; it has {sorted(project['optional-dependencies'])}")
            visited.add((folder, extra))
            selected += project["optional-dependencies"][extra]
        for requirement in selected:
            if requirement.startswith(_MEMBER):
                waiting.append(_parse_member(requirement.removeprefix(_MEMBER)))
            else:
                found.add(requirement)
    return sorted(found)


def shared_requirements(first: Iterable[str], second: Iterable[str]) -> list[str]:
    """Returns the requirements of both lists, sorted, with the extras and version bounds that both have."""
    known: dict[str, list[tuple[set[str], str]]] = {}
    for requirement in second:
        name, extras = _parse_member(requirement)
        known.setdefault(name, []).append((extras, _versions(requirement)))
    found = set()
    for requirement in first:
        name, extras = _parse_member(requirement)
        for their_extras, their_versions in known.get(name, ()):
            common = ",".join(sorted(extras & their_extras))
            versions = _versions(requirement) if _versions(requirement) == their_versions else ""
            found.add(name + (f"[{common}]" if common else "") + versions)
    return sorted(found)


def _parse_member(member: str) -> tuple[str, set[str]]:
    match = _REQUIREMENT.match(member)
    if not match:
        raise SystemExit(f"{member!r} is not a member; expected a name such as platform[cluster]")
    extras = match["extras"] or ""
    return match["name"], {extra.strip() for extra in extras.split(",") if extra.strip()}


def _versions(requirement: str) -> str:
    match = _REQUIREMENT.match(requirement)
    return match["versions"].strip() if match else ""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n\n")[0] if __doc__ else None)
    parser.add_argument("members", nargs="+", metavar="MEMBER", help="folder of a member, with extras in brackets")
    parser.add_argument(
        "--shared-with", nargs="+", metavar="MEMBER", help="print only requirements that these members have as well"
    )
    options = parser.parse_args()
    found = requirements(options.members, Path.cwd())
    if options.shared_with:
        found = shared_requirements(found, requirements(options.shared_with, Path.cwd()))
    print("\n".join(found))


if __name__ == "__main__":
    main()
