"""Erases viewers from the topics of exposures and outcomes.

A topic gets an erasure record, so that every reader forgets the viewers. In a SQLite file their rows then get anonymous
ids. Kafka keeps the rows until its retention deletes them, because a record cannot be changed.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from reelway.platform.erasure.request import ErasedStore, ErasureRequest, ErasureState, erased_store
from reelway.platform.errors import DataError
from reelway.platform.eventlog.addresses import KAFKA
from reelway.platform.eventlog.arrow_records import viewer_partitions
from reelway.platform.eventlog.erasures import (
    VIEWER_TOPICS,
    anonymised_record,
    encode_erasures,
    erased_viewers,
    viewer_rows,
)
from reelway.platform.eventlog.event_log import EventLog
from reelway.platform.eventlog.retained_records import records_of_partition
from reelway.platform.eventlog.sqlite_log import SqliteLog
from reelway.platform.eventlog.topics import Topic, open_topic, topic_address


@dataclass(frozen=True, slots=True)
class _Retained:
    """What a topic holds about viewers."""

    live: int  # rows that readers use
    erased: int  # rows before an erasure record, which readers do not use
    unnamed: tuple[int, ...]  # viewers without an erasure record after their last row
    unreadable: int  # records that cannot be attributed to a viewer


def erase_from_topics(request: ErasureRequest) -> Iterator[ErasedStore]:
    """Erases the viewers from both topics.

    Raises:
        StorageError: if a topic cannot be read or written.
    """
    events = request.events_address
    for topic in VIEWER_TOPICS:
        address = topic_address(events, topic)
        if not address.startswith(KAFKA) and not Path(address).exists():
            continue
        with closing(open_topic(events, topic)) as log:
            yield _erase_from_topic(request, log, topic)


def _erase_from_topic(request: ErasureRequest, log: EventLog, topic: Topic) -> ErasedStore:
    retained = _scan(log, request.viewer_ids)
    note = f"{retained.unreadable} unreadable records stay until retention" if retained.unreadable else ""
    if not request.dry_run and retained.unnamed:
        log.append(list(encode_erasures(retained.unnamed, topic, log.partitions)))
    if isinstance(log, SqliteLog):
        if not request.dry_run and retained.live + retained.erased:
            _rewrite(log, request.viewer_ids)
        return erased_store(request, topic, log.name, retained.live + retained.erased, note=note)
    if request.dry_run or not retained.live + retained.erased:
        return erased_store(request, topic, log.name, retained.live, note=note)
    kept = f"the topic's retention deletes {retained.live + retained.erased} rows that readers leave out"
    return ErasedStore(
        topic, log.name, retained.live, retained.live, ErasureState.HIDDEN, "; ".join(filter(None, (kept, note)))
    )


def _scan(log: EventLog, viewer_ids: tuple[int, ...]) -> _Retained:
    """Reads the partitions of the viewers, a batch of records at a time."""
    ids, ends = np.array(sorted(viewer_ids), np.int64), log.end_offsets()
    partition_E = viewer_partitions(ids, log.partitions)
    live: dict[int, int] = {}
    unnamed = set(ids.tolist())
    total = unreadable = 0
    for partition in np.unique(partition_E).tolist():
        mine = ids[partition_E == partition]
        for record in records_of_partition(log, partition, None, ends):
            for viewer in np.intersect1d(erased_viewers(record.payload), mine).tolist():
                live[viewer] = 0
                unnamed.discard(viewer)
            try:
                found = viewer_rows(record.payload, mine) if record.payload else {}
            except DataError:
                unreadable += 1
                continue
            for viewer, rows in found.items():
                live[viewer] = live.get(viewer, 0) + rows
                total += rows
                unnamed.add(viewer)
    counted = sum(live.values())
    return _Retained(counted, total - counted, tuple(sorted(unnamed)), unreadable)


def _rewrite(log: SqliteLog, viewer_ids: tuple[int, ...]) -> None:
    ids = np.array(viewer_ids, np.int64)

    def rewritten(payload: bytes) -> bytes:
        try:
            return anonymised_record(payload, ids) if payload else payload
        except DataError:  # counted by the scan
            return payload

    log.rewrite(rewritten)
