"""Two ids that differ as text stay different in every format and type."""

from __future__ import annotations

import decimal
import uuid
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from reelway.pipelines.datasets.event_files import import_events
from reelway.platform.contracts.ids import MAX_ID
from reelway.platform.errors import MalformedFileError

AT = 1_738_324_800
BIG = 17_000_000_000_000_000_001


def from_csv(path: Path, ids: list[str]) -> tuple[list[int], dict[int, str]]:
    lines = [f"{text},7,{AT + i}" for i, text in enumerate(ids)]
    path.write_text("\n".join(["viewer_id,video_id,event_time", *lines, ""]))
    return viewers_of(path)


def from_parquet(path: Path, ids: pa.Array) -> tuple[list[int], dict[int, str]]:
    table = pa.table({"viewer_id": ids, "video_id": [7] * len(ids), "event_time": range(AT, AT + len(ids))})
    pq.write_table(table, path)
    return viewers_of(path)


def viewers_of(path: Path) -> tuple[list[int], dict[int, str]]:
    tables, _, extras = import_events(path)
    originals = {row["id"]: row["original"] for row in extras["id_map"].to_pylist() if row["kind"] == "viewer_id"}
    return tables["impressions"]["viewer_id"].to_pylist(), originals


@pytest.mark.parametrize(
    "texts",
    [
        [str(BIG), str(BIG + 1), "3"],
        ["9007199254740993", "9007199254740992", "9007199254740991"],
        ["1700000000000000001", "1700000000000000002"],
        ["007", "7", "07", "7.0", "+7", "7e0", " 7"],
        ["true", "True", "1", "1.0"],
        ["2025-01-31", "2025-01-31 00:00:00", "20250131"],
        ["-0", "0", "-1"],
        ["nan", "NaN", "NULL", "null", "N/A"],
        ["1" * 400, "1" * 401],
    ],
)
def test_csv_ids_that_differ_as_text_stay_different(tmp_path: Path, texts: list[str]) -> None:
    numbers, originals = from_csv(tmp_path / "e.csv", texts)
    assert [originals[number] for number in numbers] == texts


@given(st.lists(st.text("0123456789+-. aeEé", min_size=1, max_size=22), min_size=1, max_size=12))
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None, max_examples=60)
def test_csv_ids_map_one_to_one_to_their_text(tmp_path: Path, texts: list[str]) -> None:
    numbers, originals = from_csv(tmp_path / "e.csv", texts)
    assert [originals.get(number, str(number)) for number in numbers] == texts


def test_csv_integers_within_the_limit_are_kept(tmp_path: Path) -> None:
    assert from_csv(tmp_path / "e.csv", ["0", "12", str(MAX_ID)]) == ([0, 12, MAX_ID], {})


@pytest.mark.parametrize(
    ("ids", "originals"),
    [
        (pa.array([BIG, BIG + 1], pa.uint64()), [str(BIG), str(BIG + 1)]),
        (pa.array([MAX_ID + 2, MAX_ID + 1], pa.int64()), [str(MAX_ID + 2), str(MAX_ID + 1)]),
        (pa.array([decimal.Decimal(BIG), decimal.Decimal(BIG + 1)], pa.decimal128(38, 0)), [str(BIG), str(BIG + 1)]),
        (pa.array([decimal.Decimal("5.50"), decimal.Decimal("5.00")], pa.decimal128(9, 2)), ["5.50", "5.00"]),
        (pa.array(["007", "7"], pa.large_string()), ["007", "7"]),
        (pa.array(["007", "7", "007"]).dictionary_encode(), ["007", "7", "007"]),
        (pa.array([b"caf\xe9", b"caf\xe8", b"cafe"]), ["636166e9", "636166e8", "63616665"]),
        (pa.array([b"anna", b"ben"]), ["anna", "ben"]),
        (pa.array([b"\x00\x01", b"ab"], pa.binary(2)), ["0001", "6162"]),
        (pa.array([uuid.UUID(int=1).bytes, uuid.UUID(int=2).bytes], pa.uuid()),
         [str(uuid.UUID(int=1)), str(uuid.UUID(int=2))]),
    ],
)  # fmt: skip
def test_parquet_ids_keep_their_value_in_every_type(tmp_path: Path, ids: pa.Array, originals: list[str]) -> None:
    numbers, names = from_parquet(tmp_path / "e.parquet", ids)
    assert [names[number] for number in numbers] == originals


@pytest.mark.parametrize(
    "ids",
    [
        pa.array([3, 5], pa.uint64()),
        pa.array([decimal.Decimal("3.00"), decimal.Decimal("5.00")], pa.decimal128(9, 2)),
        pa.array([3.0, 5.0]),
        pa.array([3.0, 5.0], pa.float32()),
        pa.array(["3", "5"]),
    ],
)
def test_parquet_whole_numbers_are_kept(tmp_path: Path, ids: pa.Array) -> None:
    assert from_parquet(tmp_path / "e.parquet", ids) == ([3, 5], {})


@pytest.mark.parametrize(
    ("ids", "message"),
    [
        (pa.array([1.0, 9007199254740993.0]), r"row 1, column 'viewer_id': saw 9007199254740992\.0, expected a whole"),
        (pa.array([1.0, 2.0**24], pa.float32()), r"row 1, column 'viewer_id': saw 16777216\.0, expected a whole"),
        (pa.array([1.0, 1.5]), r"row 1, column 'viewer_id': saw 1\.5, expected a whole number"),
        (pa.array([1.0, float("inf")]), r"row 1, column 'viewer_id': saw inf"),
        (pa.array([1.0, float("nan")]), r"row 1, column 'viewer_id': saw nan"),
        (pa.array([1, None]), r"row 1, column 'viewer_id': saw None, expected a value"),
        (pa.array(["a", ""]), r"row 1, column 'viewer_id': saw '', expected a value"),
        (pa.array([[1], [2]]), r"column 'viewer_id': saw 'type list.*expected ids as integers, text or bytes"),
    ],
)
def test_ids_that_may_have_merged_are_rejected(tmp_path: Path, ids: pa.Array, message: str) -> None:
    with pytest.raises(MalformedFileError, match=message):
        from_parquet(tmp_path / "e.parquet", ids)


def test_csv_id_that_is_not_utf8_is_rejected(tmp_path: Path) -> None:
    path = tmp_path / "e.csv"
    path.write_bytes(f"viewer_id,video_id,event_time\nanna,7,{AT}\n\ncaf\xe9,7,{AT}\n".encode("latin-1"))
    with pytest.raises(MalformedFileError, match=r"row 4, column 'viewer_id': saw b'caf\\xe9', expected UTF-8 text"):
        import_events(path)


def test_text_of_a_video_is_not_read_as_a_number(tmp_path: Path) -> None:
    (tmp_path / "e.csv").write_text(f"viewer_id,video_id,event_time,device\n1,7,{AT},00\n1,8,{AT},1e3\n")
    (tmp_path / "v.csv").write_text("video_id,title,language,creator_id\n7,007,1,01\n8,1917.0,true,1\n")
    tables, _, extras = import_events(tmp_path / "e.csv", tmp_path / "v.csv")
    assert tables["impressions"]["device"].to_pylist() == ["00", "1e3"]
    assert tables["videos"]["title"].to_pylist() == ["007", "1917.0"]
    assert tables["videos"]["language"].to_pylist() == ["1", "true"]
    assert extras["id_map"]["original"].to_pylist() == ["01", "1"]


def test_missing_creator_is_not_a_creator_called_unknown(tmp_path: Path) -> None:
    (tmp_path / "e.csv").write_text(f"viewer_id,video_id,event_time\n1,7,{AT}\n1,8,{AT}\n1,9,{AT}\n")
    (tmp_path / "v.csv").write_text("video_id,creator_id\n7,unknown\n8,\n9,\n")
    creators = import_events(tmp_path / "e.csv", tmp_path / "v.csv")[0]["videos"]["creator_id"].to_pylist()
    assert creators[0] != creators[1] == creators[2]
