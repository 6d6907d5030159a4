"""Prints what members need from outside, so that an image's dependency layer changes only when that does.

``python dependencies.py platform[cluster,s3] serving``: reads each folder's ``pyproject.toml``, follows members that
name each other, and prints one requirement a line. Runs in the build with nothing but the standard library.
"""

from __future__ import annotations

import re
import sys
import tomllib
from collections.abc import Iterable
from pathlib import Path

_REQUIREMENT = re.compile(r"^(?P<name>[A-Za-z0-9._-]+)(?:\[(?P<extras>[^\]]*)\])?")
_MEMBER = "reelway-"


def requirements(members: Iterable[str], root: Path) -> list[str]:
    """Third-party requirements of the members, sorted, each once.

    Raises:
        SystemExit: a member or an extra does not exist.
    """
    found: set[str] = set()
    waiting, seen = [_split(member) for member in members], set[tuple[str, str]]()
    while waiting:
        folder, extras = waiting.pop()
        project = tomllib.loads((root / folder / "pyproject.toml").read_text())["project"]
        wanted = list(project["dependencies"]) if (folder, "") not in seen else []
        seen.add((folder, ""))
        for extra in extras - {extra for name, extra in seen if name == folder}:
            if extra not in project.get("optional-dependencies", {}):
                raise SystemExit(f"{folder} has no extra {extra!r}; it has {sorted(project['optional-dependencies'])}")
            seen.add((folder, extra))
            wanted += project["optional-dependencies"][extra]
        for requirement in wanted:
            if requirement.startswith(_MEMBER):
                waiting.append(_split(requirement.removeprefix(_MEMBER)))
            else:
                found.add(requirement)
    return sorted(found)


def _split(member: str) -> tuple[str, set[str]]:
    match = _REQUIREMENT.match(member)
    if not match:
        raise SystemExit(f"{member!r} is not a member; expected a name such as platform[cluster]")
    extras = match["extras"] or ""
    return match["name"], {extra.strip() for extra in extras.split(",") if extra.strip()}


if __name__ == "__main__":
    print("\n".join(requirements(sys.argv[1:], Path.cwd())))
