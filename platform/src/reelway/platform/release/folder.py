"""A release as a folder: its manifest in and out, and whether its files are the ones the manifest names.

Refuses a manifest it cannot read in full, and any file that is missing, additional, cut short or changed. Whether
the release is *wanted* (signature, gates, compatibility) is for ``verify``.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection, Mapping
from pathlib import Path

from pydantic import ValidationError

from reelway.platform.contracts.manifest import MANIFEST_FILE, RELEASE_FILES, SCHEMA_VERSION, FileEntry, Manifest
from reelway.platform.durable import write_json
from reelway.platform.errors import DigestMismatchError, IncompatibleReleaseError, ReleaseNotFoundError


def describe_files(folder: Path) -> dict[str, FileEntry]:
    """Size and digest of every release file in ``folder``, as they are now.

    Raises:
        ReleaseNotFoundError: one of them is not there.
    """
    if missing := [name for name in RELEASE_FILES if not (folder / name).is_file()]:
        raise ReleaseNotFoundError(f"{folder} lacks {', '.join(missing)}; a release has {', '.join(RELEASE_FILES)}")
    return {name: _describe(folder / name) for name in RELEASE_FILES}


def read_manifest(folder: Path) -> Manifest:
    """The manifest of a release folder.

    Raises:
        ReleaseNotFoundError: there is none.
        IncompatibleReleaseError: it is not one that this version reads.
    """
    path = folder / MANIFEST_FILE
    try:
        raw = path.read_bytes()
    except FileNotFoundError:
        raise ReleaseNotFoundError(f"{folder} has no {MANIFEST_FILE}; it is not a release") from None
    return parse_manifest(raw, where=str(path))


def parse_manifest(raw: bytes, where: str) -> Manifest:
    """A manifest from its JSON.

    Args:
        raw: the bytes of ``manifest.json``.
        where: its place, for messages.

    Raises:
        DigestMismatchError: not JSON, or its list of files is not a release's.
        IncompatibleReleaseError: another schema version, or a field that is wrong.
    """
    try:
        body = json.loads(raw)
    except ValueError as error:
        raise DigestMismatchError(f"{where} is not JSON: {error}; the file is damaged, fetch it again") from error
    version = body.get("schema_version") if isinstance(body, dict) else None
    if version != SCHEMA_VERSION:
        raise IncompatibleReleaseError(
            f"{where} has schema version {version!r}, this version of Reelway reads {SCHEMA_VERSION}; "
            "use the Reelway that built it"
        )
    try:
        manifest = Manifest.model_validate(body)
    except ValidationError as error:
        raise IncompatibleReleaseError(f"{where} is invalid: {first_problem(error)}") from error
    assess_names(set(manifest.files), where)
    return manifest


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Write ``manifest.json``, whole or not at all."""
    write_json(folder / MANIFEST_FILE, manifest.model_dump(mode="json"))


def first_problem(error: ValidationError) -> str:
    """The first thing that pydantic found, on one line: field, value seen, what was expected."""
    problem = error.errors(include_url=False)[0]
    field = ".".join(str(part) for part in problem["loc"]) or "the whole"
    return f"{field}: {problem['msg']}, saw {str(problem['input'])[:80]!r}"


def assess_names(names: Collection[str], where: str) -> None:
    """Refuse a set of file names that is not exactly a release's; so no name can lead out of the folder.

    Raises:
        DigestMismatchError: files are missing or additional.
    """
    missing, extra = sorted(set(RELEASE_FILES) - set(names)), sorted(set(names) - set(RELEASE_FILES))
    if missing:
        raise DigestMismatchError(f"{where} lacks {', '.join(missing)}; the release is incomplete, fetch it again")
    if extra:
        raise DigestMismatchError(f"{where} has {', '.join(extra)}, which no release has; remove it or build again")


def assess_files(declared: Mapping[str, FileEntry], seen: Mapping[str, FileEntry], where: str) -> None:
    """Compare what a manifest declares with what is there.

    Raises:
        DigestMismatchError: a file is missing, additional, of another size, or of another content.
    """
    assess_names(seen, where)
    for name, expected in declared.items():
        found = seen[name]
        if found.size_bytes != expected.size_bytes:
            raise DigestMismatchError(
                f"{where}/{name} has {found.size_bytes} bytes, the manifest says {expected.size_bytes}; "
                "it was cut short or changed, fetch the release again"
            )
        if found.sha256 != expected.sha256:
            raise DigestMismatchError(
                f"{where}/{name} has SHA-256 {found.sha256[:12]}..., the manifest says {expected.sha256[:12]}...; "
                "its content was changed, fetch the release again"
            )


def check_files(folder: Path, manifest: Manifest) -> None:
    """Read every file of the folder and hold it against the manifest.

    Raises:
        DigestMismatchError: as ``assess_files``.
    """
    names = {path.name for path in folder.iterdir()} - {MANIFEST_FILE}
    assess_names(names, str(folder))
    assess_files(manifest.files, {name: _describe(folder / name) for name in sorted(names)}, str(folder))


def _describe(path: Path) -> FileEntry:
    with path.open("rb") as handle:
        digest = hashlib.file_digest(handle, "sha256").hexdigest()
        return FileEntry(sha256=digest, size_bytes=handle.tell())
