"""The stream's main loop: reads the log, steps the engine, records the state, delivers rows to the stores.

Only this module of the stream reads a clock. A round reads new outcomes and steps up to the time until which the log is
complete. It writes state, log position and rows in one transaction, then delivers the rows. After a crash, recorded
rows are delivered (possibly again), and outcomes that were not recorded are read again.
"""

# Shapes: N outcomes

from __future__ import annotations

import logging
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Final

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from reelway.pipelines.features.stream.bootstrap import bootstrap, initial_watermark_us
from reelway.pipelines.features.stream.engine import EmittedRows, StreamCatalogue, StreamEngine
from reelway.pipelines.features.stream.log_records import read_outcome_records
from reelway.pipelines.features.stream.open_impressions import Outcomes
from reelway.pipelines.features.stream.sinks import VIDEO_VIEWS, FeatureSinks, encode_outbox_entry, latest_per_entity
from reelway.pipelines.features.stream.state import StreamState
from reelway.pipelines.features.stream.time_buckets import STREAMED
from reelway.pipelines.features.views import AFTER_US, DAY_US, ViewSettings
from reelway.platform.eventlog import EventLog, Offsets, StoredRecord
from reelway.platform.eventlog.parked_records import ParkedRecords

log = logging.getLogger(__name__)

CONSUMER: Final = "features"
SECOND_US: Final = 1_000_000
STALE_DATASET_AGE_US: Final = DAY_US
"""A data set that ended longer ago than this goes on from its own end."""


@dataclass(frozen=True)
class StreamSettings:
    """How the stream reads. ``lateness_s`` is how long an outcome may take from being heard to being in the log: rows
    wait that long. ``max_records``: of one round."""

    lateness_s: float = 1.0
    wait_s: float = 0.5
    max_records: int = 500
    consumer: str = CONSUMER


@dataclass
class MicroBatchResult:
    """What one round did."""

    records: int = 0
    outcomes: int = 0
    late: int = 0  # outcomes that came after their time was settled, and count from now
    parked: Counter[str] = field(default_factory=Counter)  # records by kind
    watermark_us: int = 0
    steps: int = 0
    rows: dict[str, int] = field(default_factory=dict)
    emitted: list[EmittedRows] = field(default_factory=list)


class StreamProcessor:
    """The stream of one run. Single-threaded; call ``start``, then ``round`` for ever, and ``close``.

    Args:
        ttl_us: of each streamed view.
        outputs: None for a replay, whose rounds keep every row they made.
        parked: receives records that cannot be read. By default they are only counted and logged.
    """

    def __init__(
        self,
        log: EventLog,
        state: StreamState,
        outputs: FeatureSinks | None,
        views: ViewSettings,
        ttl_us: dict[str, int],
        settings: StreamSettings | None = None,
        clock: Callable[[], float] = time.time,
        parked: ParkedRecords | None = None,
    ) -> None:
        self._parked = parked
        self._log, self._state, self._outputs = log, state, outputs
        self._views, self._ttl_us = views, ttl_us
        self._settings = settings or StreamSettings()
        self._clock = clock
        self.settled_us = 0
        self.began_us = 0
        self.behind_us = 0

    def start(self, catalogue: StreamCatalogue, labels: pa.Table, behind_us: int | None = None) -> None:
        """Go on from the state, or begin from the data set where there is none.

        Args:
            behind_us: of a replay; by the clock and the log otherwise.
        """
        state = self._state
        fresh = state.get("settled_us") is None
        if fresh:
            fine_us = StreamEngine(state, catalogue, self._views, self._ttl_us).fine_us
            self.settled_us = initial_watermark_us(labels, fine_us)
            self.began_us = self.settled_us
            self.behind_us = self._initial_clock_offset_us() if behind_us is None else behind_us
        else:
            self.settled_us, self.behind_us = int(state.get("settled_us")), int(state.get("behind_us"))
            self.began_us = int(state.get("began_us"))
        self.engine = StreamEngine(state, catalogue, self._views, self._ttl_us, self.behind_us)
        self._pending = Outcomes.none()
        self._position: Offsets = {}
        if fresh:
            with state.transaction():
                state.put(began_us=self.began_us)
                self._record(bootstrap(self.engine, labels, self.settled_us))
        self.resume()
        self._deliver()

    def resume(self) -> None:
        """Go back to what is recorded: where a process begins, and after a round that raised."""
        state = self._state
        self.settled_us = int(state.get("settled_us"))
        self._pending = _unpacked(state.pending())
        self._position = {int(partition): offset for partition, offset in state.get("position").items()}

    def run_micro_batch(self, *, wait_s: float | None = None) -> MicroBatchResult:
        """Read, step, record, deliver."""
        settings = self._settings
        waited = settings.wait_s if wait_s is None else wait_s
        batch = self._log.read(self._position, limit=settings.max_records, wait_s=waited)
        result = MicroBatchResult(records=len(batch.records), watermark_us=self.settled_us)
        self._buffer_records(batch.records, result)
        complete_us = batch.watermark_us - int(settings.lateness_s * SECOND_US) - self.behind_us
        steps = list(self.engine.steps(self.settled_us, complete_us, self._pending.time_us))
        if not steps and not batch.records:
            self._position = dict(batch.next_offsets)  # past offsets without records
            result.rows = self._deliver()
            return result
        with self._state.transaction():
            for until_us in steps:
                now = self._pending.time_us + AFTER_US <= until_us
                result.emitted += self.engine.step(until_us, self._pending.take(now))
                if now.any():
                    self._pending = self._pending.take(~now)
                self.settled_us = until_us
            self._position = dict(batch.next_offsets)
            self._record(result.emitted)
        result.watermark_us, result.steps = self.settled_us, len(steps)
        if self._outputs is not None:
            result.rows = self._deliver()
            result.emitted = []
            if batch.records:
                self._log.commit(settings.consumer, self._position)
        return result

    def _initial_clock_offset_us(self) -> int:
        """How long the data set has rested when the stream begins, 0 where it is of today."""
        now_us = int(self._clock() * 1e6)
        first = self._log.read({}, limit=1).records
        from_us = min([now_us, *(record.time_us for record in first)])
        rested_us = from_us - self.settled_us
        return rested_us if rested_us > STALE_DATASET_AGE_US else 0

    def _buffer_records(self, records: Sequence[StoredRecord], result: MicroBatchResult) -> None:
        if not records:
            return
        fresh, parked = read_outcome_records(self._log.name, records)
        if parked:
            result.parked = Counter(record.kind for record in parked)
            first = parked[0]
            log.warning(
                "records parked: log=%s count=%d, the first: partition=%d offset=%d reason=%s",
                first.log, len(parked), first.partition, first.offset, first.reason,
            )  # fmt: skip
            if self._parked is not None:
                self._parked.park(parked)
        time_us = np.maximum(fresh.time_us, fresh.shown_us) - self.behind_us
        late = time_us < self.settled_us
        result.outcomes, result.late = len(fresh), int(late.sum())
        time_us = np.where(late, self.settled_us, time_us)
        fresh = Outcomes(**{**vars(fresh), "time_us": time_us})
        self._pending = Outcomes.joined([self._pending, fresh])

    def _record(self, emitted: Sequence[EmittedRows]) -> None:
        """Position, pending and rows into the state; within a transaction."""
        state = self._state
        if emitted and self._outputs is not None:
            latest = latest_per_entity(emitted)
            sequence = int(state.get("change") or 0)
            if any(view in VIDEO_VIEWS for view in latest):
                sequence += 1
                state.put(change=sequence)
            state.append_outbox(encode_outbox_entry(latest, self.settled_us, sequence))
        state.put_pending(_packed(self._pending))
        position = {str(partition): offset for partition, offset in self._position.items()}
        state.put(settled_us=self.settled_us, behind_us=self.behind_us, position=position)

    def _deliver(self) -> dict[str, int]:
        rows = dict.fromkeys(STREAMED, 0)
        if self._outputs is None:
            return rows
        for place, content in self._state.outbox():
            for view, count in self._outputs.deliver(content).items():
                rows[view] += count
            self._state.delete_outbox_entry(place)
        return rows


_PACKED: Final = np.dtype(
    [*((name, "<i8") for name in Outcomes.__dataclass_fields__ if name != "value"), ("value", "<f4")]
)


def _packed(outcomes: Outcomes) -> bytes:
    packed: NDArray[np.void] = np.empty(len(outcomes), dtype=_PACKED)
    for name in _PACKED.names or ():
        packed[name] = getattr(outcomes, name)
    return packed.tobytes()


def _unpacked(content: bytes | None) -> Outcomes:
    packed = np.frombuffer(content or b"", dtype=_PACKED)
    return Outcomes(**{name: np.ascontiguousarray(packed[name]) for name in Outcomes.__dataclass_fields__})
