"""Decodes uploads once for all readers of the topic ``catalogue`` in a process.

The version guard and the overlay of each open release read the same records, one shortly after the other. Decoding a
record and computing its precedence takes longer than everything else that is done with it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from reelway.platform.eventlog.catalogue_events import VideoUpsert, decode_upserts
from reelway.platform.eventlog.catalogue_log import READ_LIMIT
from reelway.platform.eventlog.event_log import StoredRecord

KEPT_RECORDS: Final = 2 * READ_LIMIT


class DecodedUploads:
    """A decoder like ``decode_upserts`` that keeps what it decoded last.

    Args:
        kept: number of records that are kept.
    """

    def __init__(self, kept: int = KEPT_RECORDS) -> None:
        self._kept = kept
        self._decoded: dict[tuple[int, int], VideoUpsert | None] = {}  # by partition and offset, oldest first

    def __call__(self, records: Sequence[StoredRecord]) -> tuple[list[VideoUpsert | None], int]:
        """See ``decode_upserts``."""
        new = [record for record in records if (record.partition, record.offset) not in self._decoded]
        decoded, _ = decode_upserts(new)
        known = self._decoded | {
            (record.partition, record.offset): upsert for record, upsert in zip(new, decoded, strict=True)
        }
        upserts = [known[record.partition, record.offset] for record in records]
        self._decoded = dict(list(known.items())[-self._kept :])
        unreadable = sum(
            upsert is None and bool(record.payload) for upsert, record in zip(upserts, records, strict=True)
        )
        return upserts, unreadable
