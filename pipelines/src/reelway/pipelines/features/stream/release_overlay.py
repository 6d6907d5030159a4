"""The overlay of one open release: reads uploads from the topic ``catalogue`` and writes them as rows.

The rows and the position in the topic are in the same file, so a writer that was killed continues where the last
complete file ends: no upload is lost, none gets two rows.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

import numpy as np
import pyarrow as pa

from reelway.pipelines.features.stream.uploads import VideoRows
from reelway.platform.contracts.release_files import OVERLAY_CAPACITY
from reelway.platform.eventlog.catalogue_events import VideoUpsert, decode_upserts
from reelway.platform.eventlog.catalogue_log import READ_LIMIT
from reelway.platform.eventlog.event_log import EventLog, Offsets, StoredRecord
from reelway.platform.eventlog.upload_overlay import (
    COMPACT_AFTER,
    MAX_CHANGES,
    UploadChange,
    UploadChangelog,
    upload_schema,
)

log = logging.getLogger(__name__)

REFUSALS: Final = ("capacity", "dimensions", "unreadable")
"""Why an upload is not in the overlay: it is full, the content does not fit the release, the record is malformed."""


@dataclass(frozen=True)
class OverlayStep:
    """Result of one step."""

    read: int = 0  # records
    embedded: int = 0  # uploads that became rows
    refused: dict[str, int] = field(default_factory=dict)  # reason -> uploads


class ReleaseOverlay:
    """Writes the overlay of one release. One process runs it.

    Args:
        rows: computes the release's rows.
        catalogue: the topic ``catalogue``; no other object reads from this one.
        overlay: folder or fsspec URL of the overlay.
        is_newest: whether an upload is the newest version of its video in the whole topic.
        decode: decodes the topic's records.
        capacity: largest number of rows.

    Raises:
        StorageError: if the overlay cannot be read.
        DataError: if a file of the overlay is malformed.
    """

    def __init__(
        self,
        rows: VideoRows,
        catalogue: EventLog,
        overlay: str | Path,
        is_newest: Callable[[VideoUpsert], bool],
        decode: Callable[[Sequence[StoredRecord]], tuple[list[VideoUpsert | None], int]] = decode_upserts,
        capacity: int = OVERLAY_CAPACITY,
    ) -> None:
        self.release_use: object = None  # keeps the release in the node's cache
        self._rows = rows
        self._catalogue = catalogue
        self._changelog = UploadChangelog(overlay, rows.release, rows.embedding_dim)
        self._is_newest = is_newest
        self._decode = decode
        self._capacity = capacity
        self._sequence = 0
        self._position: Offsets = {}
        self._newest: dict[int, tuple[int, int]] = {}  # video -> precedence of its row
        self._count = 0
        self._changes: list[int] = []  # rows of the changes since the snapshot
        for change in self._changelog.changes_after(0):
            self._accept(change)

    @property
    def count(self) -> int:
        """Rows of the overlay."""
        return self._count

    def close(self) -> None:
        self._catalogue.close()

    def step(self) -> OverlayStep:
        """Reads new uploads and writes their rows.

        Raises:
            StorageError: if the log cannot be read, or the overlay not written. The next step tries again.
        """
        read = self._catalogue.read(self._position, limit=READ_LIMIT)
        upserts, unreadable = self._decode(read.records)
        wanted = {
            upsert.video_id: upsert
            for upsert in upserts
            if upsert is not None
            and self._is_newest(upsert)
            and upsert.precedence > self._newest.get(upsert.video_id, (-1, -1))
        }
        fitting = [upsert for upsert in wanted.values() if upsert.problem(self._rows.dimensions) is None]
        refused = {"unreadable": unreadable, "dimensions": len(wanted) - len(fitting), "capacity": 0}
        accepted, table = self._embed(fitting)
        if len(accepted) > (free := self._capacity - self._count):
            refused["capacity"] = len(accepted) - free
            accepted, table = accepted[:free], table.slice(0, free)
        for kind, count in refused.items():
            if count:
                log.error("release %s: %d uploads refused: %s", self._rows.release[:12], count, kind)
        if accepted:
            self._append(accepted, table, read.next_offsets)
        self._position = read.next_offsets
        return OverlayStep(len(read.records), len(accepted), refused)

    def _embed(self, upserts: Sequence[VideoUpsert]) -> tuple[list[VideoUpsert], pa.Table]:
        """Returns the uploads that change the release's video table, and their rows."""
        if not upserts:
            return [], pa.table({})
        table = self._rows.rows_of(upserts)
        has_row = np.array([upsert.video_id in self._newest for upsert in upserts])
        chosen = np.flatnonzero(has_row | self._rows.differ_from_release(table))
        return [upserts[index] for index in chosen.tolist()], table.take(pa.array(chosen))

    def _append(self, upserts: Sequence[VideoUpsert], table: pa.Table, position: Offsets) -> None:
        first = len(self._rows) + self._count
        precedence = [upsert.precedence for upsert in upserts]
        numbers = {
            "row": pa.array(np.arange(first, first + len(upserts)), pa.int32()),
            "version": pa.array([version for version, _ in precedence], pa.int64()),
            "digest": pa.array([digest for _, digest in precedence], pa.int64()),
        }
        rows = pa.Table.from_arrays([*table.columns, *numbers.values()], schema=upload_schema(self._rows.embedding_dim))
        change = UploadChange(self._sequence + 1, rows, position)
        self._changelog.append(change)
        self._accept(change)
        changed, before = sum(self._changes[1:]), self._changes[0]
        if len(self._changes) > MAX_CHANGES or (len(self._changes) > COMPACT_AFTER and 4 * changed >= before):
            self._compact()

    def _accept(self, change: UploadChange) -> None:
        self._sequence = change.sequence
        self._position = change.position
        self._count += change.rows.num_rows
        self._changes.append(change.rows.num_rows)
        versions = zip(change.rows["version"].to_pylist(), change.rows["digest"].to_pylist(), strict=True)
        self._newest.update(zip(change.rows["video_id"].to_pylist(), versions, strict=True))

    def _compact(self) -> None:
        rows = pa.concat_tables([change.rows for change in self._changelog.changes_after(0)])
        self._changelog.write_snapshot(UploadChange(self._sequence, rows, self._position))
        self._changes = [rows.num_rows]
