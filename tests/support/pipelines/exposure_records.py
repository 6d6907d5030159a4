"""Exposures as records of a log."""

from __future__ import annotations

from collections.abc import Sequence

import pyarrow as pa

from reelway.platform.eventlog import LogRecord
from reelway.platform.eventlog.exposure_events import EXPOSURE_EVENT_SCHEMA, encode_exposures


def exposure_record(shown: Sequence[tuple[int, int, int, int]], *, append_us: int) -> LogRecord:
    """Encodes one slate from (impression, viewer, video, shown_us)."""
    impression, viewer, video, shown_us = (list(column) for column in zip(*shown, strict=True))
    given = {
        "request_id": [impression[0]] * len(shown), "impression_id": impression, "viewer_id": viewer,
        "video_id": video, "shown_at": shown_us, "request_time": shown_us,
    }  # fmt: skip
    arrays = []
    for field in EXPOSURE_EVENT_SCHEMA:
        empty = None if field.nullable else "" if pa.types.is_dictionary(field.type) else 0
        values = pa.array(given.get(field.name, [empty] * len(shown)))
        arrays.append(values.cast(pa.int64()).cast(field.type) if field.name in given else values.cast(field.type))
    batch = pa.RecordBatch.from_arrays(arrays, schema=EXPOSURE_EVENT_SCHEMA)
    (record,) = encode_exposures(batch, 1, append_us, 1 << 20)
    return record
