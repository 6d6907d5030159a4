"""The overlay of uploads: rows that the overlay writer adds to the video table of each open release.

::

    overlay/<release>/requested    a replica serves this release; its content is the Unix time in seconds
    overlay/<release>/*.arrow      the rows, as the files of ``numbered_files``

A row is a complete row of ``videos.arrow`` with the release's own embedding. Its number is N, N + 1, ... for a release
of N videos; the overlay writer alone gives the numbers, so a number means the same row in every process. A later row of
the same video replaces the earlier one.
"""

# Shapes: M rows of the overlay

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import fsspec
import pyarrow as pa

from reelway.platform.atomic_files import atomic_file
from reelway.platform.contracts.release_files import videos_schema
from reelway.platform.errors import DataError, StorageError
from reelway.platform.eventlog.numbered_files import NumberedFiles

REQUESTED_FILE: Final = "requested"
REQUEST_INTERVAL_S: Final = 60.0
"""How often a replica states that it serves a release."""
REQUEST_VALID_S: Final = 600.0
"""How long the overlay writer serves a release after the last request."""
OLD_REQUEST_S: Final = 86_400.0
"""Age from which on a request is old; most likely the release is not served any more."""
OLD_REQUEST_INTERVAL_S: Final = 60.0
_POSITION_KEY: Final = b"reelway.position"
COMPACT_AFTER: Final = 64
"""Number of changes after which a snapshot is made if the changes have a quarter of the snapshot's rows."""
MAX_CHANGES: Final = 1_024
"""Number of changes after which a snapshot is made in any case."""


def upload_schema(embedding_dim: int) -> pa.Schema:
    """Columns of a change: a row of ``videos.arrow``, its row number, and the version that it is from."""
    numbers = [
        pa.field("row", pa.int32(), nullable=False),
        pa.field("version", pa.int64(), nullable=False),
        pa.field("digest", pa.int64(), nullable=False),  # second part of VideoUpsert.precedence
    ]
    return pa.schema([*videos_schema(embedding_dim), *numbers])


@dataclass(frozen=True)
class UploadChange:
    """Rows of the overlay, and the position in the topic ``catalogue`` up to which all uploads are in the overlay."""

    sequence: int
    rows: pa.Table  # [M] of upload_schema
    position: Mapping[int, int]


class UploadChangelog:
    """The overlay of one release. Methods block, and raise ``StorageError`` if the files are unreachable.

    Args:
        overlay: folder or fsspec URL of the overlay.
        release: full id of the release.
        embedding_dim: width of the release's embeddings.
    """

    def __init__(self, overlay: str | Path, release: str, embedding_dim: int) -> None:
        self._files = NumberedFiles(f"{str(overlay).rstrip('/')}/{release}")
        self._schema = upload_schema(embedding_dim)

    def append(self, change: UploadChange) -> None:
        """Writes a change."""
        self._files.write_change(change.sequence, self._encode(change))

    def write_snapshot(self, change: UploadChange) -> None:
        """Replaces all changes by one with all rows."""
        self._files.write_snapshot(change.sequence, self._encode(change))

    def changes_after(self, sequence: int) -> list[UploadChange]:
        """Returns the changes after ``sequence`` (0: all), oldest first; the first may be a snapshot.

        Raises:
            DataError: if a file has another format.
        """
        return self._files.read_after(sequence, self._decode)

    def _encode(self, change: UploadChange) -> pa.Table:
        position = json.dumps({str(partition): offset for partition, offset in change.position.items()})
        return change.rows.cast(self._schema).replace_schema_metadata({_POSITION_KEY: position.encode()})

    def _decode(self, table: pa.Table, path: str, sequence: int, is_snapshot: bool) -> UploadChange:  # noqa: ARG002
        stored = (table.schema.metadata or {}).get(_POSITION_KEY)
        rows = table.replace_schema_metadata(None)
        if stored is None or not rows.schema.equals(self._schema):
            raise DataError(f"overlay {path}: has schema\n{table.schema}\nexpected\n{self._schema}")
        position = {int(partition): int(offset) for partition, offset in json.loads(stored).items()}
        return UploadChange(sequence, rows, position)


class OverlayRequests:
    """States which releases are served, so that the overlay writer writes their overlays.

    Args:
        overlay: folder or fsspec URL of the overlay.
    """

    def __init__(self, overlay: str | Path) -> None:
        self._location = str(overlay)
        self._next_s: dict[str, float] = {}  # release without a recent request -> when it is looked at again
        try:
            self._files, self._root = fsspec.core.url_to_fs(self._location)
        except (ValueError, ImportError) as error:
            raise StorageError(f"overlay {self._location!r}: {error}; expected a path or an fsspec URL") from error

    def request(self, release: str, now_s: float) -> None:
        """States that a replica serves the release now."""
        path = f"{self._root}/{release}/{REQUESTED_FILE}"
        content = f"{now_s:.3f}\n".encode()
        if self._files.protocol in ("file", ("file", "local")):
            with atomic_file(Path(path)) as temporary:
                temporary.write_bytes(content)
            return
        try:
            self._files.pipe_file(path, content)
        except OSError as error:
            raise StorageError(f"overlay {path}: cannot write it: {error}") from error

    def served(self, now_s: float) -> list[str]:
        """Returns the releases that were requested within ``REQUEST_VALID_S``.

        A release whose last request is older than ``OLD_REQUEST_S`` is looked at every ``OLD_REQUEST_INTERVAL_S``.
        """
        try:
            entries = self._files.ls(self._root, detail=False, refresh=True) if self._files.exists(self._root) else []
            names = {entry.rstrip("/").rsplit("/", 1)[-1] for entry in entries}
            releases = {name for name in names if not name.startswith(".") and not name.endswith(".arrow")}
            due = [release for release in releases if now_s >= self._next_s.get(release, now_s)]
            requested = {release: self._requested_at_s(release) for release in due}
        except OSError as error:
            raise StorageError(f"overlay {self._location}: cannot list it: {error}") from error
        old = [release for release, at_s in requested.items() if OLD_REQUEST_S < now_s - at_s < float("inf")]
        waiting = {release: self._next_s[release] for release in releases - set(requested)}
        self._next_s = waiting | dict.fromkeys(old, now_s + OLD_REQUEST_INTERVAL_S)
        return sorted(release for release, at_s in requested.items() if now_s - at_s < REQUEST_VALID_S)

    def _requested_at_s(self, release: str) -> float:
        try:
            return float(self._files.cat_file(f"{self._root}/{release}/{REQUESTED_FILE}"))
        except (FileNotFoundError, NotADirectoryError, ValueError):
            return float("-inf")
