"""A release store: one folder per release, named by its id, on any fsspec file system.

A release exists once its manifest does. The manifest is written last and atomically, so an interrupted write is never
visible. Stored files are not trusted. ``fetch`` reads no file before the manifest's signature is checked, no file
beyond its size, and no link; it checks every digest. ``verify`` checks everything else.
"""

from __future__ import annotations

import fcntl
import logging
import re
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any, BinaryIO, Final

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
from fsspec.core import url_to_fs
from fsspec.implementations.local import LocalFileSystem

from reelway.platform.atomic_files import atomic_directory
from reelway.platform.contracts.ids import ReleaseId, short_id
from reelway.platform.contracts.manifest import (
    MANIFEST_FILE,
    MAX_MANIFEST_BYTES,
    REHEARSAL_PREFIX,
    FileEntry,
    Manifest,
)
from reelway.platform.errors import (
    ConfigError,
    DigestMismatchError,
    ReelwayError,
    ReleaseError,
    ReleaseNotFoundError,
    StorageError,
)
from reelway.platform.release.folder import (
    check_file_entries,
    check_files,
    manifest_bytes,
    parse_manifest,
    read_manifest,
    write_manifest,
)
from reelway.platform.release.regular_files import copy_bounded, open_regular_file, read_at_most
from reelway.platform.release.signing import check_signature

log = logging.getLogger(__name__)

LATEST: Final = "latest"
_ID: Final = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True)
class ReleaseSummary:
    """One line of ``reelway release list``."""

    release_id: ReleaseId
    name: str
    created_at: datetime
    parent: str | None
    signed: bool
    gates_passed: bool
    gates_waived: int
    size_bytes: int
    metrics: Mapping[str, float]


class ReleaseStore:
    """Releases under one URL.

    Args:
        url: ``file:///path``, a plain path, ``memory://...``, ``s3://bucket/prefix``, ``gs://bucket/prefix``.
        **options: passed to the fsspec file system (endpoint, credentials profile, ...).

    Raises:
        ConfigError: if the URL's protocol is unknown or its package is not installed.
    """

    def __init__(self, url: str, **options: Any) -> None:
        try:
            self._fs, root = url_to_fs(url, **options)
        except ImportError as error:
            raise ConfigError(f"release store {url} requires a package that is not installed: {error}") from error
        except ValueError as error:
            raise ConfigError(f"release store {url!r} is not a URL that can be opened: {error}") from error
        self.url = url
        self._root = root.rstrip("/")

    def write(self, folder: Path, manifest: Manifest) -> ReleaseId:
        """Writes a release; does nothing if the store has it already.

        Args:
            folder: contains the files that the manifest names.
            manifest: written unchanged, so sign it before.

        Raises:
            DigestMismatchError: if the folder does not match the manifest.
            StorageError: if the release cannot be written; nothing of it is visible.
        """
        names = {name: folder / name for name in manifest.files}
        check_files(folder, manifest)
        release_id = ReleaseId(manifest.release_id)
        if self._is_complete(release_id, manifest):
            return release_id
        if isinstance(self._fs, LocalFileSystem):
            with atomic_directory(Path(self._release_path(release_id))) as temporary:
                for name, path in names.items():
                    shutil.copyfile(path, temporary / name)
                write_manifest(temporary, manifest)
        else:
            self._upload(release_id, names, manifest)
        return release_id

    def list(self) -> Sequence[ReleaseSummary]:
        """Returns all releases, newest first. Releases with an unreadable manifest are left out and logged.

        Raises:
            StorageError: if the store cannot be reached.
        """
        return self._read_all()[0]

    def ids(self) -> Sequence[ReleaseId]:
        """Returns the ids of all releases, without reading a manifest.

        Raises:
            StorageError: if the store cannot be reached.
        """
        return self._ids()

    def resolve(self, prefix: str) -> ReleaseId:
        """Returns the id that begins with ``prefix``. ``latest`` selects the newest release that is no drill release.

        Raises:
            ReleaseNotFoundError: if no id or several ids match; the message lists ids.
            DigestMismatchError: if ``latest`` is unknown because a manifest is damaged.
        """
        if prefix == LATEST:
            releases, damaged = self._read_all()
            if damaged:
                raise DigestMismatchError(f"cannot determine the latest release: {damaged[0]}") from damaged[0]
            candidates = [release.release_id for release in releases if not release.name.startswith(REHEARSAL_PREFIX)]
            if not candidates:
                raise ReleaseNotFoundError(f"{self.url} has no release; build one with `reelway release build`")
            return candidates[0]
        if _ID.fullmatch(prefix) and self._has_manifest(prefix):
            return ReleaseId(prefix)
        ids = self._ids()
        matches = [release_id for release_id in ids if prefix and release_id.startswith(prefix)]
        if len(matches) == 1:
            return matches[0]
        problem = "no release begins with" if not matches else f"{len(matches)} releases begin with"
        known = ", ".join(short_id(release_id) for release_id in (matches or ids)[:10]) or "none"
        raise ReleaseNotFoundError(
            f"{problem} {prefix!r} in {self.url} (releases: {known}); give more of the id, or 'latest'"
        )

    def manifest(self, release_id: ReleaseId) -> Manifest:
        """Reads the manifest of a release.

        Raises:
            ReleaseNotFoundError: if the store does not have the release.
            DigestMismatchError: if the content does not match the id, or the file is longer than a manifest may be.
            IncompatibleReleaseError: if this version cannot read it.
        """
        path = f"{self._release_path(release_id)}/{MANIFEST_FILE}"
        with self._translate_errors(f"read {path}"):
            try:
                with self._open(release_id, MANIFEST_FILE) as file:
                    raw = read_at_most(file, MAX_MANIFEST_BYTES, path)
            except FileNotFoundError:
                raise ReleaseNotFoundError(f"release {short_id(release_id)} is not in {self.url}") from None
        manifest = parse_manifest(raw, where=path)
        if manifest.release_id != release_id:
            raise DigestMismatchError(
                f"{path} has id {short_id(manifest.release_id)}..., expected {short_id(release_id)}...; it was changed"
            )
        return manifest

    def fetch(
        self, release_id: ReleaseId, cache: Path, *, public_keys: Sequence[Ed25519PublicKey] | None = None
    ) -> Path:
        """Returns a local folder with the complete release, downloaded to ``cache`` unless it is there; checks digests.

        The folder is complete or absent, even if several processes of one machine fetch at once. Its files can be
        memory-mapped.

        Args:
            public_keys: trusted keys; one of them must have signed the manifest, else no file is read. None does not
                check the signature, such as for a copy that is not served.

        Raises:
            ReleaseNotFoundError: if the store does not have the release.
            SignatureError: if none of ``public_keys`` signed the release.
            DigestMismatchError: if a file does not match the manifest, or is a link or a special file.
            StorageError: if the store cannot be read, or the cache is full.
        """
        target = cache / release_id
        with _exclusive_lock(cache / f".{release_id}.lock"):
            manifest = _cached_manifest(target, release_id) if target.exists() else None
            if manifest is not None:
                if public_keys is not None:
                    check_signature(manifest, public_keys)
                return target
            manifest = self.manifest(release_id)
            if public_keys is not None:
                check_signature(manifest, public_keys)
            with atomic_directory(target) as temporary:
                copied = {
                    name: self._copy(release_id, name, entry, temporary / name)
                    for name, entry in manifest.files.items()
                }
                check_file_entries(manifest.files, copied, self._release_path(release_id))
                write_manifest(temporary, manifest)
        return target

    def remove(self, release_id: ReleaseId) -> None:
        """Deletes a release, the manifest first, so that the release disappears at once.

        Raises:
            ReleaseNotFoundError: if the store does not have the release.
        """
        if not self._has_manifest(release_id):
            raise ReleaseNotFoundError(f"release {short_id(release_id)} is not in {self.url}")
        with self._translate_errors(f"remove release {short_id(release_id)}"):
            self._fs.rm_file(f"{self._release_path(release_id)}/{MANIFEST_FILE}")
            self._fs.rm(self._release_path(release_id), recursive=True)

    def _copy(self, release_id: ReleaseId, name: str, entry: FileEntry, target: Path) -> FileEntry:
        """Copies a file, but not more of it than ``entry`` says. Returns what was copied."""
        with (
            self._translate_errors(f"read {name} of release {short_id(release_id)}"),
            self._open(release_id, name) as source,
            target.open("xb") as sink,
        ):
            return copy_bounded(source, sink, entry.size_bytes, f"{self._release_path(release_id)}/{name}")

    def _open(self, release_id: str, name: str) -> BinaryIO:
        """Opens a file of a release. On a local file system neither the file nor its folder may be a link."""
        folder = self._release_path(release_id)
        if not isinstance(self._fs, LocalFileSystem):
            file: BinaryIO = self._fs.open(f"{folder}/{name}", "rb", cache_type="none")
            return file
        if Path(folder).is_symlink():
            raise DigestMismatchError(f"{folder} is a link, expected a folder; copy the release into the store")
        return open_regular_file(Path(folder, name))

    def _upload(self, release_id: ReleaseId, names: Mapping[str, Path], manifest: Manifest) -> None:
        """Uploads the files, then the manifest that makes them visible: object stores have no atomic rename."""
        release_path, content = self._release_path(release_id), manifest_bytes(manifest)
        try:
            with self._translate_errors(f"write release {short_id(release_id)}"):
                self._fs.makedirs(release_path, exist_ok=True)
                for name, path in names.items():
                    self._fs.put_file(str(path), f"{release_path}/{name}")
                self._fs.pipe_file(f"{release_path}/{MANIFEST_FILE}", content)
        except BaseException:
            self._discard(release_path)
            raise

    def _discard(self, release_path: str) -> None:
        """Deletes an unfinished upload. It is invisible without its manifest, so a failure here is only logged."""
        try:
            if self._fs.exists(release_path):
                self._fs.rm(release_path, recursive=True)
        except Exception as error:  # of any client library; the upload's own error is reported instead
            log.warning("unfinished upload remains at %s: %s", release_path, error)

    def _is_complete(self, release_id: ReleaseId, manifest: Manifest) -> bool:
        """Returns whether the store has this release with the same signature and with files of the right size."""
        try:
            if self.manifest(release_id) != manifest:
                return False
        except (ReleaseNotFoundError, DigestMismatchError):
            return False
        with self._translate_errors(f"list release {short_id(release_id)}"):
            sizes = {
                Path(info["name"]).name: info["size"]
                for info in self._fs.ls(self._release_path(release_id), detail=True)
            }
        return all(sizes.get(name) == entry.size_bytes for name, entry in manifest.files.items())

    def _read_all(self) -> tuple[Sequence[ReleaseSummary], Sequence[DigestMismatchError]]:
        """Returns the readable releases, newest first, and the errors of damaged ones."""
        summaries, damaged = [], []
        for release_id in self._ids():
            try:
                summaries.append(_summary(release_id, self.manifest(release_id)))
            except ReleaseError as error:
                log.warning("release %s in %s is not listed: %s", short_id(release_id), self.url, error)
                if isinstance(error, DigestMismatchError):
                    damaged.append(error)
        summaries.sort(key=lambda summary: (summary.created_at, summary.release_id), reverse=True)
        return summaries, damaged

    def _ids(self) -> Sequence[ReleaseId]:
        with self._translate_errors("list the releases"):
            self._fs.invalidate_cache(self._root)
            if not self._fs.exists(self._root):
                return []
            names = [Path(info["name"]).name for info in self._fs.ls(self._root, detail=True)]
        return [ReleaseId(name) for name in sorted(names) if _ID.fullmatch(name) and self._has_manifest(name)]

    def _has_manifest(self, release_id: str) -> bool:
        with self._translate_errors(f"find release {short_id(release_id)}"):
            return bool(self._fs.exists(f"{self._release_path(release_id)}/{MANIFEST_FILE}"))

    def _release_path(self, release_id: str) -> str:
        return f"{self._root}/{release_id}"

    @contextmanager
    def _translate_errors(self, action: str) -> Iterator[None]:
        """Raises errors of client libraries (botocore, aiohttp, gcsfs) as ``StorageError``."""
        try:
            yield
        except ReelwayError:
            raise
        except Exception as error:
            reason = (error.strerror if isinstance(error, OSError) else None) or str(error) or type(error).__name__
            raise StorageError(f"cannot {action} in {self.url}: {reason}; no partial release is visible") from error


def _summary(release_id: ReleaseId, manifest: Manifest) -> ReleaseSummary:
    return ReleaseSummary(
        release_id=release_id,
        name=manifest.name,
        created_at=manifest.created_at,
        parent=manifest.parent,
        signed=manifest.signature is not None,
        gates_passed=all(gate.passed for gate in manifest.gates),
        gates_waived=len(manifest.waivers),
        size_bytes=sum(entry.size_bytes for entry in manifest.files.values()),
        metrics=manifest.metrics,
    )


def _cached_manifest(folder: Path, release_id: ReleaseId) -> Manifest | None:
    """Returns the manifest of a cached folder that can be used again, or None if it is not the complete release."""
    try:
        manifest = read_manifest(folder)
        check_files(folder, manifest)
    except ReelwayError as error:
        log.warning("cached release %s is damaged, fetching it again: %s", short_id(release_id), error)
        return None
    return manifest if manifest.release_id == release_id else None


@contextmanager
def _exclusive_lock(lock: Path) -> Iterator[None]:
    """Holds a lock between the processes of this machine."""
    try:
        lock.parent.mkdir(parents=True, exist_ok=True)
        handle = lock.open("w")
    except OSError as error:
        raise StorageError(f"cannot write to the release cache {lock.parent}: {error.strerror or error}") from error
    with handle:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield
