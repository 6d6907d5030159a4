"""Prints the third-party requirements of members, from which an image's dependency layers are built.

``python dependencies.py platform[cluster,s3] serving`` reads each folder's ``pyproject.toml``, follows members that
require each other, and prints one requirement per line. With ``--shared-with MEMBER...`` it prints only
requirements that both groups have: two images store and pull that layer once.

``python dependencies.py --hashed NAME...`` prints the packages' entries of ``constraints-hashed.txt`` with the hashes
of their files. ``--check`` reads ``name==version`` lines and fails if the file lacks one of them. The script uses only
the standard library.
"""

from __future__ import annotations

import argparse
import re
import sys
import tomllib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Final

_REQUIREMENT = re.compile(r"^(?P<name>[A-Za-z0-9._-]+)(?:\[(?P<extras>[^\]]*)\])?(?P<versions>.*)$")
_MEMBER = "reelway-"
HASHED: Final = Path("constraints-hashed.txt")


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


def read_pins(text: str) -> dict[str, list[str]]:
    """Returns package name -> its entries, each ``name==version`` with markers and hashes, as in the file."""
    found: dict[str, list[str]] = {}
    for entry in re.split(r"\n(?=\S)", text.strip()):
        found.setdefault(normalise(entry.partition("==")[0]), []).append(entry)
    return found


def hashed_entries(names: Iterable[str], pins: Mapping[str, list[str]]) -> list[str]:
    """Returns the entries of packages.

    Raises:
        SystemExit: if a package has none, or one without a hash.
    """
    entries = []
    for name in names:
        own = pins.get(normalise(name), [])
        if not own or not all("--hash=sha256:" in entry for entry in own):
            raise SystemExit(f"{HASHED}: no version with hashes of {name!r}; run `make constraints`")
        entries += own
    return entries


def unknown_packages(installed: Iterable[str], pins: Mapping[str, list[str]]) -> list[str]:
    """Returns the ``name==version`` lines that no entry has."""
    known = {entry.split()[0] for entries in pins.values() for entry in entries}
    known = {f"{normalise(pin.partition('==')[0])}=={pin.partition('==')[2]}" for pin in known}
    lines = filter(None, (line.strip() for line in installed))
    return [line for line in lines if f"{normalise(line.partition('==')[0])}=={line.partition('==')[2]}" not in known]


def normalise(name: str) -> str:
    """Returns a package's name as PEP 503 compares it."""
    return re.sub(r"[-_.]+", "-", name.strip()).lower()


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
    parser.add_argument("members", nargs="*", metavar="MEMBER", help="folder of a member, with extras in brackets")
    parser.add_argument(
        "--shared-with", nargs="+", metavar="MEMBER", help="print only requirements that these members have as well"
    )
    parser.add_argument("--hashed", nargs="+", metavar="NAME", help="print the entries of these packages with hashes")
    parser.add_argument("--check", action="store_true", help="fail if a package of standard input is not pinned")
    options = parser.parse_args()
    if options.check:
        if unknown := unknown_packages(sys.stdin, read_pins(HASHED.read_text())):
            raise SystemExit(f"{HASHED}: installed without a pinned hash: {', '.join(unknown)}; run `make constraints`")
        return
    if options.hashed:
        print("\n".join(hashed_entries(options.hashed, read_pins(HASHED.read_text()))))
        return
    found = requirements(options.members, Path.cwd())
    if options.shared_with:
        found = shared_requirements(found, requirements(options.shared_with, Path.cwd()))
    print("\n".join(found))


if __name__ == "__main__":
    main()
