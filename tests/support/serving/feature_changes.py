"""Changes of streamed features, for the changelog that video tables follow."""

from __future__ import annotations

import pyarrow as pa

from reelway.platform.eventlog.feature_changelog import CHANGES, FIELDS, FeatureChange


def rows_of(view: str, values: dict[int, float | None]) -> pa.Table:
    """Rows whose fields all have the same value."""
    fields = FIELDS[view]
    return pa.table(
        [
            [view] * len(values) if name == "view"
            else list(values) if name == "entity_id"
            else [0] * len(values) if name == "event_timestamp"
            else list(values.values()) if name in fields
            else [None] * len(values)
            for name in CHANGES.names
        ],
        names=CHANGES.names,
    ).cast(CHANGES)  # fmt: skip


def change(sequence: int, *tables: pa.Table) -> FeatureChange:
    return FeatureChange(sequence, sequence * 1_000_000, pa.concat_tables(tables))
