import json
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from tests.support.dimensions import DIMENSIONS
from tests.support.pipelines.event_tables import random_dataset

from reelway.pipelines.datasets.checks import CheckLimits, check_dataset
from reelway.pipelines.datasets.store import Dataset
from reelway.platform.contracts.events import DATASET_TABLES
from reelway.platform.errors import EmptyDatasetError, TooManyBadRowsError

LENIENT = CheckLimits(max_bad_ratio=1.0)


@pytest.fixture
def dataset() -> Dataset:
    tables = random_dataset(requests=200)
    viewers = tables["viewers"]
    first = pa.array(
        [min(tables["impressions"]["event_time"].to_pylist())] * viewers.num_rows, viewers["created_at"].type
    )
    tables["viewers"] = viewers.set_column(1, viewers.schema.field("created_at"), first)
    # The random data may hold a video twice in one slate; the checks remove the repeated impressions.
    return check_dataset(Dataset(**tables, info={"name": "random"}, dimensions=DIMENSIONS), LENIENT).dataset


def changed(dataset: Dataset, table: str, column: str, row: int, value: Any) -> Dataset:
    old = getattr(dataset, table)
    values = old[column].to_pylist()
    values[row] = value
    schema = DATASET_TABLES[table]
    index = schema.get_field_index(column)
    return replace(
        dataset, **{table: old.set_column(index, schema.field(index), pa.array(values, schema.field(index).type))}
    )


def appended(dataset: Dataset, table: str, row: int, **new: Any) -> Dataset:
    old = getattr(dataset, table)
    copy = old.slice(row, 1).to_pylist()[0] | new
    return replace(dataset, **{table: pa.concat_tables([old, pa.Table.from_pylist([copy], schema=old.schema)])})


def test_clean_data_passes_unchanged(dataset: Dataset) -> None:
    checked = check_dataset(dataset)
    assert checked.rejected_rows == 0
    for name in DATASET_TABLES:
        assert checked.dataset.tables[name].equals(dataset.tables[name])


BAD_VALUES: list[tuple[str, str, Any, str]] = [
    ("viewers", "viewer_id", -5, "id_out_of_range"),
    ("viewers", "viewer_id", 2**53, "id_out_of_range"),
    ("viewers", "created_at", 0, "time_out_of_range"),
    ("creators", "followers", -1, "followers_out_of_range"),
    ("videos", "duration_ms", 0, "duration_out_of_range"),
    ("videos", "topic", 32, "topic_out_of_range"),
    ("videos", "text", [1.0, 2.0], "bad_text_embedding"),
    ("videos", "visual", [float("nan")] * 32, "bad_visual_embedding"),
    ("videos", "creator_id", 999_999, "video_without_creator"),
    ("impressions", "position", -1, "position_out_of_range"),
    ("impressions", "propensity", 0.0, "propensity_out_of_range"),
    ("impressions", "propensity", float("nan"), "propensity_out_of_range"),
    ("impressions", "arm", "blue", "unknown_arm"),
    ("impressions", "viewer_id", 999_999, "viewer_without_profile"),
    ("impressions", "video_id", 999_999, "video_without_metadata"),
    ("outcomes", "type", "applause", "unknown_outcome_type"),
    ("outcomes", "value", float("inf"), "value_out_of_range"),
    ("outcomes", "impression_id", 999_999, "outcome_without_impression"),
    ("outcomes", "video_id", 999_999, "not_its_impressions_viewer_or_video"),
]


@pytest.mark.parametrize(("table", "column", "value", "reason"), BAD_VALUES)
def test_bad_value_rejects_its_row_with_a_reason(
    dataset: Dataset, table: str, column: str, value: Any, reason: str
) -> None:
    broken = changed(dataset, table, column, 3, value)
    checked = check_dataset(broken, LENIENT)
    assert checked.counts[table] == {reason: 1}
    row = next(r for r in checked.rejected.to_pylist() if r["table"] == table)
    assert row["reason"] == reason
    assert row["row_id"] == getattr(broken, table).column(0)[3].as_py()
    assert column in json.loads(row["row"])
    assert getattr(checked.dataset, table).num_rows == getattr(dataset, table).num_rows - 1


def test_every_row_is_either_clean_or_rejected(dataset: Dataset) -> None:
    broken = changed(changed(dataset, "videos", "topic", 2, 99), "viewers", "viewer_id", 1, -1)
    checked = check_dataset(broken, LENIENT)
    for name in DATASET_TABLES:
        clean = checked.dataset.tables[name].num_rows
        aside = sum(r["table"] == name for r in checked.rejected.to_pylist())
        assert clean + aside == broken.tables[name].num_rows
    assert checked.counts["impressions"].keys() == {"video_without_metadata", "viewer_without_profile"}
    assert checked.counts["outcomes"].keys() == {"impression_rejected"}


@pytest.mark.parametrize("table", list(DATASET_TABLES))
def test_second_row_with_an_id_is_a_duplicate(dataset: Dataset, table: str) -> None:
    checked = check_dataset(appended(dataset, table, 4), LENIENT)
    assert checked.counts[table] == {"duplicate_id": 1}
    assert getattr(checked.dataset, table).equals(getattr(dataset, table))


def test_same_event_with_another_id_is_repeated(dataset: Dataset) -> None:
    checked = check_dataset(appended(dataset, "impressions", 4, impression_id=888_888), LENIENT)
    assert checked.counts["impressions"] == {"repeated_impression": 1}
    checked = check_dataset(appended(dataset, "outcomes", 4, outcome_id=888_888), LENIENT)
    assert checked.counts["outcomes"] == {"repeated_outcome": 1}


def test_events_before_their_cause_are_rejected(dataset: Dataset) -> None:
    shown = dataset.impressions.slice(5, 1).to_pylist()[0]
    video_row = dataset.videos["video_id"].to_pylist().index(shown["video_id"])
    late = changed(dataset, "videos", "uploaded_at", video_row, max(dataset.impressions["event_time"].to_pylist()))
    assert "before_video_uploaded_at" in check_dataset(late, LENIENT).counts["impressions"]

    viewer_row = dataset.viewers["viewer_id"].to_pylist().index(shown["viewer_id"])
    late = changed(dataset, "viewers", "created_at", viewer_row, max(dataset.impressions["event_time"].to_pylist()))
    assert "before_viewer_created_at" in check_dataset(late, LENIENT).counts["impressions"]

    start = min(dataset.impressions["event_time"].to_pylist())
    last = dataset.outcomes.num_rows - 1
    assert check_dataset(changed(dataset, "outcomes", "event_time", last, start), LENIENT).counts["outcomes"] == {
        "before_its_impression": 1
    }


def test_bot_loses_all_events(dataset: Dataset) -> None:
    limits = replace(LENIENT, max_impressions_per_minute=20)
    assert check_dataset(dataset, limits).rejected_rows == 0
    viewer = dataset.impressions["viewer_id"][0].as_py()
    start = dataset.impressions["event_time"].cast(pa.int64()).to_numpy()[-1]
    template = dataset.impressions.slice(0, 1).to_pylist()[0]
    burst = [
        template | {"impression_id": 700_000 + i, "event_time": int(start + i * 1000), "position": i} for i in range(21)
    ]
    more = pa.Table.from_pylist(burst, schema=dataset.impressions.schema)
    attacked = replace(dataset, impressions=pa.concat_tables([dataset.impressions, more]))
    checked = check_dataset(attacked, limits)
    impressions = int((dataset.impressions["viewer_id"].to_numpy() == viewer).sum())
    assert checked.counts["impressions"] == {"bot_rate": impressions + 21}
    assert viewer not in checked.dataset.impressions["viewer_id"].to_pylist()
    slower = replace(limits, max_impressions_per_minute=21)
    assert check_dataset(attacked, slower).rejected_rows == 0


def many_bad(dataset: Dataset) -> Dataset:
    values = dataset.impressions["propensity"].to_numpy().copy()
    values[: len(values) // 4] = 2.0
    index = dataset.impressions.schema.get_field_index("propensity")
    field = dataset.impressions.schema.field(index)
    return replace(dataset, impressions=dataset.impressions.set_column(index, field, pa.array(values)))


def test_too_many_bad_rows_fail_with_the_top_reason(dataset: Dataset) -> None:
    with pytest.raises(TooManyBadRowsError, match=r"table impressions: .* rows are bad \(25.*propensity_out_of_range"):
        check_dataset(many_bad(dataset))


def test_higher_limit_accepts_more_bad_rows(dataset: Dataset) -> None:
    checked = check_dataset(many_bad(dataset), LENIENT)
    assert checked.counts["impressions"]["propensity_out_of_range"] == dataset.impressions.num_rows // 4


def all_bad(dataset: Dataset) -> Dataset:
    index = dataset.impressions.schema.get_field_index("propensity")
    field = dataset.impressions.schema.field(index)
    none = pa.array(np.zeros(dataset.impressions.num_rows, dtype=np.float32))
    return replace(dataset, impressions=dataset.impressions.set_column(index, field, none))


@pytest.mark.parametrize("empty", [lambda d: replace(d, impressions=d.impressions.slice(0, 0)), all_bad])
def test_data_set_without_impressions_is_empty(dataset: Dataset, empty: Callable[[Dataset], Dataset]) -> None:
    with pytest.raises(EmptyDatasetError, match="random"):
        check_dataset(empty(dataset), LENIENT)
