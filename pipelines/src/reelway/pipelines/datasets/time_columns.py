"""Reads times of every usual form as microseconds since 1970, in UTC.

Accepted are time and date columns, Unix seconds, and text: ISO 8601 and the forms that PostgreSQL and BigQuery write.
A time without a zone is UTC; a date is its midnight. Digits beyond microseconds are cut off.
"""

from __future__ import annotations

from typing import Final

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from reelway.pipelines.datasets.delimited import first_uncastable
from reelway.pipelines.datasets.source_table import TEXT, SourceTable

I64 = NDArray[np.int64]

EXPECTED: Final = "a time like 2025-01-31T12:00:00Z (UTC where no zone is given), a date, or Unix time in seconds"
_PARTS: Final = (
    r"^(?P<date>\d{4}-\d\d-\d\d)(?:[Tt ](?P<time>\d\d:\d\d(?::\d\d)?)(?P<fraction>\.\d+)?)?"
    r" ?(?:[Zz]|UTC|GMT|(?P<sign>[+-])(?P<hours>\d\d):?(?P<minutes>\d\d)?)?$"
)
_NUMBER: Final = r"^[+-]?\d+(\.\d*)?([eE][+-]?\d+)?$"
_MAX_SECONDS: Final = 1e11
"""About the year 5138. A larger number is in milliseconds or smaller units."""
_LARGEST_US: Final = 2**62
_PER_SECOND: Final = {"s": 1, "ms": 1_000, "us": 1_000_000, "ns": 1_000_000_000}


def read_times_us(source: SourceTable, name: str, array: pa.Array) -> I64:
    """Returns microseconds since 1970; a null has an arbitrary value.

    A time outside of +-2**62 us becomes that limit, and the data checks set its row aside.

    Raises:
        MalformedFileError: if a value is no time, or most numbers are too large to be seconds.
    """
    kind = array.type
    if pa.types.is_timestamp(kind):
        return _scaled(array.cast(pa.int64()), _PER_SECOND[kind.unit])
    if pa.types.is_date(kind):
        return _scaled(array.cast(pa.date64(), safe=False).cast(pa.int64()), 1_000)
    if pa.types.is_integer(kind) or pa.types.is_floating(kind) or pa.types.is_decimal(kind):
        return _from_seconds(source, name, array)
    text = source.text(name, array)
    if len(text) > text.null_count and pc.all(pc.match_substring_regex(text, _NUMBER)).as_py():
        return _from_seconds(source, name, text)
    return _from_text(source, name, text)


def _scaled(ticks: pa.Array, per_second: int) -> I64:
    values = _integers(ticks)
    if per_second > 1_000_000:
        return values // (per_second // 1_000_000)
    factor = 1_000_000 // per_second
    return np.clip(values, -(_LARGEST_US // factor), _LARGEST_US // factor) * factor


def _from_seconds(source: SourceTable, name: str, array: pa.Array) -> I64:
    numbers = source.numbers(name, array, pa.float64(), EXPECTED)
    source.raise_if_any(name, pc.fill_null(pc.is_nan(numbers), False), array, EXPECTED)
    seconds = pc.fill_null(numbers, 0.0).to_numpy(zero_copy_only=False)
    large = np.abs(seconds) >= _MAX_SECONDS
    if 2 * large.sum() > len(large) - array.null_count:
        source.raise_if_any(name, pa.array(large), array, "Unix time in seconds; divide milliseconds by 1000")
    rounded: I64 = np.rint(np.clip(seconds, -_LARGEST_US / 1e6, _LARGEST_US / 1e6) * 1e6).astype(np.int64)
    return rounded


def _from_text(source: SourceTable, name: str, text: pa.Array) -> I64:
    parts = pc.extract_regex(text, _PARTS)
    source.raise_if_any(name, pc.and_not(text.is_valid(), parts.is_valid()), text, EXPECTED)
    date, time, fraction, sign, hours, minutes = (
        pc.if_else(pc.equal(part, ""), pa.scalar(None, TEXT), part)
        for part in (pc.struct_field(parts, i) for i in range(6))
    )
    clock = pc.binary_join_element_wise(date, pc.fill_null(time, "00:00"), pa.scalar("T", TEXT))
    try:
        whole = clock.cast(pa.timestamp("s"))
    except pa.ArrowInvalid:
        row = first_uncastable(clock, pa.timestamp("s"))
        raise source.malformed(name, text, row, EXPECTED) from None
    micros = pc.utf8_slice_codeunits(pc.utf8_rpad(pc.fill_null(fraction, "."), 7, "0"), 1, 7)
    minutes_east = 60 * _integers(hours) + _integers(minutes)
    offset_us = np.where(pc.fill_null(pc.equal(sign, "-"), False), -1, 1) * minutes_east * 60_000_000
    time_us: I64 = _integers(whole) * 1_000_000 + _integers(micros) - offset_us
    return time_us


def _integers(array: pa.Array) -> I64:
    values: I64 = pc.fill_null(array.cast(pa.int64()), 0).to_numpy(zero_copy_only=False)
    return values
