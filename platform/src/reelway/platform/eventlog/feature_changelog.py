"""A changelog of streamed features, from the stream processor to the video table of every replica.

The files are those of ``numbered_files``, in the folder of the overlay.

A change holds complete rows of views by entity. The newest row of an entity is current; a row of nulls means that the
entity's row has expired.
"""

# Shapes: N rows

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Final

import pyarrow as pa

from reelway.platform.contracts.events import TIMESTAMP_TYPE
from reelway.platform.contracts.feature_names import CREATOR_STATISTICS, VIDEO_ENGAGEMENT
from reelway.platform.errors import DataError
from reelway.platform.eventlog.numbered_files import NumberedFiles

ENGAGEMENT: Final = "video_engagement"
CREATORS: Final = "creator_statistics"
FIELDS: Final = {ENGAGEMENT: VIDEO_ENGAGEMENT, CREATORS: CREATOR_STATISTICS}
CHANGES: Final = pa.schema(
    [
        pa.field("view", pa.string(), nullable=False),
        pa.field("entity_id", pa.int64(), nullable=False),  # video, or creator
        pa.field("event_timestamp", TIMESTAMP_TYPE, nullable=False),
        *(pa.field(name, pa.float32()) for fields in FIELDS.values() for name in fields),
    ]
)
"""Rows of both views; the fields of the other view are null."""
_AS_OF_METADATA_KEY: Final = b"as_of_us"
COMPACT_AFTER: Final = 64
"""Number of changes after which a snapshot is made."""


@dataclass(frozen=True)
class FeatureChange:
    """Rows of changed entities, and the time as of which all rows so far are current."""

    sequence: int
    as_of_us: int
    rows: pa.Table  # of the schema CHANGES
    is_snapshot: bool = False


def change_rows(view: str, entity_ids: pa.Array, times: pa.Array, fields: pa.Table) -> pa.Table:
    """Rows of one view in the schema ``CHANGES``."""
    fields_of_view = FIELDS[view]
    columns = {
        "view": pa.array([view] * len(entity_ids), pa.string()),
        "entity_id": entity_ids,
        "event_timestamp": times,
        **{name: fields[name] for name in fields_of_view},
    }
    return pa.table([columns.get(f.name, pa.nulls(len(entity_ids), f.type)) for f in CHANGES], schema=CHANGES)


def latest_rows(tables: list[pa.Table]) -> pa.Table:
    """Returns the last row of each (view, entity)."""
    rows = pa.concat_tables(tables)
    rows = rows.append_column("place", pa.array(range(rows.num_rows), pa.int64()))
    indices = rows.group_by(["view", "entity_id"]).aggregate([("place", "max")])["place_max"]
    return rows.drop_columns(["place"]).take(indices.combine_chunks().sort())


class FeatureChangelog:
    """The files at a path or fsspec URL. All methods block, and raise ``StorageError`` if the files are unreachable."""

    def __init__(self, location: str | Path) -> None:
        self._files = NumberedFiles(location)

    def append(self, change: FeatureChange) -> None:
        """Writes a change. Writing the same change again has no effect."""
        self._files.write_change(change.sequence, _encode(change))

    def compact(self, *, at_least: int = COMPACT_AFTER) -> bool:
        """Replaces the changes by a snapshot if there are ``at_least`` of them. Returns whether it did."""
        if self._files.count_changes() < at_least:
            return False
        read = self.changes_after(0)
        rows = latest_rows([change.rows for change in read])
        last = FeatureChange(read[-1].sequence, read[-1].as_of_us, rows, is_snapshot=True)
        self._files.write_snapshot(last.sequence, _encode(last))
        return True

    def changes_after(self, sequence: int) -> list[FeatureChange]:
        """Returns the changes after ``sequence`` (0: all), oldest first.

        If the next change has been deleted, the list starts with the snapshot that replaced it.
        """
        return self._files.read_after(sequence, _decode)


def _encode(change: FeatureChange) -> pa.Table:
    return change.rows.replace_schema_metadata({_AS_OF_METADATA_KEY: str(change.as_of_us).encode()})


def _decode(table: pa.Table, path: str, sequence: int, is_snapshot: bool) -> FeatureChange:
    metadata = table.schema.metadata or {}
    rows = table.replace_schema_metadata(None)
    if not rows.schema.equals(CHANGES) or _AS_OF_METADATA_KEY not in metadata:
        raise DataError(f"changelog {path}: has schema\n{table.schema}\nexpected\n{CHANGES}")
    return FeatureChange(sequence, int(metadata[_AS_OF_METADATA_KEY]), rows, is_snapshot)
