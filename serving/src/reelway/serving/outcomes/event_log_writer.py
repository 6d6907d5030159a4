"""Appends accepted outcomes to the event log, from which rollouts are assessed and features are computed.

An outcome that this process appended lately is not appended again. It may still be in the log twice, because a client
without an answer may send it again to another process; readers recognise it by its id.
"""

# Shapes: N outcomes of one append

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from typing import Any, Final

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from reelway.platform.eventlog.outcome_events import (
    OUTCOME_EVENT_SCHEMA,
    OUTCOME_TYPES,
    derive_outcome_ids,
    encode_outcomes,
)
from reelway.serving.outcomes.append_log import AppendLog, LazyLog
from reelway.serving.outcomes.batch_worker import BatchWorker
from reelway.serving.outcomes.recent_outcomes import RecentOutcomes
from reelway.serving.outcomes.record_columns import dictionary_column, timestamp_column
from reelway.serving.outcomes.reported import OutcomeColumns

MAX_QUEUED_OUTCOMES: Final = 500_000
"""Queued outcomes above which new ones are rejected."""
MAX_PER_APPEND: Final = 20_000
_TYPE_NAMES: Final = tuple(str(kind) for kind in OUTCOME_TYPES)


class EventLogWriter:
    """Appends outcomes to a log, on a thread of its own, and closes the log at the end.

    Args:
        open_log: opens the log; called by the thread, again after a failure.
        clock: Unix seconds; the time at which an outcome became known to the service.
        append_every_s: shortest time between two appends. After a rest, the first append is immediate.
        on_repeated: called by the thread with the number of outcomes that were in the log already.
    """

    def __init__(
        self,
        open_log: Callable[[], AppendLog],
        *,
        clock: Callable[[], float] = time.time,
        append_every_s: float = 0.05,
        on_repeated: Callable[[int], None] = lambda _: None,
    ) -> None:
        self._log = LazyLog(open_log)
        self._recent = RecentOutcomes()
        self._on_repeated = on_repeated
        self._clock = clock
        self._worker = BatchWorker[OutcomeColumns, None](
            "event log writer",
            self._append,
            max_queued_rows=MAX_QUEUED_OUTCOMES,
            max_batch_rows=MAX_PER_APPEND,
            interval_s=append_every_s,
            on_close=self._log.close,
        )

    def append(self, outcomes: OutcomeColumns) -> Future[None]:
        """Queues outcomes. The future ends when they are in the log, or with a ``StorageError``: send them again.

        Raises:
            ServingError: if too many outcomes are queued, or the writer is closed. None of them was accepted.
        """
        return self._worker.submit(outcomes, len(outcomes))

    def close(self) -> None:
        """Rejects new outcomes and appends the accepted ones. A second call does nothing."""
        self._worker.close()

    def _append(self, parts: Sequence[OutcomeColumns]) -> list[None]:
        if filled := [part for part in parts if len(part)]:
            now_us = int(self._clock() * 1e6)
            outcomes = logged_outcomes(filled, now_us)
            ids = outcomes["outcome_id"].to_numpy()
            new = self._recent.are_new(ids)
            if not new.all():
                outcomes = outcomes.filter(pa.array(new))
                self._on_repeated(len(new) - len(outcomes))
            if len(outcomes):
                events = self._log.get()
                events.append(list(encode_outcomes(outcomes, events.partitions, events.max_record_bytes)))
                self._recent.add(ids[new])  # only now: an outcome that was not appended is sent again
        return [None] * len(parts)


def logged_outcomes(parts: Sequence[OutcomeColumns], now_us: int) -> pa.RecordBatch:
    """The outcomes in the schema ``OUTCOME_EVENT_SCHEMA``, with ``now_us`` as event time. ``parts`` is not empty."""

    def joined(name: str) -> NDArray[Any]:
        return np.concatenate([getattr(part, name) for part in parts])

    done_at = joined("done_at")
    has_time = np.isfinite(done_at)
    impression, kind = joined("impression_id"), joined("kind")
    columns = {
        "outcome_id": derive_outcome_ids(impression, kind),
        "impression_id": impression,
        "request_id": joined("request_id"),
        "viewer_id": joined("viewer_id"),
        "video_id": joined("video_id"),
        "position": joined("position").astype(np.int16),
        "shown_at": timestamp_column(joined("issued_at") * 1e6),
        "release": dictionary_column([(part.arm, [arm.release for arm in part.arms]) for part in parts]),
        "arm": dictionary_column([(part.arm, [arm.arm.value for arm in part.arms]) for part in parts]),
        "source": dictionary_column([(part.source, part.sources) for part in parts]),
        "propensity": joined("propensity").astype(np.float32),
        "type": dictionary_column([(kind, _TYPE_NAMES)]),
        "value": joined("value").astype(np.float32),
        "event_time": timestamp_column(np.full(len(impression), now_us)),
        "done_at": timestamp_column(np.where(has_time, done_at, 0.0) * 1e6, ~has_time),
        "creator_id": _known(joined("creator_id"), -1),
        "topic": _known(joined("topic").astype(np.int32), -1),
        "duration_ms": _known(joined("duration_ms").astype(np.int32), 0),
        "rollout": dictionary_column([(part.arm, [arm.rollout for arm in part.arms]) for part in parts]),
        "weight": joined("weight").astype(np.float32),
        "slices": joined("slices").astype(np.int8),
        "authenticated": joined("authenticated"),
    }
    arrays = [
        pa.array(column, field.type) if isinstance(column := columns[field.name], np.ndarray) else column
        for field in OUTCOME_EVENT_SCHEMA
    ]
    return pa.RecordBatch.from_arrays(arrays, schema=OUTCOME_EVENT_SCHEMA)


def _known(column: NDArray[Any], unknown: int) -> pa.Array:
    """The values as an Arrow array, null where a token had the code of an unknown value."""
    return pa.array(column, mask=column == unknown)
