"""No value of a row ends an import with a traceback, and times of every usual form are read."""

from __future__ import annotations

import contextlib
import datetime
import decimal
import json
import re
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from reelway.pipelines.datasets.checks import CheckedDataset, CheckLimits, check_dataset
from reelway.pipelines.datasets.content_dimensions import infer_dimensions
from reelway.pipelines.datasets.event_files import import_events
from reelway.pipelines.datasets.store import Dataset, cast_to_schema
from reelway.platform.contracts.events import DATASET_TABLES
from reelway.platform.errors import DataError, MalformedFileError

AT = 1_738_324_800
NOON = "2025-01-31T12:00:00+00:00"


def checked(path: Path) -> CheckedDataset:
    tables, _, _ = import_events(path)
    ready = {name: cast_to_schema(Path(name), tables[name], name) for name in DATASET_TABLES}
    limits = CheckLimits(max_bad_ratio=0.05)
    return check_dataset(Dataset(**ready, info={}, dimensions=infer_dimensions(ready)), limits)


def write(path: Path, **columns: Any) -> Path:
    """Writes 40 impressions of one video; the given columns replace the defaults."""
    defaults = {"viewer_id": range(40), "video_id": [1] * 40, "event_time": range(AT, AT + 40)}
    pq.write_table(pa.table({**defaults, **columns}), path)
    return path


def csv_times(path: Path, *texts: str) -> list[str]:
    path.write_text(
        "\n".join(["viewer_id,video_id,event_time", *(f"{i},7,{text}" for i, text in enumerate(texts)), ""])
    )
    tables, _, _ = import_events(path)
    return [time.isoformat() for time in tables["impressions"]["event_time"].to_pylist()]


@pytest.mark.parametrize(
    "wrong",
    [
        pa.array([*range(AT, AT + 39), AT * 1000], pa.timestamp("s")),  # milliseconds
        pa.array([*range(AT, AT + 39), -62_170_156_800], pa.timestamp("s")),  # year 0
        pa.array([*range(AT, AT + 39), 2**63 // 1000], pa.timestamp("s")),
        pa.array([*(1000 * (AT + i) for i in range(39)), -(2**63) + 1], pa.timestamp("ms", "Asia/Tokyo")),
        pa.array([*(10**6 * (AT + i) for i in range(39)), 2**63 - 1], pa.timestamp("us")),
        pa.array([*range(AT, AT + 39), AT * 1000]),
        pa.array([*range(AT, AT + 39), 2**63 - 1]),
        pa.array([*map(float, range(AT, AT + 39)), float("inf")]),
        pa.array([*map(float, range(AT, AT + 39)), -1e300]),
        pa.array([*map(str, range(AT, AT + 39)), "1e300"]),
        pa.array([*("2025-01-31 12:00:00" for _ in range(39)), "0001-01-01"]),
        pa.array([*("2025-01-31 12:00:00" for _ in range(39)), "9999-12-31T23:59:59.999-12:00"]),
    ],
)
def test_impossible_time_sets_one_impression_aside(tmp_path: Path, wrong: pa.Array) -> None:
    result = checked(write(tmp_path / "e.parquet", event_time=wrong))
    assert [(row["table"], row["reason"]) for row in result.rejected.to_pylist()] == [
        ("impressions", "time_out_of_range")
    ]
    assert json.loads(result.rejected["row"][0].as_py())["viewer_id"] == 39
    assert result.dataset.impressions.num_rows == 39
    assert result.dataset.videos["uploaded_at"].to_pylist()[0].isoformat() == NOON


@pytest.mark.parametrize("watch_ms", [float("inf"), -float("inf"), 1e300, -1.0, 1_738_324_800_000_000.0, 1e39])
def test_impossible_watch_sets_one_outcome_aside(tmp_path: Path, watch_ms: float) -> None:
    result = checked(write(tmp_path / "e.parquet", watch_ms=[1000.0] * 39 + [watch_ms]))
    assert [(row["table"], row["reason"]) for row in result.rejected.to_pylist()] == [
        ("outcomes", "value_out_of_range")
    ]
    json.loads(result.rejected["row"][0].as_py(), parse_constant=pytest.fail)
    assert result.dataset.impressions.num_rows == 40


@given(st.data())
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None, max_examples=80)
def test_no_value_ends_an_import_with_another_error(tmp_path: Path, data: st.DataObject) -> None:
    name = data.draw(
        st.sampled_from(["viewer_id", "video_id", "event_time", "watch_ms", "like", "position", "propensity"])
    )
    kind = data.draw(
        st.sampled_from([pa.int64(), pa.uint64(), pa.float64(), pa.float32(), pa.string(), pa.binary(), pa.bool_(),
                         pa.date32(), pa.timestamp("s"), pa.timestamp("ns"), pa.decimal128(38, 3), pa.duration("s"),
                         pa.time64("us"), pa.null(), pa.list_(pa.int64()), pa.struct([("a", pa.int8())])])
    )  # fmt: skip
    bits = data.draw(st.lists(st.integers(-(2**63), 2**63 - 1), min_size=40, max_size=40))
    if pa.types.is_floating(kind):
        special = [float("nan"), float("inf"), 1e300, 0.0, 1.0, None]
        column = pa.array([special[bit % 7] if bit % 7 < 6 else float(bit) for bit in bits]).cast(kind)
    elif pa.types.is_string(kind) or pa.types.is_binary(kind):
        texts = [None, "", "1", "nan", "2025-01-31", "2025-02-31", "24:00", "1e400", "\u0661", "0000-00-00T00:00:00Z"]
        column = pa.array([texts[bit % 11] if bit % 11 < 10 else str(bit) for bit in bits], pa.string()).cast(kind)
    elif pa.types.is_null(kind) or pa.types.is_nested(kind):
        column = pa.nulls(40, kind)
    elif pa.types.is_decimal(kind):
        column = pa.array([decimal.Decimal(bit) / 1000 for bit in bits], kind)
    elif pa.types.is_boolean(kind):
        column = pa.array([bit % 2 == 0 for bit in bits])
    elif pa.types.is_date(kind):
        column = pa.array([bit % 2**31 for bit in bits], pa.int32()).cast(kind)
    else:
        in_seconds = kind == pa.timestamp("s")  # pyarrow writes these to Parquet as milliseconds
        column = pa.array([bit // 1001 if in_seconds else bit for bit in bits]).cast(kind, safe=False)
    path = write(tmp_path / "e.parquet", **{name: column})
    with contextlib.suppress(DataError):
        checked(path)


@pytest.mark.parametrize(
    "text",
    [
        "2025-01-31T12:00:00Z", "2025-01-31T12:00:00", "2025-01-31 12:00:00", "2025-01-31 12:00",
        "2025-01-31 12:00:00 UTC", "2025-01-31 12:00:00+00", "2025-01-31t14:30:00+02:30", "2025-01-31 07:00:00-0500",
        "2025-01-31 12:00:00.000 UTC",
        "2025-01-31T12:00:00.000000999Z", "1738324800", "1738324800.0", "1.7383248e9",
    ],
)  # fmt: skip
def test_time_without_a_zone_is_utc(tmp_path: Path, text: str) -> None:
    assert csv_times(tmp_path / "e.csv", text) == [NOON]


def test_times_of_several_forms_are_read(tmp_path: Path) -> None:
    assert csv_times(tmp_path / "e.csv", "2025-01-31T12:00:00Z", "2025-01-31 12:00:00.5+00", "2025-02-01") == [
        NOON, "2025-01-31T12:00:00.500000+00:00", "2025-02-01T00:00:00+00:00",
    ]  # fmt: skip


@pytest.mark.parametrize(
    "text",
    ["2025-02-30", "2025-01-31T25:00:00Z", "31.01.2025", "2025-1-31", "2025-01-31 12:00:00 CET", "noon", "2025-W05",
     "2025-01-31T12:00:00+1", "12:00:00"],
)  # fmt: skip
def test_other_times_are_rejected_by_row(tmp_path: Path, text: str) -> None:
    with pytest.raises(
        MalformedFileError, match=f"row 3, column 'event_time': saw '{re.escape(text)}', expected a time"
    ):
        csv_times(tmp_path / "e.csv", "2025-01-31", text)


def test_milliseconds_are_named(tmp_path: Path) -> None:
    with pytest.raises(MalformedFileError, match=r"row 2.*saw '1738324800000', expected Unix time in seconds; divide"):
        csv_times(tmp_path / "e.csv", "1738324800000", "1738324801000")


@pytest.mark.parametrize(
    ("column", "first"),
    [
        (pa.array([datetime.date(2025, 1, 31)] * 40), "2025-01-31T00:00:00+00:00"),
        (pa.array([datetime.date(2025, 1, 31)] * 40, pa.date64()), "2025-01-31T00:00:00+00:00"),
        (pa.array([decimal.Decimal("1738324800.5")] * 40), "2025-01-31T12:00:00.500000+00:00"),
        (pa.array([AT * 10**9 + 1500] * 40, pa.timestamp("ns")), "2025-01-31T12:00:00.000001+00:00"),
        (pa.array([AT] * 40, pa.timestamp("s", "America/New_York")), NOON),
        (pa.array(["2025-01-31 12:00:00"] * 40, pa.large_string()), NOON),
    ],
)
def test_time_columns_of_every_type_are_read(tmp_path: Path, column: pa.Array, first: str) -> None:
    tables, _, _ = import_events(write(tmp_path / "e.parquet", event_time=column))
    assert tables["impressions"]["event_time"].to_pylist()[0].isoformat() == first


def test_decimal_columns_are_numbers(tmp_path: Path) -> None:
    two = decimal.Decimal("2.00")
    path = write(tmp_path / "e.parquet", watch_ms=[decimal.Decimal("1500.25")] * 40, position=[two] * 40,
                 like=[decimal.Decimal("1.00")] * 40)  # fmt: skip
    result = checked(path)
    values = result.dataset.outcomes.filter(pc.equal(result.dataset.outcomes["type"].cast(pa.string()), "watch"))
    assert set(values["value"].to_pylist()) == {1500.25}
    assert set(result.dataset.impressions["position"].to_pylist()) == {2}
    assert values.num_rows * 2 == result.dataset.outcomes.num_rows


def test_row_of_a_message_is_the_line_of_the_file(tmp_path: Path) -> None:
    path = tmp_path / "e.csv"
    path.write_text(
        'viewer_id,video_id,event_time,device\r\n\r\n1,2,2025-01-31,"a\nb"\r\n\r\n1,3,2025-01-31,"say ""x"""\n'
        "1,4,noon,c\n"
    )
    with pytest.raises(MalformedFileError, match=r"row 7, column 'event_time': saw 'noon'"):
        import_events(path)
    path.write_text(path.read_text().replace("noon,c", "2025-01-31"))
    with pytest.raises(MalformedFileError, match=r"row 7: saw '1,4,2025-01-31', expected .*4 fields"):
        import_events(path)


def test_row_of_an_upload_time_counts_missing_ones(tmp_path: Path) -> None:
    (tmp_path / "e.csv").write_text(f"viewer_id,video_id,event_time\n1,7,{AT}\n")
    (tmp_path / "v.csv").write_text("video_id,uploaded_at\n7,\n8,2025-01-01\n9,soon\n")
    with pytest.raises(MalformedFileError, match=r"v\.csv, row 4, column 'uploaded_at': saw 'soon'"):
        import_events(tmp_path / "e.csv", tmp_path / "v.csv")
