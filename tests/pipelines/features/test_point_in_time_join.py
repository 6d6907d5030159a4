"""Feast's point-in-time join as configured by Reelway: future, late and expired rows are excluded."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from reelway.pipelines.features.labels import LABELS, times_us
from reelway.pipelines.features.point_in_time import distinct_entity_rows, join_view
from reelway.pipelines.features.training_rows import KEY_COLUMNS, build_training_rows, video_snapshot, viewer_snapshot
from reelway.platform.contracts.events import TIMESTAMP_TYPE
from reelway.platform.contracts.feature_names import REQUEST_CONTEXT, VIEWER_VIEWS, VIEWS
from reelway.platform.errors import EmptyDatasetError, FeatureError
from reelway.platform.features import on_demand
from reelway.platform.features.feast_store import open_feature_store
from reelway.platform.features.on_demand import SESSION_GAP_S
from reelway.platform.run_directory import RunDirectory

DAY_US = 86_400_000_000
NOW_US = 1_700_600_000_000_000


def times(values: list[int]) -> pa.Array:
    return pa.array(values, pa.int64()).cast(TIMESTAMP_TYPE)


def engagement_rows(table: pa.Table, event_us: list[int], created_us: list[int]) -> pa.Table:
    """Returns rows of one new video, numbered by video_impressions_1h = 0, 1, 2..."""
    rows = table.slice(0, 1).take(pa.array([0] * len(event_us)))
    for name, values in (
        ("video_id", pa.array([1] * len(event_us), pa.int64())),
        ("event_timestamp", times(event_us)),
        ("created_timestamp", times(created_us)),
        ("video_impressions_1h", pa.array(range(len(event_us)), pa.float32())),
    ):
        rows = rows.set_column(rows.column_names.index(name), name, values)
    return rows


def joined_value(run: RunDirectory, at_us: list[int]) -> list[float | None]:
    store = open_feature_store(run.features)
    answers = join_view(store, "video_engagement", np.full(len(at_us), 1), np.array(at_us))
    return answers["video_impressions_1h"].to_pylist()


def test_join_excludes_future_rows_but_includes_a_row_at_the_exact_time(changed) -> None:
    run = changed("video_engagement", lambda t: engagement_rows(t, [NOW_US - 10, NOW_US], [NOW_US - 10, NOW_US]))
    assert joined_value(run, [NOW_US - 1, NOW_US]) == [0.0, 1.0]


def test_row_written_late_is_excluded_before_its_writing_time(changed) -> None:
    run = changed(
        "video_engagement", lambda t: engagement_rows(t, [NOW_US - 20, NOW_US - 10], [NOW_US - 20, NOW_US + 50])
    )
    assert joined_value(run, [NOW_US, NOW_US + 50]) == [0.0, 1.0]


def test_row_written_last_wins_between_rows_of_one_time(changed) -> None:
    run = changed("video_engagement", lambda t: engagement_rows(t, [NOW_US, NOW_US], [NOW_US + 9, NOW_US]))
    assert joined_value(run, [NOW_US + 5, NOW_US + 9]) == [1.0, 0.0]


def test_row_older_than_the_ttl_is_excluded(changed) -> None:
    run = changed("video_engagement", lambda t: engagement_rows(t, [NOW_US], [NOW_US]))
    assert joined_value(run, [NOW_US + 2 * DAY_US, NOW_US + 2 * DAY_US + 1_000_000]) == [0.0, None]


def test_results_keep_the_given_order_with_duplicates(changed) -> None:
    run = changed("video_engagement", lambda t: engagement_rows(t, [NOW_US, NOW_US + 5], [NOW_US, NOW_US + 5]))
    assert joined_value(run, [NOW_US + 5, NOW_US, NOW_US + 5, NOW_US - 1]) == [1.0, 0.0, 1.0, None]


def test_distinct_entity_rows_map_back_to_every_row() -> None:
    entities, times = np.array([3, 1, 3, 3]), np.array([7, 7, 7, 8])
    distinct_entities, distinct_times, pair = distinct_entity_rows(entities, times)
    assert len(distinct_entities) == 3
    assert np.array_equal(distinct_entities[pair], entities)
    assert np.array_equal(distinct_times[pair], times)


def test_training_rows_contain_every_impression_once_with_all_features(built) -> None:
    progress: list[str] = []
    rows = pq.read_table(build_training_rows(built.run, progress.append))
    assert rows["impression_id"].to_pylist() == built.labels["impression_id"].to_pylist()
    expected = {*KEY_COLUMNS, "request_time_s", *LABELS, "weight", *REQUEST_CONTEXT}
    expected |= {name for fields in VIEWS.values() for name in fields}
    assert set(rows.column_names) == expected
    assert set(progress) == {*VIEWS, "request_context"}
    assert rows["like"].to_pylist() == built.labels["like"].to_pylist()
    assert 0 < rows["impressions_1d"].null_count < rows.num_rows


def test_training_row_excludes_its_own_and_later_outcomes(built) -> None:
    rows = pq.read_table(build_training_rows(built.run))
    viewer, video = rows["viewer_id"].to_numpy(), rows["video_id"].to_numpy()
    now = times_us(built.labels["request_time"])
    known = times_us(built.labels["outcome_time"])
    weight = built.labels["weight"].to_numpy()
    for i in range(0, rows.num_rows, 97):
        telling = (viewer == viewer[i]) & (weight != 0) & (known + 1 <= now[i] // 1_000_000 * 1_000_000)
        assert len(rows["history_videos"][i].as_py() or []) == min(telling.sum(), 50)
        day = (video == video[i]) & (known < now[i] // 3_600_000_000 * 3_600_000_000)
        assert (rows["video_impressions_7d"][i].as_py() or 0) <= day.sum()


def test_training_history_excludes_impressions_of_its_own_request(built) -> None:
    """Otherwise the weight of the impression, hence its label, would be part of the session features."""
    rows = pq.read_table(build_training_rows(built.run))
    shown = rows["event_time"].cast(TIMESTAMP_TYPE).cast(pa.int64()).to_numpy() / 1e6
    known_sessions = 0
    for i, times_s in enumerate(rows["history_times_s"].to_pylist()):
        if not times_s:
            continue
        now_s = rows["request_time_s"][i].as_py()
        assert max(times_s) < now_s <= shown[i]
        history = zip(rows["history_videos"][i].as_py(), times_s, strict=True)
        assert (rows["video_id"][i].as_py(), shown[i]) not in list(history)
        known_sessions += max(times_s) > now_s - SESSION_GAP_S
    assert known_sessions > 20


def test_on_demand_view_runs_the_platform_function(built) -> None:
    rows = pq.read_table(build_training_rows(built.run))
    columns = (rows[name].to_numpy() for name in ("request_time_s", "created_at_s", "uploaded_at_s"))
    for name, values in on_demand.request_context(*columns).items():
        np.testing.assert_array_equal(rows[name].to_numpy(), values)


def test_video_snapshot_agrees_with_training_rows(built) -> None:
    rows = pq.read_table(build_training_rows(built.run))
    i = rows.num_rows // 2
    at_s = rows["request_time_s"][i].as_py()
    snapshot = video_snapshot(built.run.features, at_s)
    ids = snapshot["video_id"].to_pylist()
    assert ids == sorted(ids)
    row = snapshot.slice(ids.index(rows["video_id"][i].as_py()), 1).to_pylist()[0]
    for view in ("video_content", "video_engagement", "creator_statistics"):
        assert {name: row[name] for name in VIEWS[view]} == {name: rows[name][i].as_py() for name in VIEWS[view]}
    uploaded = times_us(built.tables["videos"]["uploaded_at"])
    early = video_snapshot(built.run.features, np.sort(uploaded)[10] / 1e6)
    assert early.num_rows == 11
    assert early["title"].null_count == 0


def test_viewer_snapshot_keeps_the_given_order_with_unknown_viewers_null(built) -> None:
    snapshot = viewer_snapshot(built.run.features, [510, 9_999_999, 500], built.until_s)
    assert snapshot["viewer_id"].to_pylist() == [510, 9_999_999, 500]
    unknown = snapshot.to_pylist()[1]
    assert all(unknown[name] is None for view in VIEWER_VIEWS for name in VIEWS[view])
    assert snapshot["region"][0].as_py() is not None


def test_run_without_features_raises_an_error_with_the_command(tmp_path) -> None:
    with pytest.raises(FeatureError, match="run `reelway features"):
        build_training_rows(RunDirectory(tmp_path))


def test_run_without_impressions_is_rejected(built, tmp_path) -> None:
    run = RunDirectory(tmp_path / "run")
    run.features.mkdir(parents=True)
    pq.write_table(built.labels.slice(0, 0), run.features / "labels.parquet")
    with pytest.raises(EmptyDatasetError, match="no impressions"):
        build_training_rows(run)
