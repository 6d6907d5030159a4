from pathlib import Path

import pyarrow as pa
import pytest
from tests.support.pipelines import published_formats as formats

from reelway.pipelines.datasets.checks import CheckLimits, check_dataset
from reelway.pipelines.datasets.content_dimensions import infer_dimensions
from reelway.pipelines.datasets.kuairand import files_of, import_kuairand
from reelway.pipelines.datasets.store import Dataset, cast_to_schema
from reelway.platform.contracts.events import DATASET_TABLES
from reelway.platform.errors import MalformedFileError

STANDARD, RANDOM = "log_standard_4_08_to_4_21_pure.csv", "log_random_4_22_to_5_08_pure.csv"
BASIC = "video_features_basic_pure.csv"


@pytest.fixture
def tables(tmp_path: Path) -> dict[str, pa.Table]:
    return import_kuairand(formats.kuairand(tmp_path))[0]


def test_logs_are_merged_in_time_order(tables: dict[str, pa.Table]) -> None:
    shown = tables["impressions"]
    assert shown["source"].to_pylist() == ["standard", "standard", "random"]
    assert shown["viewer_id"].to_pylist() == [0, 1, 0]
    assert shown["event_time"].cast(pa.int64()).to_pylist()[2] == 1650599601301_000


def test_signals_become_outcomes_after_their_impression(tables: dict[str, pa.Table]) -> None:
    rows = tables["outcomes"].to_pylist()
    got = {(row["impression_id"], row["type"]) for row in rows}
    assert got == {
        (0, "watch"), (0, "like"), (0, "share"),
        (1, "watch"), (1, "not_interested"), (1, "skip"),
        (2, "watch"), (2, "follow"), (2, "comment"),
    }  # fmt: skip
    assert next(r["value"] for r in rows if (r["impression_id"], r["type"]) == (0, "watch")) == 20_000.0
    shown = tables["impressions"]["event_time"].to_pylist()
    assert all(row["event_time"] > shown[row["impression_id"]] for row in rows)


def test_videos_have_published_or_default_properties(tables: dict[str, pa.Table]) -> None:
    known, unknown = tables["videos"].to_pylist()
    assert (known["creator_id"], known["topic"], known["duration_ms"]) == (442, 12, 18_000)
    assert known["uploaded_at"].isoformat() == "2022-03-31T16:00:00+00:00"
    assert (unknown["topic"], unknown["duration_ms"]) == (-1, 30_000)
    assert unknown["uploaded_at"] == tables["impressions"]["event_time"].to_pylist()[1]
    assert 103 not in tables["videos"]["video_id"].to_pylist()


def test_account_age_is_counted_from_the_end_of_the_log(tables: dict[str, pa.Table]) -> None:
    old, unknown = tables["viewers"]["created_at"].to_pylist()
    assert (tables["impressions"]["event_time"].to_pylist()[2] - old).days == 30
    assert unknown == tables["impressions"]["event_time"].to_pylist()[1]
    assert tables["viewers"]["segment"].to_pylist() == ["full_active", "high_active"]


def test_imported_data_passes_the_checks(tables: dict[str, pa.Table]) -> None:
    ready = {name: cast_to_schema(Path(name), tables[name], name) for name in DATASET_TABLES}
    assert check_dataset(Dataset(**ready, info={}, dimensions=infer_dimensions(ready))).rejected_rows == 0


@pytest.mark.parametrize(
    ("file", "old", "new", "message"),
    [
        (STANDARD, "is_hate", "hates", r"log_standard.*row 1, column 'is_hate'"),
        (STANDARD, "1,1,0,0,1,0,1,20000", "1,5,0,0,1,0,1,20000", r"row 2, column 'is_like': saw 5"),
        (RANDOM, "9000,30000", "long,30000", r"log_random.*row 2, column 'play_time_ms': saw 'long'"),
        (STANDARD, "\n1,101", "\n\n01,101", r"row 4, column 'user_id': saw '01'"),
        (STANDARD, "\n1,101,20220408,500,1649393600000,0,0", "\n\n1,101,20220408,500,1649393600000,0,7",
         r"row 4, column 'is_like': saw 7"),
        (BASIC, '"12,65"', '"99999999999999999999,65"', r"row 2, column 'tag': saw '99999999999999999999'"),
        (BASIC, "2022-04-01,ShortImport", "1 April,ShortImport", r"row 2, column 'upload_dt': saw '1 April'"),
    ],
)  # fmt: skip
def test_malformed_file_is_rejected_with_row_and_column(
    tmp_path: Path, file: str, old: str, new: str, message: str
) -> None:
    path = formats.kuairand(tmp_path) / file
    assert old in path.read_text()
    path.write_text(path.read_text().replace(old, new, 1))
    with pytest.raises(MalformedFileError, match=message):
        import_kuairand(tmp_path)


def test_missing_file_is_named(tmp_path: Path) -> None:
    (formats.kuairand(tmp_path) / "user_features_pure.csv").unlink()
    with pytest.raises(MalformedFileError, match=r"user_features\*\.csv"):
        files_of(tmp_path)


@pytest.mark.parametrize(
    ("file", "old", "new", "rejected"),
    [
        (STANDARD, "1649393600000", "9223372036854775807", {"impressions": {"time_out_of_range": 1}}),
        (STANDARD, "1649393600000", "-62170156800000", {"impressions": {"time_out_of_range": 1}}),
        (STANDARD, "900,30000", "inf,30000", {"outcomes": {"value_out_of_range": 1}}),
        (STANDARD, "900,30000", "1e300,30000", {"outcomes": {"value_out_of_range": 1}}),
        (STANDARD, "900,30000", "nan,30000", {"outcomes": {"value_out_of_range": 1}}),
        (STANDARD, "900,30000", "900,inf", {}),
        ("user_features_pure.csv", "0,30,1", "0,9223372036854775807,1", {"viewers": {"time_out_of_range": 1}}),
        ("user_features_pure.csv", "0,30,1", "0,-1,1", {}),
        (BASIC, "18000.0", "inf", {"videos": {"duration_out_of_range": 1}}),
        (BASIC, "18000.0", "nan", {}),
        (BASIC, ",441,", ",9223372036854775807,", {"creators": {"id_out_of_range": 1}}),
    ],
)
def test_impossible_value_sets_only_its_row_aside(
    tmp_path: Path, file: str, old: str, new: str, rejected: dict[str, dict[str, int]]
) -> None:
    path = formats.kuairand(tmp_path) / file
    assert old in path.read_text()
    path.write_text(path.read_text().replace(old, new, 1))
    tables, _ = import_kuairand(tmp_path)
    ready = {name: cast_to_schema(Path(name), tables[name], name) for name in DATASET_TABLES}
    data = Dataset(**ready, info={}, dimensions=infer_dimensions(ready))
    counts = check_dataset(data, CheckLimits(max_bad_ratio=1.0)).counts
    for name, reasons in rejected.items():
        assert reasons.items() <= counts[name].items()
    assert rejected or not any(counts.values())
