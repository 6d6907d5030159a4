"""Data checks: split a data set into clean rows and rejected rows with a reason.

Every row of the input is either in the clean data set or in ``rejected``, under the first reason that applies. The run
fails if a table has too many bad rows, because then the source itself is wrong.
"""

# Shapes: N rows of the table at hand

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from reelway.pipelines.datasets.store import Dataset
from reelway.platform.contracts.events import DATASET_TABLES, Arm, OutcomeType
from reelway.platform.contracts.ids import MAX_ID
from reelway.platform.errors import EmptyDatasetError, TooManyBadRowsError

Mask = NDArray[np.bool_]
I64 = NDArray[np.int64]
RowCheck = tuple[str, Mask]
"""A reason, and a mask of the rows it applies to."""

REJECTED: Final = pa.schema(
    [
        pa.field("table", pa.string(), nullable=False),
        pa.field("row_id", pa.int64(), nullable=False),
        pa.field("reason", pa.string(), nullable=False),
        pa.field("row", pa.string(), nullable=False),  # the whole row as JSON
    ]
)
_MINUTE_US: Final = 60_000_000
_YEAR_1_US: Final = -62_135_596_800_000_000
_YEAR_10000_US: Final = 253_402_300_800_000_000


@dataclass(frozen=True)
class CheckLimits:
    """Limits of valid values, and the share of bad rows that fails the run."""

    max_bad_ratio: float = 0.05
    """Largest accepted share of bad rows in a table; 1 accepts all."""
    max_impressions_per_minute: int = 300
    """A viewer with more impressions within any 60 s is a bot, and all events of that viewer are rejected."""
    max_duration_ms: int = 12 * 3600 * 1000
    max_watch_ms: float = 24 * 3600 * 1000.0
    max_position: int = 1000
    first_time_us: int = 631_152_000_000_000  # 1990
    last_time_us: int = 4_102_444_800_000_000  # 2100


RATING_LIMITS: Final = CheckLimits(max_impressions_per_minute=2000)
"""Limits for rating data sets, whose users rate a page of movies in one second."""


@dataclass(frozen=True)
class CheckedDataset:
    """The clean data set and the rejected rows."""

    dataset: Dataset
    rejected: pa.Table
    counts: Mapping[str, Mapping[str, int]]
    """Table -> reason -> number of rejected rows."""

    @property
    def rejected_rows(self) -> int:
        return int(self.rejected.num_rows)


def check_dataset(dataset: Dataset, limits: CheckLimits = CheckLimits()) -> CheckedDataset:
    """Separates bad rows from clean rows.

    Raises:
        EmptyDatasetError: if there are no impressions before or after the checks.
        TooManyBadRowsError: if a table has a larger share of bad rows than ``limits.max_bad_ratio``.
    """
    if not dataset.impressions.num_rows:
        raise EmptyDatasetError(
            f"data set {dataset.info.get('name', '?')!r}: 0 impressions, expected at least one; check the source"
        )
    clean: dict[str, pa.Table] = {}
    rejected: list[pa.Table] = []
    counts: dict[str, dict[str, int]] = {}
    for name in DATASET_TABLES:  # entities precede the events that refer to them
        table = dataset.tables[name]
        reason = _first_reasons(table.num_rows, _CHECKS[name](table, dataset, clean, limits))
        counts[name] = dict(sorted(Counter(reason[reason != ""].tolist()).items(), key=lambda item: -item[1]))
        _stop_if_too_many(dataset, name, counts[name], table.num_rows, limits)
        bad = pa.array(reason != "")
        clean[name] = table.filter(pc.invert(bad))
        rejected.append(_rejected_rows(name, table.filter(bad), reason[reason != ""]))
    if not clean["impressions"].num_rows:
        raise EmptyDatasetError(f"data set {dataset.info.get('name', '?')!r}: no impression passed; {counts}")
    info = {**dataset.info, "rejected": counts}
    return CheckedDataset(
        Dataset(**clean, info=info, dimensions=dataset.dimensions), pa.concat_tables(rejected), counts
    )


def _first_reasons(rows: int, row_checks: Iterator[RowCheck]) -> NDArray[np.str_]:
    reason = np.full(rows, "", dtype="<U40")
    for name, bad in row_checks:
        reason[bad & (reason == "")] = name
    return reason


def _stop_if_too_many(dataset: Dataset, name: str, counts: Mapping[str, int], rows: int, limits: CheckLimits) -> None:
    bad = sum(counts.values())
    if bad <= limits.max_bad_ratio * rows:
        return
    top = ", ".join(f"{reason} {count:,}" for reason, count in list(counts.items())[:3])
    raise TooManyBadRowsError(
        f"data set {dataset.info.get('name', '?')!r}, table {name}: {bad:,} of {rows:,} rows are bad "
        f"({bad / rows:.1%}), expected at most {limits.max_bad_ratio:.1%}; most often: {top}. "
        "Repair the source, or raise --max-bad-ratio"
    )


def _rejected_rows(name: str, bad: pa.Table, reason: NDArray[np.str_]) -> pa.Table:
    values = ({key: _json_value(value) for key, value in row.items()} for row in _times_as_text(bad).to_pylist())
    rows = [json.dumps(row, default=str, allow_nan=False) for row in values]
    return pa.table(
        {
            "table": pa.array([name] * bad.num_rows, pa.string()),
            "row_id": bad.column(0),  # every table's first column is its id
            "reason": pa.array(reason.tolist(), pa.string()),
            "row": pa.array(rows, pa.string()),
        },
        schema=REJECTED,
    )


def _times_as_text(table: pa.Table) -> pa.Table:
    """Returns the table with text for times. Outside of the years 1 to 9999 the text is microseconds since 1970."""
    for i, field in enumerate(table.schema):
        if pa.types.is_timestamp(field.type):
            time, ticks = table.column(i), table.column(i).cast(pa.int64())
            within = pc.and_(pc.greater_equal(ticks, _YEAR_1_US), pc.less(ticks, _YEAR_10000_US))
            outside = pc.binary_join_element_wise(ticks.cast(pa.string()), "us", " ")
            table = table.set_column(i, field.name, pc.if_else(within, time.cast(pa.string()), outside))
    return table


def _json_value(value: Any) -> Any:
    """Returns a value for JSON, which has no infinite numbers and no NaN."""
    if isinstance(value, list):
        return [_json_value(item) for item in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def _viewers(table: pa.Table, _: Dataset, __: Mapping[str, pa.Table], limits: CheckLimits) -> Iterator[RowCheck]:
    yield from _ids(table, "viewer_id")
    yield from _time_checks(table, "created_at", limits)


def _creators(table: pa.Table, _: Dataset, __: Mapping[str, pa.Table], limits: CheckLimits) -> Iterator[RowCheck]:
    yield from _ids(table, "creator_id")
    yield from _time_checks(table, "created_at", limits)
    yield "followers_out_of_range", table["followers"].to_numpy() < 0


def _videos(
    table: pa.Table, dataset: Dataset, clean: Mapping[str, pa.Table], limits: CheckLimits
) -> Iterator[RowCheck]:
    yield from _ids(table, "video_id")
    yield from _time_checks(table, "uploaded_at", limits)
    duration, topic = table["duration_ms"].to_numpy(), table["topic"].to_numpy()
    yield "duration_out_of_range", (duration <= 0) | (duration > limits.max_duration_ms)
    yield "topic_out_of_range", (topic < -1) | (topic >= dataset.dimensions.topics)
    for name, width in dataset.dimensions.content.items():
        yield f"bad_{name}_embedding", _bad_vectors(table[name], width)
    yield "video_without_creator", ~_look_up(clean["creators"], "creator_id", table["creator_id"].to_numpy())[1]


def _impressions(table: pa.Table, _: Dataset, clean: Mapping[str, pa.Table], limits: CheckLimits) -> Iterator[RowCheck]:
    yield from _ids(table, "impression_id")
    yield from _time_checks(table, "event_time", limits)
    position, propensity = table["position"].to_numpy(), table["propensity"].to_numpy()
    request = table["request_id"].to_numpy()
    yield "id_out_of_range", (request < 0) | (request > MAX_ID)
    yield "position_out_of_range", (position < 0) | (position > limits.max_position)
    yield "propensity_out_of_range", ~((propensity > 0) & (propensity <= 1))
    yield "unknown_arm", ~_one_of(table["arm"], [arm.value for arm in Arm])
    time_us, viewer, video = _us(table["event_time"]), table["viewer_id"].to_numpy(), table["video_id"].to_numpy()
    yield "repeated_impression", _repeated([viewer, video, time_us, position.astype(np.int64)])
    for entity, key, known_from, missing in (
        ("viewers", "viewer_id", "created_at", "viewer_without_profile"),
        ("videos", "video_id", "uploaded_at", "video_without_metadata"),
    ):
        ids = table[key].to_numpy()
        row, known = _look_up(clean[entity], key, ids)
        yield missing, ~known
        if known.any():
            start_us = _us(clean[entity][known_from])[row]
            yield f"before_{entity[:-1]}_{known_from}", known & (time_us < start_us)
    yield "bot_rate", np.isin(viewer, _bot_viewers(viewer, time_us, limits.max_impressions_per_minute))


def _outcomes(
    table: pa.Table, dataset: Dataset, clean: Mapping[str, pa.Table], limits: CheckLimits
) -> Iterator[RowCheck]:
    yield from _ids(table, "outcome_id")
    yield from _time_checks(table, "event_time", limits)
    yield "unknown_outcome_type", ~_one_of(table["type"], [kind.value for kind in OutcomeType])
    value, watch = table["value"].to_numpy(), _one_of(table["type"], [OutcomeType.WATCH.value])
    yield "value_out_of_range", ~((value >= 0) & (value <= np.where(watch, limits.max_watch_ms, 1.0)))
    owner, time_us = table["impression_id"].to_numpy(), _us(table["event_time"])
    kind = table["type"].combine_chunks().cast(pa.string()).dictionary_encode().indices.to_numpy().astype(np.int64)
    yield "repeated_outcome", _repeated([owner, kind, time_us, value.view(np.int32).astype(np.int64)])
    row, known = _look_up(clean["impressions"], "impression_id", owner)
    _, exists = _look_up(dataset.impressions, "impression_id", owner)
    yield "outcome_without_impression", ~exists
    yield "impression_rejected", ~known
    if known.any():
        shown = clean["impressions"]
        same = (shown["viewer_id"].to_numpy()[row] == table["viewer_id"].to_numpy()) & (
            shown["video_id"].to_numpy()[row] == table["video_id"].to_numpy()
        )
        yield "not_its_impressions_viewer_or_video", known & ~same
        yield "before_its_impression", known & (time_us < _us(shown["event_time"])[row])


_CHECKS: Final = {
    "viewers": _viewers,
    "creators": _creators,
    "videos": _videos,
    "impressions": _impressions,
    "outcomes": _outcomes,
}


def _us(column: pa.ChunkedArray) -> I64:
    values: I64 = column.cast(pa.int64()).to_numpy()
    return values


def _ids(table: pa.Table, key: str) -> Iterator[RowCheck]:
    ids = table[key].to_numpy()
    yield "id_out_of_range", (ids < 0) | (ids > MAX_ID)
    yield "duplicate_id", _repeated([ids])


def _time_checks(table: pa.Table, column: str, limits: CheckLimits) -> Iterator[RowCheck]:
    time_us = _us(table[column])
    yield "time_out_of_range", (time_us < limits.first_time_us) | (time_us > limits.last_time_us)


def _repeated(keys: Sequence[I64]) -> Mask:
    """Returns a mask of the rows that equal an earlier row in all keys."""
    order = np.lexsort(keys[::-1])  # stable: the earliest of equal rows comes first
    equal = np.ones(len(order), dtype=np.bool_)
    equal[:1] = False
    for key in keys:
        column = key[order]
        equal[1:] &= column[1:] == column[:-1]
    again = np.zeros(len(order), dtype=np.bool_)
    again[order] = equal
    return again


def _look_up(table: pa.Table, key: str, wanted: I64) -> tuple[I64, Mask]:
    """Returns the row in ``table`` of each wanted id, and whether the id exists; a missing id gets any row."""
    ids = table[key].to_numpy()
    if not len(ids):
        return np.zeros(len(wanted), dtype=np.int64), np.zeros(len(wanted), dtype=np.bool_)
    order = np.argsort(ids, kind="stable")
    row = order[np.minimum(np.searchsorted(ids[order], wanted), len(ids) - 1)]
    return row, ids[row] == wanted


def _one_of(column: pa.ChunkedArray, strings: Sequence[str]) -> Mask:
    allowed: Mask = pc.is_in(column.cast(pa.string()), pa.array(strings, pa.string())).to_numpy()
    return allowed


def _bad_vectors(column: pa.ChunkedArray, width: int) -> Mask:
    """Returns a mask of the lists that have another length or a value that is not finite; null is no bad list."""
    array = column.combine_chunks()
    lengths = pc.fill_null(pc.list_value_length(array), 0).to_numpy(zero_copy_only=False)
    valid = array.is_valid().to_numpy(zero_copy_only=False)
    values = pc.fill_null(array.flatten(), float("nan")).to_numpy(zero_copy_only=False)
    row = np.repeat(np.arange(len(lengths)), lengths)
    not_finite = np.bincount(row[~np.isfinite(values)], minlength=len(lengths)) > 0
    bad: Mask = valid & ((lengths != width) | not_finite)
    return bad


def _bot_viewers(viewer: I64, time_us: I64, per_minute: int) -> I64:
    """Returns the viewers with more than ``per_minute`` impressions within any 60 s."""
    order = np.lexsort((time_us, viewer))
    viewer, time_us = viewer[order], time_us[order]
    same = viewer[per_minute:] == viewer[:-per_minute]
    fast = time_us[per_minute:] - time_us[:-per_minute] < _MINUTE_US
    return np.unique(viewer[per_minute:][same & fast])


def summary_counts(counts: Mapping[str, Mapping[str, int]]) -> list[tuple[str, str, int]]:
    """Returns (table, reason, rows) of all rejected rows, most frequent first."""
    flat: list[tuple[str, str, Any]] = [(t, r, n) for t, reasons in counts.items() for r, n in reasons.items()]
    return sorted(flat, key=lambda item: -item[2])
