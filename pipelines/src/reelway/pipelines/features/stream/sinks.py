"""Sinks of streamed rows: Feast's online store, and the changelog of the video table's overlay.

Delivery is idempotent. Rows are complete, and a change gets its number before it is written.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa

from reelway.pipelines.features.labels import times_us
from reelway.pipelines.features.materialisation import WRITE_BATCH_ROWS, write_rows
from reelway.pipelines.features.stream.entity_views import EmittedRows
from reelway.pipelines.features.stream.rules import VIDEO_VIEWS
from reelway.pipelines.features.stream.time_buckets import ENTITY_KEYS
from reelway.pipelines.features.windows import I64
from reelway.platform.contracts.events import TIMESTAMP_TYPE
from reelway.platform.contracts.feature_names import VIEWS
from reelway.platform.eventlog.erasures import rows_kept
from reelway.platform.eventlog.feature_changelog import CHANGES, FeatureChange, FeatureChangelog, change_rows
from reelway.platform.features.viewer_row_erasure import erase_viewer_rows

if TYPE_CHECKING:
    from feast import FeatureStore


def latest_per_entity(emitted: Iterable[EmittedRows]) -> dict[str, pa.Table]:
    """Returns per view the last row of each entity."""
    by_view: dict[str, list[pa.Table]] = {}
    for chunk in emitted:
        by_view.setdefault(chunk.view, []).append(chunk.rows)
    latest = {}
    for view, tables in by_view.items():
        rows = pa.concat_tables(tables)
        entity, at_us = rows[ENTITY_KEYS[view]].to_numpy(), times_us(rows["event_timestamp"])
        order = np.lexsort((at_us, entity))
        last = np.append(entity[order][1:] != entity[order][:-1], True) if len(order) else np.zeros(0, bool)
        latest[view] = rows.take(pa.array(order[last]))
    return latest


def encode_rows(latest: Mapping[str, pa.Table], as_of_us: int, sequence: int, erased: Sequence[int] = ()) -> bytes:
    """Encodes the rows of one micro-batch.

    Args:
        sequence: number of the change if the rows contain video views.
        erased: viewers whose rows are deleted before these rows are written.
    """
    sink = pa.BufferOutputStream()
    head = json.dumps(
        {"as_of_us": as_of_us, "sequence": sequence, "views": list(latest), "erased": list(erased)}
    ).encode()
    sink.write(len(head).to_bytes(4, "little") + head)
    for rows in latest.values():
        with pa.ipc.new_stream(sink, rows.schema) as writer:
            writer.write_table(rows)
    content: bytes = sink.getvalue().to_pybytes()
    return content


def _decode_rows(content: bytes) -> tuple[dict[str, Any], dict[str, pa.Table]]:
    """Returns the head and the tables that ``encode_rows`` encoded."""
    size = int.from_bytes(content[:4], "little")
    head = json.loads(content[4 : 4 + size])
    source = pa.BufferReader(content[4 + size :])
    return head, {view: pa.ipc.open_stream(source).read_all() for view in head["views"]}


def rows_without_viewers(content: bytes, viewer_ids: I64) -> tuple[bytes, int]:
    """Returns encoded rows without those of some viewers, and how many rows were removed."""
    head, tables = _decode_rows(content)
    removed = 0
    for view, rows in tables.items():
        if view not in VIDEO_VIEWS:
            tables[view] = rows.filter(pa.array(rows_kept(rows[ENTITY_KEYS[view]].to_numpy(), viewer_ids)))
            removed += rows.num_rows - tables[view].num_rows
    return encode_rows(tables, head["as_of_us"], head["sequence"], head["erased"]), removed


class FeatureSinks:
    """Writes rows to the online store (viewer views) and the changelog (video views)."""

    def __init__(self, store: FeatureStore, changelog: FeatureChangelog) -> None:
        self._store = store
        self._changelog = changelog

    def deliver(self, content: bytes) -> dict[str, int]:
        """Writes rows that ``encode_rows`` encoded. Returns the number of rows per view.

        Raises:
            FeatureError: if the online store cannot be written.
            StorageError: if the changelog cannot be written.
        """
        head, tables = _decode_rows(content)
        if head["erased"]:
            self.erase_viewers(head["erased"])
        for view, rows in tables.items():
            if view not in VIDEO_VIEWS:
                self.write_viewer_rows(view, rows)
        changed = {view: rows for view, rows in tables.items() if view in VIDEO_VIEWS}
        if changed:
            self.write_change(head["sequence"], head["as_of_us"], changed)
        return {view: rows.num_rows for view, rows in tables.items()}

    def erase_viewers(self, viewer_ids: Sequence[int]) -> int:
        """Deletes the viewers' rows from the online store, and returns their number."""
        return erase_viewer_rows(self._store, viewer_ids)

    def write_change(self, sequence: int, as_of_us: int, tables: Mapping[str, pa.Table]) -> None:
        """Writes rows of video views as one change."""
        changes = [_as_change(view, rows) for view, rows in tables.items()]
        self._changelog.append(FeatureChange(sequence, as_of_us, pa.concat_tables(changes)))
        self._changelog.compact()

    def write_viewer_rows(self, view: str, rows: pa.Table) -> None:
        """Writes rows of a viewer view to the online store."""
        rows = rows.rename_columns({ENTITY_KEYS[view]: "viewer_id"})
        for start in range(0, rows.num_rows, WRITE_BATCH_ROWS):
            part = rows.slice(start, WRITE_BATCH_ROWS)
            times = [datetime.fromtimestamp(us / 1e6, UTC) for us in times_us(part["event_timestamp"]).tolist()]
            write_rows(self._store, view, part, times)


def _as_change(view: str, rows: pa.Table) -> pa.Table:
    times = rows["event_timestamp"].cast(TIMESTAMP_TYPE)
    return change_rows(view, rows[ENTITY_KEYS[view]], times, rows.select(VIEWS[view])).cast(CHANGES)
