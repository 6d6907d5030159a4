"""Open impressions: converts outcomes to impressions, before and after each change.

An impression stays open while an outcome may still count for it. ``features.labels`` computes the labels. So an
impression has the same labels as in the batch job, given the outcomes known so far.
"""

# Shapes: N outcomes, I impressions

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Final

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from reelway.pipelines.features.labels import label_impressions
from reelway.pipelines.features.views import Events
from reelway.pipelines.features.windows import I64
from reelway.platform.contracts.events import IMPRESSIONS, OUTCOME_HORIZON_S, OUTCOMES, TIMESTAMP_TYPE, OutcomeType
from reelway.platform.eventlog.outcome_events import OUTCOME_TYPES

HORIZON_US: Final = OUTCOME_HORIZON_S * 1_000_000
_WATCH: Final = OUTCOME_TYPES.index(OutcomeType.WATCH)


@dataclass(frozen=True)
class Outcomes:
    """Outcomes to apply, ``[N]``, in the log's order."""

    impression_id: I64
    viewer_id: I64
    video_id: I64
    shown_us: I64
    kind: I64  # index into KINDS
    value: NDArray[np.float32]
    time_us: I64  # in the stream's time; the outcome counts from AFTER_US later

    def __len__(self) -> int:
        return len(self.impression_id)

    def take(self, rows: NDArray[Any]) -> Outcomes:
        return Outcomes(**{name: getattr(self, name)[rows] for name in self.__dataclass_fields__})

    @classmethod
    def joined(cls, parts: list[Outcomes]) -> Outcomes:
        return cls(**{name: np.concatenate([getattr(p, name) for p in parts]) for name in cls.__dataclass_fields__})

    @classmethod
    def none(cls) -> Outcomes:
        empty = np.zeros(0, dtype=np.int64)
        return cls(empty, empty, empty, empty, empty, np.zeros(0, np.float32), empty)


@dataclass(frozen=True)
class OpenImpressions:
    """Impressions with their known outcomes, ``[I]``, by ascending id."""

    impression_id: I64
    viewer_id: I64
    video_id: I64
    shown_us: I64  # by the outcomes service's clock
    kinds: I64  # one bit per outcome type
    watch_ms: NDArray[np.float64]
    known_us: I64  # in the stream's time

    def __len__(self) -> int:
        return len(self.impression_id)

    def take(self, rows: NDArray[Any]) -> OpenImpressions:
        return OpenImpressions(**{name: getattr(self, name)[rows] for name in self.__dataclass_fields__})


def within_horizon(outcomes: Outcomes, behind_us: int) -> NDArray[np.bool_]:
    """Returns whether each outcome is within the outcome horizon of its impression."""
    return np.asarray(outcomes.time_us <= outcomes.shown_us - behind_us + HORIZON_US)


def earliest_per_type(outcomes: Outcomes) -> Outcomes:
    """Returns the earliest outcome of each type per impression; at equal times, the first in the log."""
    order = np.lexsort((np.arange(len(outcomes)), outcomes.time_us))
    code = outcomes.impression_id[order] * len(OUTCOME_TYPES) + outcomes.kind[order]
    _, first = np.unique(code, return_index=True)
    return outcomes.take(order[first])


def merge_outcomes(
    before: OpenImpressions, outcomes: Outcomes, behind_us: int
) -> tuple[OpenImpressions, OpenImpressions, int]:
    """Returns the changed impressions: previous state (if they existed), new state, and the outcomes not repeated.

    Args:
        before: known state of any of these impressions, by ascending id.
    """
    offered = len(outcomes)
    outcomes = earliest_per_type(outcomes)
    ids, index = np.unique(outcomes.impression_id, return_inverse=True)
    row, exists = _rows_of(before.impression_id, ids)
    kinds = np.where(exists, before.kinds[row] if len(before) else 0, 0).astype(np.int64)
    bit = np.left_shift(1, outcomes.kind)
    fresh = (kinds[index] & bit) == 0
    repeats = offered - int(fresh.sum())
    outcomes, index, bit = outcomes.take(fresh), index[fresh], bit[fresh]
    watch = np.where(exists, before.watch_ms[row] if len(before) else 0.0, 0.0)
    known = np.where(exists, before.known_us[row] if len(before) else 0, 0).astype(np.int64)
    np.bitwise_or.at(kinds, index, bit)
    is_watch = outcomes.kind == _WATCH
    watch[index[is_watch]] = outcomes.value[is_watch]
    np.maximum.at(known, index, np.maximum(outcomes.time_us, outcomes.shown_us - behind_us))
    changed, first = np.unique(index, return_index=True)
    old = before.take(row[changed][exists[changed]]) if len(before) else before
    facts = {name: _first_known_value(name, before, outcomes, row[changed], exists[changed], first) for name in _FACTS}
    new = OpenImpressions(ids[changed], **facts, kinds=kinds[changed], watch_ms=watch[changed], known_us=known[changed])
    return old, new, repeats


_FACTS: Final = ("viewer_id", "video_id", "shown_us")


def _first_known_value(
    name: str, before: OpenImpressions, outcomes: Outcomes, row: I64, exists: NDArray[np.bool_], first: I64
) -> I64:
    """Returns a property of each impression as its first record reported it."""
    fresh: I64 = getattr(outcomes, name)[first]
    return np.where(exists, getattr(before, name)[row], fresh) if len(before) else fresh


def label_open_impressions(impressions: OpenImpressions, videos: pa.Table, behind_us: int) -> Events:
    """Returns the labels of the impressions. ``videos`` must contain all of their videos."""
    n = len(impressions)
    shown = pa.array(impressions.shown_us - behind_us, pa.int64()).cast(TIMESTAMP_TYPE)
    nothing = pa.array([""] * n).dictionary_encode()
    facts = {
        "impression_id": impressions.impression_id, "request_id": impressions.impression_id,
        "viewer_id": impressions.viewer_id, "video_id": impressions.video_id, "position": np.zeros(n, np.int16),
        "event_time": shown, "release": nothing, "arm": nothing, "source": nothing,
        "propensity": np.ones(n, np.float32), "device": nothing,
    }  # fmt: skip
    table = pa.table([facts[name] for name in IMPRESSIONS.names], names=IMPRESSIONS.names).cast(IMPRESSIONS)
    events = Events.from_labels(label_impressions(table, _outcome_rows(impressions), videos))
    return replace(events, event_us=impressions.shown_us)


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
