from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from reelway.pipelines.datasets.checks import check_dataset
from reelway.pipelines.datasets.content_dimensions import infer_dimensions
from reelway.pipelines.datasets.event_files import import_events
from reelway.pipelines.datasets.store import Dataset, cast_to_schema
from reelway.platform.contracts.events import DATASET_TABLES
from reelway.platform.errors import EmptyDatasetError, MalformedFileError

CSV = """viewer_id,video_id,event_time,watch_ms,like,position
anna,v-1,2025-01-31T12:00:00Z,12000,1,0
anna,v-2,2025-01-31T12:00:20+01:00,,0,1
ben,v-1,2025-01-31T13:00:00Z,500,0,0
"""


def write(path: Path, text: str) -> Path:
    path.write_text(text)
    return path


def checked(tables: dict[str, pa.Table]) -> int:
    ready = {name: cast_to_schema(Path(name), tables[name], name) for name in DATASET_TABLES}
    return check_dataset(Dataset(**ready, info={}, dimensions=infer_dimensions(ready))).rejected_rows


def test_string_ids_are_numbered_in_the_id_map(tmp_path: Path) -> None:
    tables, _, extras = import_events(write(tmp_path / "e.csv", CSV))
    names = {(r["kind"], r["original"]): r["id"] for r in extras["id_map"].to_pylist()}
    assert tables["impressions"]["viewer_id"].to_pylist() == [names["viewer_id", v] for v in ("anna", "anna", "ben")]
    assert tables["impressions"]["video_id"].to_pylist() == [names["video_id", v] for v in ("v-1", "v-2", "v-1")]
    assert checked(tables) == 0


def test_integer_ids_are_kept(tmp_path: Path) -> None:
    tables, _, extras = import_events(write(tmp_path / "e.csv", "viewer_id,video_id,event_time\n70,8,1738324800\n"))
    assert tables["impressions"]["viewer_id"].to_pylist() == [70]
    assert tables["impressions"]["event_time"].to_pylist()[0].isoformat() == "2025-01-31T12:00:00+00:00"
    assert extras["id_map"].num_rows == 0


def test_video_has_one_id_in_both_files(tmp_path: Path) -> None:
    events = write(tmp_path / "e.csv", "viewer_id,video_id,event_time\n1,8,1738324800\n1,9,1738324801\n")
    videos = write(tmp_path / "v.csv", "video_id,title,creator_id\nother,x,1\n9,nine,2\n8,eight,\n")
    tables, _, _ = import_events(events, videos)
    titles = dict(zip(tables["videos"]["video_id"].to_pylist(), tables["videos"]["title"].to_pylist(), strict=True))
    assert [titles[v] for v in tables["impressions"]["video_id"].to_pylist()] == ["eight", "nine"]
    assert checked(tables) == 0


def test_flags_become_outcomes(tmp_path: Path) -> None:
    tables, _, _ = import_events(write(tmp_path / "e.csv", CSV))
    rows = tables["outcomes"].to_pylist()
    by_time = tables["impressions"].sort_by("event_time")["impression_id"].to_pylist()
    assert [(r["type"], r["value"]) for r in rows] == [("watch", 12000.0), ("like", 1.0), ("watch", 500.0)]
    assert by_time == [0, 1, 2]  # 12:00:20+01:00 is the earliest time, so it has the first id
    assert {r["impression_id"] for r in rows} == {1, 2}


def test_import_reads_parquet_with_embeddings(tmp_path: Path) -> None:
    events = pa.table({
        "viewer_id": [1, 2], "video_id": [5, 6],
        "event_time": pa.array([1_700_000_000_000, 1_700_000_001_000], pa.timestamp("ms", "UTC")),
        "device": pa.array(["tv", None]).dictionary_encode(), "like": [True, False],
    })  # fmt: skip
    videos = pa.table({"video_id": [5, 6], "audio": pa.array([[0.5] * 16, None], pa.list_(pa.float64())),
                       "uploaded_at": pa.array([1_600_000_000, None], pa.int64())})  # fmt: skip
    pq.write_table(events, tmp_path / "e.parquet")
    pq.write_table(videos, tmp_path / "v.parquet")
    tables, _, _ = import_events(tmp_path / "e.parquet", tmp_path / "v.parquet")
    assert tables["impressions"]["device"].to_pylist() == ["tv", "unknown"]
    assert tables["videos"]["audio"].to_pylist() == [[0.5] * 16, None]
    assert tables["videos"]["uploaded_at"].cast(pa.int64()).to_pylist() == [
        1_600_000_000_000_000,
        1_700_000_001_000_000,
    ]
    assert tables["outcomes"]["type"].to_pylist() == ["like"]
    assert checked(tables) == 0


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("video_id", "clip", r"column 'video_id'"),
        ("2025-01-31T13:00:00Z", "noon", r"row 4, column 'event_time': saw 'noon', expected a time"),
        ("500,0,0", "500,2,0", r"row 4, column 'like': saw 2.*expected 0 or 1"),
        ("12000,1", "long,1", r"row 2, column 'watch_ms': saw 'long', expected a number"),
        ("500,0,0", "500,0,99999", r"row 4, column 'position': saw 99999, expected a value of type int16"),
        ("ben", "", r"row 4, column 'viewer_id': saw None"),
        ("500,0,0", "500,0", r"readable \.csv"),
    ],
)
def test_malformed_file_is_rejected(tmp_path: Path, old: str, new: str, message: str) -> None:
    assert old in CSV
    with pytest.raises(MalformedFileError, match=message):
        import_events(write(tmp_path / "e.csv", CSV.replace(old, new)))


@pytest.mark.parametrize(("name", "error"), [("e.json", MalformedFileError), ("missing.csv", MalformedFileError)])
def test_unreadable_file_is_rejected(tmp_path: Path, name: str, error: type[Exception]) -> None:
    write(tmp_path / "e.json", "{}")
    with pytest.raises(error, match=name):
        import_events(tmp_path / name)


def test_file_without_events_is_an_empty_data_set(tmp_path: Path) -> None:
    with pytest.raises(EmptyDatasetError, match="0 rows"):
        import_events(write(tmp_path / "e.csv", "viewer_id,video_id,event_time\n"))


def test_all_optional_columns_are_used(tmp_path: Path) -> None:
    row: dict[str, Any] = {
        "viewer_id": 1, "video_id": 2, "event_time": 1738324800, "impression_id": 77, "request_id": 78, "position": 3,
        "release": "r1", "arm": "canary", "source": "ann", "propensity": 0.25, "device": "phone",
    }  # fmt: skip
    pq.write_table(pa.Table.from_pylist([row]), tmp_path / "e.parquet")
    tables, _, _ = import_events(tmp_path / "e.parquet")
    got = tables["impressions"].to_pylist()[0]
    assert {k: got[k] for k in row if k != "event_time"} == {k: v for k, v in row.items() if k != "event_time"}
