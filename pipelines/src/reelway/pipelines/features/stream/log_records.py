"""Events of the event log's records, and the records to park: those that are not, or not only, known events."""

# Shapes: N events of one record

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Final

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from reelway.pipelines.features.labels import times_us
from reelway.pipelines.features.stream.video_facts import VideoFacts
from reelway.pipelines.features.stream.viewer_events import EXPOSURE, ViewerEvents
from reelway.pipelines.features.windows import I64
from reelway.platform.errors import DataError
from reelway.platform.eventlog import StoredRecord
from reelway.platform.eventlog.erasures import NO_VIEWERS, erased_viewers
from reelway.platform.eventlog.exposure_events import decode_exposures
from reelway.platform.eventlog.outcome_events import OUTCOME_TYPES, decode_outcomes
from reelway.platform.eventlog.parked_records import ParkedRecord
from reelway.platform.eventlog.topics import Topic

EMPTY: Final = "empty"
UNREADABLE: Final = "unreadable"
UNKNOWN_TYPE: Final = "unknown_type"
UNKNOWN_VIDEO: Final = "unknown_video"
PARKED_KINDS: Final = (EMPTY, UNREADABLE, UNKNOWN_TYPE, UNKNOWN_VIDEO)
"""Why a record is parked.

- Empty: it has no payload, like a tombstone.
- Unreadable: it is no batch of events of its topic.
- Unknown type: some of its outcomes have types of a newer version. Its other events are used.
- Unknown video: some of its events state neither creator nor duration, and the data set does not contain their videos.
  Its other events are used.
"""
_CODE_BY_TYPE: Final = {str(kind): code for code, kind in enumerate(OUTCOME_TYPES)}
_UNKNOWN: Final = -2


def read_records(
    topic: Topic, log: str, records: Sequence[StoredRecord], facts: VideoFacts
) -> tuple[ViewerEvents, list[ParkedRecord]]:
    """Returns the known events of all records in order, and the records to park.

    Args:
        topic: exposures or outcomes.
        log: name of the log that the records are from.
    """
    parts, parked = [ViewerEvents.none()], []

    def park(record: StoredRecord, kind: str, reason: str) -> None:
        parked.append(ParkedRecord(log, record.partition, record.offset, record.time_us, kind, reason, record.payload))

    for record in records:
        if not record.payload:
            park(record, EMPTY, "the record has no payload")
            continue
        if len(erased := erased_viewers(record.payload)):
            parts = [part.anonymised(erased) for part in parts]
        try:
            decode = decode_exposures if topic == Topic.EXPOSURES else decode_outcomes
            events, unknown_types, unknown_videos = _read_events(decode(record.payload), record.time_us, facts)
        except DataError as error:
            park(record, UNREADABLE, str(error))
            continue
        if unknown_types:
            text = f"{sum(unknown_types.values())} outcomes have unknown types: {sorted(unknown_types)}"
            park(record, UNKNOWN_TYPE, text)
        elif len(unknown_videos):
            park(record, UNKNOWN_VIDEO, f"{len(unknown_videos)} events have unknown videos, first {unknown_videos[0]}")
        parts.append(events)
    return ViewerEvents.joined(parts), parked


def read_erasures(records: Sequence[StoredRecord]) -> NDArray[np.int64]:
    """Returns the viewers that the records erase. ``read_records`` makes their events before it anonymous."""
    return np.unique(np.concatenate([NO_VIEWERS, *(erased_viewers(record.payload) for record in records)]))


def _read_events(table: pa.Table, time_us: int, facts: VideoFacts) -> tuple[ViewerEvents, Counter[str], I64]:
    """The table's usable events, its unknown outcome types with their numbers, and its unknown videos."""
    if not table.num_rows:
        return ViewerEvents.none(), Counter(), np.zeros(0, np.int64)
    table = table.combine_chunks()
    n = table.num_rows
    kind_N, unknown_types = _kinds(table)
    video_N = table["video_id"].to_numpy()
    stated_N = np.asarray(table["creator_id"].is_valid()) & np.asarray(table["duration_ms"].is_valid())
    columns = {
        name: table[name].fill_null(-1).to_numpy().astype(np.int64) for name in ("creator_id", "topic", "duration_ms")
    }
    known_N = stated_N
    if not stated_N.all():
        found_N, values = facts.lookup(video_N)
        known_N = stated_N | found_N
        columns = {name: np.where(stated_N, stated, values[name]) for name, stated in columns.items()}
    events = ViewerEvents(
        impression_id=table["impression_id"].to_numpy(),
        viewer_id=table["viewer_id"].to_numpy(),
        video_id=video_N,
        **columns,
        shown_us=np.minimum(times_us(table["shown_at"]), time_us),
        kind=kind_N,
        value=table["value"].to_numpy().astype(np.float32) if "value" in table.column_names else np.ones(n, np.float32),
        time_us=np.full(n, time_us, np.int64),
    )
    usable_N = known_N & (kind_N != _UNKNOWN)
    return events if usable_N.all() else events.take(usable_N), unknown_types, video_N[~known_N]


def _kinds(table: pa.Table) -> tuple[NDArray[np.int64], Counter[str]]:
    if "type" not in table.column_names:
        return np.full(table.num_rows, EXPOSURE, np.int64), Counter()
    type_N = table["type"].chunk(0)
    names = [str(name) for name in type_N.dictionary.to_pylist()]
    index_N = type_N.indices.to_numpy()
    kind_N = np.array([_CODE_BY_TYPE.get(name, _UNKNOWN) for name in names], np.int64)[index_N]
    return kind_N, Counter(names[index] for index in index_N[kind_N == _UNKNOWN])
