"""An incremental copy of the event log beside a run, for replays: the columns that labels depend on, as Parquet.

::

    parity/events/<topic>/<part>/<first>-<last>.parquet      first, last: numbers of the replays that wrote it

A window of thirty days is longer than the log's retention, so a replay cannot read the log alone. A part holds the
events of some viewers, so all events of an impression are in one part, in the log's order. Files are written once.
Many files become one, whose numbers contain theirs. A replay that is killed writes the same file again.
"""

# Shapes: N events

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping
from typing import Final

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from reelway.pipelines.features.labels import times_us
from reelway.pipelines.features.parity.run_files import RunFiles
from reelway.platform.errors import DataError
from reelway.platform.eventlog import EventLog, StoredRecord
from reelway.platform.eventlog.arrow_records import viewer_partitions
from reelway.platform.eventlog.erasures import anonymised, erased_viewers, rows_kept
from reelway.platform.eventlog.exposure_events import decode_exposures
from reelway.platform.eventlog.outcome_events import OUTCOME_TYPES, decode_outcomes
from reelway.platform.eventlog.retained_records import batches_until
from reelway.platform.eventlog.topics import Topic

log = logging.getLogger(__name__)

PARTS: Final = 16
EXPOSED: Final = -1
"""Kind of an exposure; outcomes have the index of their type."""
WRITE_ROWS: Final = 200_000
MAX_FILES: Final = 24
"""Files of a part after which they are joined."""
COPY_SCHEMA: Final = pa.schema(
    [
        pa.field("impression_id", pa.int64(), nullable=False),
        pa.field("viewer_id", pa.int64(), nullable=False),
        pa.field("video_id", pa.int64(), nullable=False),
        pa.field("creator_id", pa.int64()),
        pa.field("topic", pa.int32()),
        pa.field("duration_ms", pa.int32()),
        pa.field("kind", pa.int8(), nullable=False),
        pa.field("value", pa.float32(), nullable=False),
        pa.field("shown_us", pa.int64(), nullable=False),  # when the video was shown, not after the append
        pa.field("append_us", pa.int64(), nullable=False),  # when the log appended the record
    ]
)
_CODE_BY_TYPE: Final = {str(kind): code for code, kind in enumerate(OUTCOME_TYPES)}

EventFilter = Callable[[pa.RecordBatch], NDArray[np.bool_]]


class EventCopy:
    """The copy of one topic.

    Raises:
        StorageError: if files cannot be read or written; all methods raise it.
    """

    def __init__(self, files: RunFiles, topic: Topic) -> None:
        self._files, self._topic = files, topic

    def copy_new(
        self, events: EventLog, offsets: Mapping[int, int], newest_us: Mapping[int, int], number: int
    ) -> Iterator[tuple[dict[int, int], dict[int, int], int]]:
        """Copies the records from ``offsets`` to the log's present end.

        A copied record's time is not before those of the records before it in its partition, as in the stream: a broker
        that takes over a partition may have a slower clock.

        Yields the next offsets, newest times and number each time that everything before them is in the copy; the
        caller records them before it continues.

        Args:
            newest_us: newest append time of each partition before ``offsets``.
            number: of the next file.

        Raises:
            StorageError: also if the log's end cannot be reached; what precedes may be in the copy.
        """
        at, newest = dict(offsets), dict(newest_us)
        waiting: list[pa.Table] = []
        rows = 0
        for batch in batches_until(events, offsets, events.end_offsets()):
            at |= batch.next_offsets
            for record in batch.records:
                if len(erased := erased_viewers(record.payload)):
                    if waiting:  # an impression's events stay in one part
                        self._write(pa.concat_tables(waiting), number)
                        number, waiting = number + 1, []
                    self.erase(erased)
                newest[record.partition] = time_us = max(newest.get(record.partition, 0), record.time_us)
                table = self._decoded(record._replace(time_us=time_us), events.name)
                waiting += [table] if table.num_rows else []
            rows = sum(table.num_rows for table in waiting)
            if rows >= WRITE_ROWS:
                self._write(pa.concat_tables(waiting), number)
                number, waiting, rows = number + 1, [], 0
                yield at, newest, number
        if rows:
            self._write(pa.concat_tables(waiting), number)
            number += 1
        if at != dict(offsets):
            yield at, newest, number

    def read_part(self, part: int, wanted: EventFilter) -> pa.Table:
        """Returns the wanted events of a part in the log's order, reading some rows at a time."""
        folder = self._folder(part)
        found = [COPY_SCHEMA.empty_table()]
        for name in _current(self._files.names(folder)):
            for batch in self._files.batches(f"{folder}/{name}"):
                keep = wanted(batch)
                if keep.any():
                    found.append(pa.Table.from_batches([batch.filter(pa.array(keep))]).cast(COPY_SCHEMA))
        return pa.concat_tables(found)

    def erase(self, viewer_ids: NDArray[np.int64]) -> None:
        """Makes the events of some viewers anonymous in the files that were written."""
        for part in np.unique(viewer_partitions(viewer_ids, PARTS)).tolist():
            folder = self._folder(part)
            for name in (name for name in self._files.names(folder) if name.endswith(".parquet")):
                events = self._files.read_table(f"{folder}/{name}")
                if not rows_kept(events["viewer_id"].to_numpy(), viewer_ids).all():
                    self._files.write_table(f"{folder}/{name}", anonymised(events, viewer_ids))

    def join_files(self, below: int) -> None:
        """Replaces the files of each part that has many by one.

        Args:
            below: number of the next file; only files before it are joined.
        """
        for part in range(PARTS):
            folder = self._folder(part)
            names = self._files.names(folder)
            current = [name for name in _current(names) if _numbers(name)[1] < below]
            for name in set(names) - set(_current(names)):
                self._files.remove(f"{folder}/{name}")
            small = current[-MAX_FILES:] if len(current) > MAX_FILES else []
            if small:
                table = pa.concat_tables([self._files.read_table(f"{folder}/{name}") for name in small])
                self._files.write_table(f"{folder}/{_name(_numbers(small[0])[0], _numbers(small[-1])[1])}", table)
                for name in small:
                    self._files.remove(f"{folder}/{name}")

    def _folder(self, part: int) -> str:
        return f"parity/events/{self._topic}/{part:02d}"

    def _write(self, rows: pa.Table, number: int) -> None:
        part_N = viewer_partitions(rows["viewer_id"].to_numpy(), PARTS)
        for part in np.unique(part_N).tolist():
            self._files.write_table(
                f"{self._folder(part)}/{_name(number, number)}", rows.take(pa.array(np.flatnonzero(part_N == part)))
            )

    def _decoded(self, record: StoredRecord, name: str) -> pa.Table:
        if not record.payload:
            return COPY_SCHEMA.empty_table()
        try:
            if self._topic is Topic.EXPOSURES:
                return _exposure_rows(record)
            return _outcome_rows(record)
        except DataError as error:  # the stream parks and counts it
            log.warning(
                "record skipped: log=%s partition=%d offset=%d: %s", name, record.partition, record.offset, error
            )
            return COPY_SCHEMA.empty_table()


def _outcome_rows(record: StoredRecord) -> pa.Table:
    table = decode_outcomes(record.payload)
    kind_N = np.array([_CODE_BY_TYPE.get(str(name), -1) for name in table["type"].to_pylist()], np.int8)
    return _copied(table.append_column("kind", pa.array(kind_N)), record).filter(pa.array(kind_N >= 0))


def _exposure_rows(record: StoredRecord) -> pa.Table:
    table = decode_exposures(record.payload)
    rows = table.num_rows
    table = table.append_column("kind", pa.array(np.full(rows, EXPOSED, np.int8)))
    return _copied(table.append_column("value", pa.array(np.zeros(rows, np.float32))), record)


def _copied(table: pa.Table, record: StoredRecord) -> pa.Table:
    times = {
        "shown_us": pa.array(np.minimum(times_us(table["shown_at"]), record.time_us)),
        "append_us": pa.array(np.full(table.num_rows, record.time_us, np.int64)),
    }
    columns = [times[field.name] if field.name in times else table[field.name] for field in COPY_SCHEMA]
    return pa.table(columns, schema=COPY_SCHEMA)


def _name(first: int, last: int) -> str:
    return f"{first:012d}-{last:012d}.parquet"


def _numbers(name: str) -> tuple[int, int]:
    first, _, last = name.removesuffix(".parquet").partition("-")
    return int(first), int(last)


def _current(names: list[str]) -> list[str]:
    """Returns the files that no other file contains, in the log's order."""
    current: list[str] = []
    for name in sorted((name for name in names if name.endswith(".parquet")), key=_interval):
        if not current or _numbers(name)[1] > _numbers(current[-1])[1]:
            current.append(name)
    return current


def _interval(name: str) -> tuple[int, int]:
    first, last = _numbers(name)
    return first, -last
