"""Outcomes of the event log's records, and the records to park: those that are not, or not only, known outcomes."""

# Shapes: N outcomes of one record

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

import numpy as np

from reelway.pipelines.features.labels import times_us
from reelway.pipelines.features.stream.open_impressions import Outcomes
from reelway.platform.errors import DataError
from reelway.platform.eventlog import StoredRecord
from reelway.platform.eventlog.outcome_events import OUTCOME_TYPES, decode_outcomes
from reelway.platform.eventlog.parked_records import ParkedRecord

EMPTY: Final = "empty"
UNREADABLE: Final = "unreadable"
UNKNOWN_TYPE: Final = "unknown_type"
PARKED_KINDS: Final = (EMPTY, UNREADABLE, UNKNOWN_TYPE)
"""Why a record is parked.

Empty: it has no payload, like a tombstone. Unreadable: it is no batch of outcomes. Unknown type: some of its outcomes
have types of a newer version; its other outcomes are used.
"""
_CODE_BY_TYPE: Final = {str(kind): code for code, kind in enumerate(OUTCOME_TYPES)}
_UNKNOWN: Final = -1


def read_outcome_records(log: str, records: Sequence[StoredRecord]) -> tuple[Outcomes, list[ParkedRecord]]:
    """Returns the known outcomes of all records in order, and the records to park.

    Args:
        log: name of the log that the records are from.
    """
    parts, parked = [Outcomes.none()], []

    def park(record: StoredRecord, kind: str, reason: str) -> None:
        parked.append(ParkedRecord(log, record.partition, record.offset, record.time_us, kind, reason, record.payload))

    for record in records:
        if not record.payload:
            park(record, EMPTY, "the record has no payload")
            continue
        try:
            outcomes, unknown = _read_outcomes(record.payload)
        except DataError as error:
            park(record, UNREADABLE, str(error))
            continue
        if unknown:
            park(record, UNKNOWN_TYPE, f"{sum(unknown.values())} outcomes have unknown types: {sorted(unknown)}")
        parts.append(outcomes)
    return Outcomes.joined(parts), parked


def _read_outcomes(payload: bytes) -> tuple[Outcomes, dict[str, int]]:
    """The record's outcomes of known types, and how many it has of each unknown type."""
    table = decode_outcomes(payload).combine_chunks()
    if not table.num_rows:
        return Outcomes.none(), {}
    type_N = table["type"].chunk(0)
    names = [str(name) for name in type_N.dictionary.to_pylist()]
    index_N = type_N.indices.to_numpy()
    kind_N = np.array([_CODE_BY_TYPE.get(name, _UNKNOWN) for name in names], np.int64)[index_N]
    outcomes = Outcomes(
        impression_id=table["impression_id"].to_numpy(),
        viewer_id=table["viewer_id"].to_numpy(),
        video_id=table["video_id"].to_numpy(),
        shown_us=times_us(table["shown_at"]),
        kind=kind_N,
        value=table["value"].to_numpy().astype(np.float32),
        time_us=times_us(table["event_time"]),
    )
    known_N = kind_N != _UNKNOWN
    if known_N.all():
        return outcomes, {}
    unknown_names, counts = np.unique([names[index] for index in index_N[~known_N]], return_counts=True)
    return outcomes.take(known_N), dict(zip(unknown_names.tolist(), counts.tolist(), strict=True))
