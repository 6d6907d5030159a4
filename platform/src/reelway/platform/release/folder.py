"""A release as a folder: reads and writes its manifest, and checks its files against it.

A manifest that cannot be read completely is rejected, and so is a file that is missing, additional, truncated or
changed. ``verify`` checks everything else: signature, gates and compatibility.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from pydantic import ValidationError
from pydantic_core import from_json

from reelway.platform.atomic_files import atomic_file
from reelway.platform.contracts.manifest import (
    MANIFEST_FILE,
    MAX_MANIFEST_BYTES,
    RELEASE_FILES,
    SCHEMA_VERSION,
    FileEntry,
    Manifest,
)
from reelway.platform.errors import (
    DigestMismatchError,
    IncompatibleReleaseError,
    ReleaseError,
    ReleaseNotFoundError,
    StorageError,
)
from reelway.platform.release.regular_files import copy_bounded, open_regular_file, read_at_most


def describe_files(folder: Path) -> dict[str, FileEntry]:
    """Computes size and digest of every release file in ``folder``.

    Raises:
        ReleaseNotFoundError: if a file is missing.
    """
    if missing := [name for name in RELEASE_FILES if not (folder / name).is_file()]:
        raise ReleaseNotFoundError(f"{folder} lacks {', '.join(missing)}; a release has {', '.join(RELEASE_FILES)}")
    return {name: _describe(folder / name) for name in RELEASE_FILES}


def read_manifest(folder: Path) -> Manifest:
    """Reads the manifest of a release folder.

    Raises:
        ReleaseNotFoundError: if there is no manifest.
        DigestMismatchError: if it is not a manifest.
        IncompatibleReleaseError: if this version cannot read it.
    """
    path = folder / MANIFEST_FILE
    try:
        with open_regular_file(path) as file:
            raw = read_at_most(file, MAX_MANIFEST_BYTES, str(path))
    except FileNotFoundError:
        raise ReleaseNotFoundError(f"{folder} has no {MANIFEST_FILE}; it is not a release") from None
    return parse_manifest(raw, where=str(path))


def parse_manifest(raw: bytes, where: str) -> Manifest:
    """Parses a manifest.

    Args:
        raw: the bytes of ``manifest.json``.
        where: its path or URL, for messages.

    Raises:
        DigestMismatchError: if it is not JSON of at most 200 levels with distinct keys, or does not list exactly the
            files of a release.
        IncompatibleReleaseError: if it has another schema version, or an invalid field.
    """
    try:
        body = from_json(raw, allow_inf_nan=False)  # bounds nesting and numbers; rejects lone surrogates
        json.loads(raw, object_pairs_hook=_distinct_keys, parse_float=_finite)
    except ValueError as error:
        raise DigestMismatchError(f"{where} is not JSON: {error}; the file is damaged, fetch it again") from error
    version = body.get("schema_version") if isinstance(body, dict) else None
    if version != SCHEMA_VERSION:
        raise IncompatibleReleaseError(
            f"{where} has schema version {repr(version)[:20]}, this version of Reelway reads {SCHEMA_VERSION}; "
            "use the Reelway that built it"
        )
    try:
        manifest = Manifest.model_validate(body)
    except ValidationError as error:
        raise IncompatibleReleaseError(f"{where} is invalid: {first_validation_error(error)}") from error
    check_file_names(set(manifest.files), where)
    return manifest


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Writes ``manifest.json`` atomically.

    Raises:
        ReleaseError: see ``manifest_bytes``.
    """
    content = manifest_bytes(manifest)
    with atomic_file(folder / MANIFEST_FILE) as temporary:
        temporary.write_bytes(content)


def manifest_bytes(manifest: Manifest) -> bytes:
    """Returns the content of ``manifest.json``.

    Raises:
        ReleaseError: if the manifest is longer than what is read.
    """
    content = json.dumps(manifest.model_dump(mode="json"), indent=2, sort_keys=True).encode() + b"\n"
    if len(content) > MAX_MANIFEST_BYTES:
        raise ReleaseError(
            f"{MANIFEST_FILE} of {manifest.name!r} has {len(content)} bytes, at most {MAX_MANIFEST_BYTES} are read; "
            "shorten its config"
        )
    return content


def first_validation_error(error: ValidationError) -> str:
    """Returns pydantic's first error on one line: field, expectation, value."""
    problem = error.errors(include_url=False)[0]
    field = ".".join(str(part) for part in problem["loc"]) or "manifest"
    return f"{field}: {problem['msg']}, saw {str(problem['input'])[:80]!r}"


def check_file_names(names: Collection[str], where: str) -> None:
    """Checks that these are exactly the file names of a release, so that no name can point outside the folder.

    Raises:
        DigestMismatchError: if a file is missing or additional.
    """
    missing, extra = sorted(set(RELEASE_FILES) - set(names)), sorted(set(names) - set(RELEASE_FILES))
    if missing:
        raise DigestMismatchError(f"{where} lacks {', '.join(missing)}; the release is incomplete, fetch it again")
    if extra:
        raise DigestMismatchError(f"{where} has {', '.join(extra)}, which no release has; remove it or build again")


def check_file_entries(declared: Mapping[str, FileEntry], actual_entries: Mapping[str, FileEntry], where: str) -> None:
    """Compares the files with those that the manifest declares.

    Raises:
        DigestMismatchError: if a file is missing, additional, or has another size or content.
    """
    check_file_names(actual_entries, where)
    for name, expected in declared.items():
        actual = actual_entries[name]
        if actual.size_bytes != expected.size_bytes:
            raise DigestMismatchError(
                f"{where}/{name} has {actual.size_bytes} bytes, the manifest says {expected.size_bytes}; "
                "it was truncated or changed, fetch the release again"
            )
        if actual.sha256 != expected.sha256:
            raise DigestMismatchError(
                f"{where}/{name} has SHA-256 {actual.sha256[:12]}..., the manifest says {expected.sha256[:12]}...; "
                "its content was changed, fetch the release again"
            )


def check_files(folder: Path, manifest: Manifest) -> None:
    """Reads every file of the folder and compares it with the manifest.

    Raises:
        DigestMismatchError: see ``check_file_entries``; also if a file is a link or a special file.
        StorageError: if a file cannot be read.
    """
    names = {path.name for path in folder.iterdir()} - {MANIFEST_FILE}
    check_file_names(names, str(folder))
    actual = {name: _describe(folder / name, entry.size_bytes) for name, entry in manifest.files.items()}
    check_file_entries(manifest.files, actual, str(folder))


def _describe(path: Path, limit_bytes: int | None = None) -> FileEntry:
    try:
        with open_regular_file(path) as file:
            size_bytes = os.fstat(file.fileno()).st_size if limit_bytes is None else limit_bytes
            return copy_bounded(file, None, size_bytes, str(path))
    except OSError as error:
        raise StorageError(f"cannot read {path}: {error.strerror or error}") from error


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"number {text[:40]} is beyond the range of a float")
    return value


def _distinct_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    document: dict[str, Any] = {}
    for key, value in pairs:
        if key in document:
            raise ValueError(f"key {key[:40]!r} appears twice")
        document[key] = value
    return document
