"""Where releases are kept: any fsspec file system, one folder per release, named by its id.

A release is there when its manifest is. The manifest is written last and atomically, so that whatever interrupts a
write, nobody ever sees half a release. Nothing is trusted because it lies here: ``fetch`` checks every digest, and
``verify`` the rest.
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
from typing import Any, Final

from fsspec.core import url_to_fs
from fsspec.implementations.local import LocalFileSystem

from reelway.platform.contracts.ids import ReleaseId
from reelway.platform.contracts.manifest import MANIFEST_FILE, REHEARSAL_PREFIX, Manifest
from reelway.platform.durable import whole_folder
from reelway.platform.errors import (
    ConfigError,
    DigestMismatchError,
    ReelwayError,
    ReleaseError,
    ReleaseNotFoundError,
    StorageError,
)
from reelway.platform.release.folder import check_files, parse_manifest, read_manifest, write_manifest

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
        **options: passed to the fsspec file system (end point, credentials' profile, ...).

    Raises:
        ConfigError: the URL's protocol is unknown or its package is not installed.
    """

    def __init__(self, url: str, **options: Any) -> None:
        try:
            self._fs, root = url_to_fs(url, **options)
        except ImportError as error:
            raise ConfigError(f"release store {url} needs a package that is not installed: {error}") from error
        except ValueError as error:
            raise ConfigError(f"release store {url!r} is not a URL that can be opened: {error}") from error
        self.url = url
        self._root = root.rstrip("/")

    def write(self, folder: Path, manifest: Manifest) -> ReleaseId:
        """Put a release in; when it is there already, nothing happens.

        Args:
            folder: holds the files that the manifest names.
            manifest: written as given, so sign it before.

        Raises:
            DigestMismatchError: the folder is not what the manifest says.
            StorageError: it could not be written; nothing of it is visible.
        """
        names = {name: folder / name for name in manifest.files}
        check_files(folder, manifest)
        release_id = ReleaseId(manifest.release_id)
        if self._is_whole(release_id, manifest):
            return release_id
        if isinstance(self._fs, LocalFileSystem):
            with whole_folder(Path(self._place(release_id))) as aside:
                for name, path in names.items():
                    shutil.copyfile(path, aside / name)
                write_manifest(aside, manifest)
        else:
            self._upload(release_id, names, manifest)
        return release_id

    def list(self) -> Sequence[ReleaseSummary]:
        """All releases, the newest first. One whose manifest cannot be read is left out, and the log says so.

        Raises:
            StorageError: the store cannot be reached.
        """
        return self._read_all()[0]

    def ids(self) -> Sequence[ReleaseId]:
        """Of all releases; no manifest is read.

        Raises:
            StorageError: the store cannot be reached.
        """
        return self._ids()

    def resolve(self, prefix: str) -> ReleaseId:
        """The one release whose id begins with ``prefix``; ``latest`` is the one made last, rehearsals left out.

        Raises:
            ReleaseNotFoundError: none does, or several do; the message names what there is.
            DigestMismatchError: ``latest`` was asked for and a damaged manifest may be it.
        """
        if prefix == LATEST:
            releases, damaged = self._read_all()
            if damaged:
                raise DigestMismatchError(f"which release is the latest cannot be told: {damaged[0]}") from damaged[0]
            meant = [release.release_id for release in releases if not release.name.startswith(REHEARSAL_PREFIX)]
            if not meant:
                raise ReleaseNotFoundError(f"{self.url} has no release yet; make one with `reelway release build`")
            return meant[0]
        if _ID.fullmatch(prefix) and self._has_manifest(prefix):
            return ReleaseId(prefix)
        ids = self._ids()
        found = [release_id for release_id in ids if prefix and release_id.startswith(prefix)]
        if len(found) == 1:
            return found[0]
        what = "no release begins with" if not found else f"{len(found)} releases begin with"
        known = ", ".join(release_id[:12] for release_id in (found or ids)[:10]) or "nothing"
        raise ReleaseNotFoundError(
            f"{what} {prefix!r} in {self.url}; there is {known}; give more of the id, or 'latest'"
        )

    def manifest(self, release_id: ReleaseId) -> Manifest:
        """The manifest of a release in the store.

        Raises:
            ReleaseNotFoundError: it is not there.
            DigestMismatchError: its content is not that of this id.
        """
        path = f"{self._place(release_id)}/{MANIFEST_FILE}"
        with self._translated(f"read {path}"):
            try:
                raw = self._fs.cat_file(path)
            except FileNotFoundError:
                raise ReleaseNotFoundError(f"release {release_id[:12]} is not in {self.url}") from None
        manifest = parse_manifest(raw, where=path)
        if manifest.release_id != release_id:
            raise DigestMismatchError(
                f"{path} has id {manifest.release_id[:12]}..., expected {release_id[:12]}...; it was changed"
            )
        return manifest

    def fetch(self, release_id: ReleaseId, cache: Path) -> Path:
        """A local folder with the whole release, every digest checked; kept in ``cache`` for the next time.

        The folder is complete or absent, also when several processes of one machine fetch at once, and its files can
        be memory-mapped.

        Raises:
            ReleaseNotFoundError: it is not in the store.
            DigestMismatchError: what arrived is not what the manifest names.
            StorageError: it cannot be read, or the cache is full.
        """
        target = cache / release_id
        with _alone(cache / f".{release_id}.lock"):
            if target.exists() and _is_intact(target, release_id):
                return target
            manifest = self.manifest(release_id)
            with whole_folder(target) as aside:
                for name in manifest.files:
                    with self._translated(f"read {name} of release {release_id[:12]}"):
                        self._fs.get_file(f"{self._place(release_id)}/{name}", str(aside / name))
                check_files(aside, manifest)
                write_manifest(aside, manifest)
        return target

    def remove(self, release_id: ReleaseId) -> None:
        """Take a release out: the manifest first, so that it is gone at once.

        Raises:
            ReleaseNotFoundError: it is not there.
        """
        if not self._has_manifest(release_id):
            raise ReleaseNotFoundError(f"release {release_id[:12]} is not in {self.url}")
        with self._translated(f"remove release {release_id[:12]}"):
            self._fs.rm_file(f"{self._place(release_id)}/{MANIFEST_FILE}")
            self._fs.rm(self._place(release_id), recursive=True)

    def _upload(self, release_id: ReleaseId, names: Mapping[str, Path], manifest: Manifest) -> None:
        """Object stores have no rename, but a put is atomic: files first, then the manifest that makes them visible."""
        place = self._place(release_id)
        try:
            with self._translated(f"write release {release_id[:12]}"):
                self._fs.makedirs(place, exist_ok=True)
                for name, path in names.items():
                    self._fs.put_file(str(path), f"{place}/{name}")
                self._fs.pipe_file(f"{place}/{MANIFEST_FILE}", manifest.model_dump_json(indent=2).encode())
        except BaseException:
            self._discard(place)
            raise

    def _discard(self, place: str) -> None:
        """Take back an unfinished upload. Without its manifest it is invisible, so a failure here is only noted."""
        try:
            if self._fs.exists(place):
                self._fs.rm(place, recursive=True)
        except Exception as error:  # any client library's own; the first error is the one to report
            log.warning("an unfinished upload is left at %s: %s", place, error)

    def _is_whole(self, release_id: ReleaseId, manifest: Manifest) -> bool:
        """Whether the very same release, signature included, is there with files of the right size."""
        try:
            if self.manifest(release_id) != manifest:
                return False
        except (ReleaseNotFoundError, DigestMismatchError):
            return False
        with self._translated(f"list release {release_id[:12]}"):
            sizes = {
                Path(info["name"]).name: info["size"] for info in self._fs.ls(self._place(release_id), detail=True)
            }
        return all(sizes.get(name) == entry.size_bytes for name, entry in manifest.files.items())

    def _read_all(self) -> tuple[Sequence[ReleaseSummary], Sequence[DigestMismatchError]]:
        """What can be read, newest first, and the errors of what is damaged."""
        summaries, damaged = [], []
        for release_id in self._ids():
            try:
                summaries.append(_summary(release_id, self.manifest(release_id)))
            except ReleaseError as error:
                log.warning("release %s in %s is left out of the list: %s", release_id[:12], self.url, error)
                if isinstance(error, DigestMismatchError):
                    damaged.append(error)
        summaries.sort(key=lambda summary: (summary.created_at, summary.release_id), reverse=True)
        return summaries, damaged

    def _ids(self) -> Sequence[ReleaseId]:
        with self._translated("list the releases"):
            self._fs.invalidate_cache(self._root)
            if not self._fs.exists(self._root):
                return []
            names = [Path(info["name"]).name for info in self._fs.ls(self._root, detail=True)]
        return [ReleaseId(name) for name in sorted(names) if _ID.fullmatch(name) and self._has_manifest(name)]

    def _has_manifest(self, release_id: str) -> bool:
        with self._translated(f"look for release {release_id[:12]}"):
            return bool(self._fs.exists(f"{self._place(release_id)}/{MANIFEST_FILE}"))

    def _place(self, release_id: str) -> str:
        return f"{self._root}/{release_id}"

    @contextmanager
    def _translated(self, what: str) -> Iterator[None]:
        """Client libraries have errors of their own (botocore, aiohttp, gcsfs); none of them leaves this class."""
        try:
            yield
        except ReelwayError:
            raise
        except Exception as error:
            reason = (error.strerror if isinstance(error, OSError) else None) or str(error) or type(error).__name__
            raise StorageError(f"cannot {what} in {self.url}: {reason}; nothing half-written is visible") from error


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


def _is_intact(folder: Path, release_id: ReleaseId) -> bool:
    """A cached folder is used again only if it is still what it was; otherwise it is fetched anew."""
    try:
        manifest = read_manifest(folder)
        check_files(folder, manifest)
    except ReelwayError as error:
        log.warning("cached release %s is damaged and fetched again: %s", release_id[:12], error)
        return False
    return manifest.release_id == release_id


@contextmanager
def _alone(lock: Path) -> Iterator[None]:
    """One process of this machine at a time."""
    try:
        lock.parent.mkdir(parents=True, exist_ok=True)
        handle = lock.open("w")
    except OSError as error:
        raise StorageError(f"cannot write to the release cache {lock.parent}: {error.strerror or error}") from error
    with handle:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield
