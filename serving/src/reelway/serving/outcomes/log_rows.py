"""Rows of the event log as the columns that the ledger counts."""

# Shapes: N outcomes, R rows of exposures (one per slate and mask of slices), V videos

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from reelway.platform.contracts.events import LONG_WATCH_CAP_MS, LONG_WATCH_RATIO, Arm, OutcomeType
from reelway.platform.contracts.ids import MAX_ID
from reelway.platform.errors import DataError
from reelway.platform.eventlog import StoredRecord
from reelway.platform.eventlog.erasures import of_known_viewers
from reelway.platform.eventlog.exposure_events import decode_exposures
from reelway.platform.eventlog.outcome_events import OUTCOME_TYPES, decode_outcomes
from reelway.platform.tokens import ALL_SLICES
from reelway.serving.outcomes.exposures import ArmKey
from reelway.serving.outcomes.viewer_sums import METRICS

_KIND_CODES: Final = {kind.value: code for code, kind in enumerate(OUTCOME_TYPES)}
_ARMS: Final = frozenset(arm.value for arm in Arm)
METRIC_OF_KIND: Final = np.array(
    [METRICS.index("watch_s_per_impression" if kind is OutcomeType.WATCH else f"{kind}_rate") for kind in OUTCOME_TYPES]
)
"""The metric that an outcome of each type adds to; a watch may add to ``LONG_WATCH`` as well."""
_LARGEST_VALUE: Final = float(np.finfo(np.float32).max)
LONG_WATCH: Final = METRICS.index("long_watch_rate")
WATCHED_AT_MOST: Final = 2.0
"""A watch counts at most this many times the video's duration, as the token states it."""
UNKNOWN_DURATION_WATCH_MS: Final = 60_000.0
"""A watch of a video of unknown duration counts at most this long: twice ``LONG_WATCH_CAP_MS``."""


@dataclass(frozen=True, slots=True)
class ExposureRows:
    """Slates of rollouts, each with one row per mask of slices."""

    arms: tuple[ArmKey, ...]
    arm: NDArray[np.int64]  # index into arms
    request_id: NDArray[np.int64]
    viewer_id: NDArray[np.int64]
    shown_at: NDArray[np.float64]  # Unix seconds
    logged_at: NDArray[np.float64]  # Unix seconds: the log's time of the record
    weight: NDArray[np.float64]
    slices: NDArray[np.uint8]
    count: NDArray[np.int64]  # impressions
    authenticated: NDArray[np.bool_]  # whether the viewer proved its identity

    def __len__(self) -> int:
        return len(self.arm)


@dataclass(frozen=True, slots=True)
class OutcomeRows:
    """Outcomes of the event log, of the types that this version knows."""

    arms: tuple[ArmKey, ...]
    arm: NDArray[np.int64]  # index into arms
    impression_id: NDArray[np.int64]
    viewer_id: NDArray[np.int64]
    issued_at: NDArray[np.float64]  # Unix seconds
    done_at: NDArray[np.float64]  # the client's event_time; -inf if it gave none
    logged_at: NDArray[np.float64]  # Unix seconds: the log's time of the record
    weight: NDArray[np.float64]
    slices: NDArray[np.uint8]
    duration_ms: NDArray[np.float64]  # 0 if unknown
    kind: NDArray[np.int64]  # index into OUTCOME_TYPES
    value: NDArray[np.float64]
    authenticated: NDArray[np.bool_]  # whether the viewer that reported it proved its identity

    def __len__(self) -> int:
        return len(self.arm)

    @property
    def watch(self) -> NDArray[np.bool_]:
        return np.equal(self.kind, _KIND_CODES[OutcomeType.WATCH])

    @property
    def long_watch(self) -> NDArray[np.bool_]:
        """The rule of ``contracts.events``. For a video of unknown length, ``LONG_WATCH_CAP_MS`` is the threshold."""
        share = np.where(self.duration_ms > 0, LONG_WATCH_RATIO * self.duration_ms, LONG_WATCH_CAP_MS)
        return np.asarray(self.watch & (self.value >= np.minimum(share, LONG_WATCH_CAP_MS)))

    @property
    def skip(self) -> NDArray[np.bool_]:
        return np.equal(self.kind, _KIND_CODES[OutcomeType.SKIP])

    @property
    def watch_limit_ms(self) -> NDArray[np.float64]:
        return np.where(self.duration_ms > 0, WATCHED_AT_MOST * self.duration_ms, UNKNOWN_DURATION_WATCH_MS)

    @property
    def bounded(self) -> NDArray[np.bool_]:
        """Whether a watch is longer than what counts of it."""
        return np.asarray(self.watch & (self.value > self.watch_limit_ms))

    @property
    def amount(self) -> NDArray[np.float64]:
        """What each outcome adds to its metric at weight 1: seconds of a watch up to its limit, else 1."""
        return np.where(self.watch, np.minimum(self.value, self.watch_limit_ms) / 1_000.0, 1.0)


def read_exposure_rows(record: StoredRecord) -> ExposureRows:
    """Decodes one record; the slates that were shown outside of any rollout are left out. A record may have no rows.

    Raises:
        DataError: if the record is not a batch of exposures, or a value is outside its range.
    """
    table = of_known_viewers(decode_exposures(record.payload))
    rollout = _strings(table, "rollout")
    table = table.filter(pa.array(np.array([bool(name) for name in rollout.names], np.bool_)[rollout.codes]))
    arms, arm_V = _arms(table)
    request_V, slices_V = _numbers(table, "request_id"), _slices(table)
    _, first, count = np.unique(
        np.stack([request_V, slices_V.astype(np.int64)]), axis=1, return_index=True, return_counts=True
    )
    in_order = np.argsort(first)
    first, count = first[in_order], count[in_order]
    return ExposureRows(
        arms,
        arm=arm_V[first],
        request_id=request_V[first],
        viewer_id=_in_range(table, "viewer_id", MAX_ID)[first],
        shown_at=_seconds(table, "shown_at")[first],
        logged_at=np.full(len(first), record.time_us / 1e6),
        weight=_in_range(table, "weight", 1)[first].astype(np.float64),
        slices=slices_V[first],
        count=count,
        authenticated=_flags(table, "authenticated")[first],
    )


def read_outcome_rows(record: StoredRecord) -> OutcomeRows:
    """Decodes one record; outcomes of types that this version does not know are left out.

    Raises:
        DataError: if the record is not a batch of outcomes, or a value is outside its range.
    """
    table = of_known_viewers(decode_outcomes(record.payload))
    types = _strings(table, "type")
    kind = np.array([_KIND_CODES.get(name, -1) for name in types.names], np.int64)[types.codes]
    known = np.flatnonzero(kind >= 0)
    table = table.take(pa.array(known))
    arms, arm_N = _arms(table)
    return OutcomeRows(
        arms,
        arm=arm_N,
        impression_id=_numbers(table, "impression_id"),
        viewer_id=_in_range(table, "viewer_id", MAX_ID),
        issued_at=_seconds(table, "shown_at"),
        done_at=_seconds(table, "done_at"),
        logged_at=np.full(len(known), record.time_us / 1e6),
        weight=_in_range(table, "weight", 1).astype(np.float64),
        slices=_slices(table),
        duration_ms=_numbers(table, "duration_ms").astype(np.float64),
        kind=kind[known],
        value=_in_range(table, "value", _LARGEST_VALUE).astype(np.float64),
        authenticated=_flags(table, "authenticated"),
    )


@dataclass(frozen=True, slots=True)
class _Strings:
    """A column of strings: ``names[codes]``. Nulls are the empty string."""

    codes: NDArray[np.int64]
    names: list[str]


def _strings(table: pa.Table, name: str) -> _Strings:
    column = table.column(name).unify_dictionaries().combine_chunks()
    column = column.chunk(0) if isinstance(column, pa.ChunkedArray) and column.num_chunks else column
    if not len(column):
        return _Strings(np.zeros(0, np.int64), [])
    names = column.dictionary.to_pylist()
    if None in names:
        raise DataError(f"event log: a record has a null among the names of column {name!r}, expected none")
    codes = column.indices.fill_null(len(names)).to_numpy(zero_copy_only=False).astype(np.int64)
    return _Strings(codes, [*names, ""])


def _arms(table: pa.Table) -> tuple[tuple[ArmKey, ...], NDArray[np.int64]]:
    """Returns the arms and each row's index. An unknown arm of a newer writer is outside of any rollout."""
    parts = [_strings(table, name) for name in ("rollout", "arm", "release")]
    combined = np.stack([part.codes for part in parts])
    keys, code_N = np.unique(combined, axis=1, return_inverse=True)
    arms = []
    for codes in keys.T.tolist():
        rollout, arm, release = (part.names[code] for part, code in zip(parts, codes, strict=True))
        arms.append(ArmKey(rollout, Arm(arm), release) if arm in _ARMS else ArmKey("", Arm.STABLE, release))
    return tuple(arms), code_N.reshape(-1).astype(np.int64)


def _numbers(table: pa.Table, name: str) -> NDArray[Any]:
    """A column as an array; 0 instead of null."""
    return np.asarray(table.column(name).fill_null(0).to_numpy())


def _in_range(table: pa.Table, name: str, largest: float) -> NDArray[Any]:
    """``_numbers`` of a column whose values are within 0..largest.

    Raises:
        DataError: if a value is outside the range, or not a number.
    """
    values = _numbers(table, name)
    wrong = np.flatnonzero(~((values >= 0) & (values <= largest)))
    if len(wrong):
        raise DataError(
            f"event log: a record has {len(wrong)} values of column {name!r} outside 0..{largest}, "
            f"the first is {values[wrong[0]]}"
        )
    return values


def _slices(table: pa.Table) -> NDArray[np.uint8]:
    """The known bits of the column ``slices``."""
    return (_numbers(table, "slices").astype(np.int64) & ALL_SLICES).astype(np.uint8)


def _flags(table: pa.Table, name: str) -> NDArray[np.bool_]:
    """A column of booleans; false instead of null."""
    return np.asarray(table.column(name).fill_null(False).to_numpy(), np.bool_)


def _seconds(table: pa.Table, name: str) -> NDArray[np.float64]:
    """A column of timestamps as Unix seconds; -inf instead of null."""
    column = table.column(name).cast(pa.int64())
    micros = column.fill_null(0).to_numpy().astype(np.float64)
    return np.where(column.is_null().to_numpy(), -np.inf, micros / 1e6)
