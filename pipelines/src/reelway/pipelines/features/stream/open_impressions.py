"""Open impressions: converts exposures and outcomes to impressions, before and after each change.

An impression stays open while an outcome may still count for it. ``features.labels`` computes the labels. So an
impression has the same labels as in the batch job, given the events known so far.
"""

# Shapes: N events, I impressions

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, replace
from typing import Any, Final

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from reelway.pipelines.features.labels import label_impressions
from reelway.pipelines.features.stream.keyed_store import KeyedStore, TimedBytes
from reelway.pipelines.features.stream.viewer_events import EXPOSURE, ViewerEvents
from reelway.pipelines.features.views import AFTER_US, HOUR_US, Events
from reelway.pipelines.features.windows import I64
from reelway.platform.contracts.events import IMPRESSIONS, OUTCOME_HORIZON_S, OUTCOMES, TIMESTAMP_TYPE, OutcomeType
from reelway.platform.eventlog.erasures import anonymous_ids, rows_kept
from reelway.platform.eventlog.outcome_events import OUTCOME_TYPES

HORIZON_US: Final = OUTCOME_HORIZON_S * 1_000_000
ERASE_CHUNK: Final = 20_000
"""Open impressions that an erasure reads at once."""
APPLIED: Final = "applied"
REPEATED: Final = "repeated"
TOO_LATE: Final = "too_late"
APPLY_RESULTS: Final = (APPLIED, REPEATED, TOO_LATE)
"""Results of applying an event.

Repeated: the impression already has an outcome of this type, or is known already. Too late: the event is later than
the horizon.
"""
_WATCH: Final = OUTCOME_TYPES.index(OutcomeType.WATCH)
_FACTS: Final = ("viewer_id", "video_id", "creator_id", "topic", "duration_ms", "shown_us")
"""Properties of an impression, as its first record reported them."""


@dataclass(frozen=True)
class OpenImpressions:
    """Impressions with their known outcomes, ``[I]``, by ascending id."""

    impression_id: I64
    viewer_id: I64
    video_id: I64
    creator_id: I64
    topic: I64
    duration_ms: I64
    shown_us: I64  # in the log's time
    kinds: I64  # one bit per outcome type
    watch_ms: NDArray[np.float64]
    known_us: I64  # in the stream's time: the last outcome, or the exposure if there is none

    def __len__(self) -> int:
        return len(self.impression_id)

    def take(self, rows: NDArray[Any]) -> OpenImpressions:
        return OpenImpressions(**{name: getattr(self, name)[rows] for name in self.__dataclass_fields__})


_PACKED: Final = np.dtype(
    [(name, "<f8" if name == "watch_ms" else "<i8") for name in OpenImpressions.__dataclass_fields__]
)


class OpenImpressionTable:
    """The open impressions of a partition in a store."""

    TABLE: Final = "open"

    def __init__(self, store: KeyedStore) -> None:
        self._store = store
        self._hours = TimedBytes(store, f"{self.TABLE}.hours")

    def load(self, ids: I64) -> OpenImpressions:
        """Returns those of these impressions that are open. ``ids`` is ascending."""
        found = [value for value in self._store.get_many(self.TABLE, ids) if value]
        packed = np.frombuffer(b"".join(found), dtype=_PACKED)
        return OpenImpressions(**{name: np.ascontiguousarray(packed[name]) for name in packed.dtype.names or ()})

    def save(self, impressions: OpenImpressions, known_before: I64) -> None:
        """Writes impressions.

        Args:
            known_before: ids of the impressions that were open before.
        """
        packed: NDArray[np.void] = np.empty(len(impressions), dtype=_PACKED)
        for name in packed.dtype.names or ():
            packed[name] = getattr(impressions, name)
        raw, size = packed.tobytes(), _PACKED.itemsize
        values = [raw[start : start + size] for start in range(0, len(raw), size)]
        self._store.put_many(self.TABLE, impressions.impression_id, values)
        new = ~np.isin(impressions.impression_id, known_before)
        hours = -(-impressions.shown_us[new] // HOUR_US) * HOUR_US
        ended = np.unique(hours)
        ids = [impressions.impression_id[new][hours == hour].tobytes() for hour in ended]
        self._hours.append(ended, ids)

    def close(self, hour_us: int) -> None:
        """Deletes the impressions shown in the hour that ends at ``hour_us``."""
        ids = np.frombuffer(self._hours.pop(np.array([hour_us], dtype=np.int64)), dtype=np.int64)
        self._store.delete_many(self.TABLE, ids)

    def erase(self, viewer_ids: I64, hours_us: range) -> int:
        """Makes the open impressions of some viewers anonymous. Returns their number.

        Args:
            hours_us: ends of the hours in which open impressions were shown.
        """
        erased = 0
        for hour_us in hours_us:
            ids = np.unique(np.frombuffer(self._hours.read(np.array([hour_us], dtype=np.int64)), dtype=np.int64))
            for start in range(0, len(ids), ERASE_CHUNK):
                found = self.load(ids[start : start + ERASE_CHUNK])
                gone = found.take(~rows_kept(found.viewer_id, viewer_ids))
                if len(gone):
                    self.save(replace(gone, viewer_id=anonymous_ids(gone.impression_id)), gone.impression_id)
                    erased += len(gone)
        return erased


def within_horizon(events: ViewerEvents, behind_us: int) -> NDArray[np.bool_]:
    """Returns whether each event is within the outcome horizon of its impression."""
    return np.asarray(events.time_us <= events.shown_us - behind_us + HORIZON_US)


def merge_events(
    before: OpenImpressions, events: ViewerEvents
) -> tuple[OpenImpressions, OpenImpressions, Counter[str]]:
    """Merges events into the impressions known so far.

    An exposure makes its impression known. If an outcome did that before, the exposure changes nothing.

    Args:
        before: known state of any of these impressions, by ascending id.

    Returns:
        Of the changed impressions: previous state of those that existed, and new state. And the number of applied
        events, which are not repeated: ``exposures`` and ``outcomes``.
    """
    events = _earliest_per_kind(events)
    ids, index = np.unique(events.impression_id, return_inverse=True)
    row, exists = _rows_of(before.impression_id, ids)

    def previous(name: str) -> NDArray[Any]:
        values = getattr(before, name)
        return np.where(exists, values[row], 0) if len(before) else np.zeros(len(ids), values.dtype)

    kinds = previous("kinds").astype(np.int64)
    is_exposure = events.kind == EXPOSURE
    bit = np.where(is_exposure, 0, np.left_shift(1, np.maximum(events.kind, 0)))
    answered = np.zeros(len(ids), dtype=np.bool_)
    answered[index[~is_exposure]] = True
    fresh = np.where(is_exposure, ~exists[index], (kinds[index] & bit) == 0)
    events, index, bit, is_exposure = events.take(fresh), index[fresh], bit[fresh], is_exposure[fresh]
    watch, known = previous("watch_ms"), previous("known_us").astype(np.int64)
    np.bitwise_or.at(kinds, index, bit)
    is_watch = events.kind == _WATCH
    watch[index[is_watch]] = events.value[is_watch]
    counts = ~is_exposure | ~answered[index]
    np.maximum.at(known, index[counts], events.time_us[counts])
    changed, first = np.unique(index, return_index=True)
    old = before.take(row[changed][exists[changed]]) if len(before) else before
    facts = {name: np.where(exists[changed], previous(name)[changed], getattr(events, name)[first]) for name in _FACTS}
    new = OpenImpressions(ids[changed], **facts, kinds=kinds[changed], watch_ms=watch[changed], known_us=known[changed])
    applied = Counter(exposures=int(is_exposure.sum()), outcomes=int((~is_exposure).sum()))
    return old, new, applied


def _earliest_per_kind(events: ViewerEvents) -> ViewerEvents:
    """Returns the earliest event of each kind per impression; at equal times, the first in the log."""
    order = np.lexsort((np.arange(len(events)), events.time_us, events.kind, events.impression_id))
    events = events.take(order)
    first = np.ones(len(events), dtype=np.bool_)
    first[1:] = (events.impression_id[1:] != events.impression_id[:-1]) | (events.kind[1:] != events.kind[:-1])
    return events.take(first)


def label_open_impressions(impressions: OpenImpressions, behind_us: int) -> Events:
    """Returns the labels of the impressions."""
    n = len(impressions)
    place = np.arange(n)
    shown = pa.array(impressions.shown_us - behind_us, pa.int64()).cast(TIMESTAMP_TYPE)
    nothing = pa.array([""] * n).dictionary_encode()
    # Each impression has a video of its own, whose properties are those that its record reported.
    videos = pa.table({
        "video_id": place, "creator_id": impressions.creator_id, "topic": impressions.topic.astype(np.int32),
        "duration_ms": impressions.duration_ms,
    })  # fmt: skip
    facts = {
        "impression_id": impressions.impression_id, "request_id": impressions.impression_id,
        "viewer_id": impressions.viewer_id, "video_id": place, "position": np.zeros(n, np.int16),
        "event_time": shown, "release": nothing, "arm": nothing, "source": nothing,
        "propensity": np.ones(n, np.float32), "device": nothing,
    }  # fmt: skip
    table = pa.table([facts[name] for name in IMPRESSIONS.names], names=IMPRESSIONS.names).cast(IMPRESSIONS)
    events = Events.from_labels(label_impressions(table, _outcome_rows(impressions), videos))
    return replace(
        events,
        video_id=impressions.video_id,
        event_us=impressions.shown_us,
        known_us=impressions.known_us + AFTER_US,
    )


def _outcome_rows(impressions: OpenImpressions) -> pa.Table:
    row, kind = np.nonzero((impressions.kinds[:, None] >> np.arange(len(OUTCOME_TYPES))) & 1)
    ids = impressions.impression_id[row]
    value = np.where(kind == _WATCH, impressions.watch_ms[row], 1.0).astype(np.float32)
    types = pa.DictionaryArray.from_arrays(
        pa.array(kind.astype(np.int32)), pa.array([str(outcome_type) for outcome_type in OUTCOME_TYPES])
    )
    facts = {
        "outcome_id": np.arange(len(row)), "impression_id": ids, "viewer_id": impressions.viewer_id[row],
        "video_id": impressions.video_id[row], "type": types, "value": value,
        "event_time": pa.array(impressions.known_us[row], pa.int64()).cast(TIMESTAMP_TYPE),
    }  # fmt: skip
    return pa.table([facts[name] for name in OUTCOMES.names], schema=OUTCOMES)


def _rows_of(ids: I64, wanted: I64) -> tuple[I64, NDArray[np.bool_]]:
    """Returns the row of each wanted id in ascending ``ids``, and whether the id exists."""
    if not len(ids):
        return np.zeros(len(wanted), np.int64), np.zeros(len(wanted), np.bool_)
    row = np.minimum(np.searchsorted(ids, wanted), len(ids) - 1)
    return row, ids[row] == wanted
