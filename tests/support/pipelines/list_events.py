"""Exposures and outcomes in the schemas of the event log, for tests of the list task."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa

from reelway.platform.eventlog.exposure_events import EXPOSURE_EVENT_SCHEMA
from reelway.platform.eventlog.outcome_events import OUTCOME_EVENT_SCHEMA, OUTCOME_TYPES, derive_outcome_ids


@dataclass(frozen=True)
class ListEvent:
    """One impression (``kind`` "exposure") or outcome, and when the log took it."""

    kind: str
    impression: int
    viewer: int
    video: int
    time_us: int
    region: str | None = None
    language: str | None = None
    value: float = 1.0
    duration_ms: int | None = 10_000


def exposure_rows(events: Sequence[ListEvent]) -> pa.Table:
    """Rows of the events in ``EXPOSURE_EVENT_SCHEMA``."""
    n = len(events)
    columns: dict[str, Any] = {
        "request_id": [e.impression for e in events], "impression_id": [e.impression for e in events],
        "viewer_id": [e.viewer for e in events], "video_id": [e.video for e in events], "position": [0] * n,
        "shown_at": [e.time_us for e in events], "request_time": [e.time_us for e in events], "release": ["r"] * n,
        "arm": ["stable"] * n, "rollout": [""] * n, "weight": [1.0] * n, "slices": [0] * n, "source": ["ann"] * n,
        "score": [1.0] * n, "propensity": [1.0] * n,  "creator_id": [1] * n, "topic": [1] * n,
        "duration_ms": [e.duration_ms for e in events], "device": ["phone"] * n,
        "region": [e.region for e in events], "language": [e.language for e in events], "authenticated": [None] * n,
    }  # fmt: skip
    return _table(columns, EXPOSURE_EVENT_SCHEMA)


def outcome_rows(events: Sequence[ListEvent]) -> pa.Table:
    """Rows of the events in ``OUTCOME_EVENT_SCHEMA``."""
    n = len(events)
    impression = np.array([e.impression for e in events], np.int64)
    kind = np.array([OUTCOME_TYPES.index(e.kind) for e in events], np.int64)  # type: ignore[arg-type]
    columns: dict[str, Any] = {
        "outcome_id": derive_outcome_ids(impression, kind), "impression_id": impression, "request_id": impression,
        "viewer_id": [e.viewer for e in events], "video_id": [e.video for e in events], "position": [0] * n,
        "shown_at": [e.time_us for e in events], "release": ["r"] * n, "arm": ["stable"] * n, "source": ["ann"] * n,
        "propensity": [1.0] * n, "type": [e.kind for e in events], "value": [e.value for e in events],
        "event_time": [e.time_us for e in events], "done_at": [None] * n,
        "rollout": [None] * n, "weight": [None] * n, "slices": [None] * n, "creator_id": [1] * n, "topic": [1] * n,
        "duration_ms": [e.duration_ms for e in events], "authenticated": [None] * n,
    }  # fmt: skip
    return _table(columns, OUTCOME_EVENT_SCHEMA)


def times_of(events: Sequence[ListEvent]) -> np.ndarray:
    """Append times of the events."""
    return np.array([e.time_us for e in events], dtype=np.int64)


def _table(columns: dict[str, Any], schema: pa.Schema) -> pa.Table:
    arrays = [
        pa.array(columns[field.name], pa.string()).dictionary_encode().cast(field.type)
        if pa.types.is_dictionary(field.type)
        else pa.array(columns[field.name]).cast(field.type)
        for field in schema
    ]
    return pa.Table.from_arrays(arrays, schema=schema)
