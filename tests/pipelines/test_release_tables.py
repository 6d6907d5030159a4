"""The tables of a release: videos, popularity lists and neighbours."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from numpy.typing import NDArray
from tests.support.dimensions import DIMENSIONS

from reelway.pipelines import release_tables as parts
from reelway.pipelines.release_tables import LongWatches
from reelway.pipelines.search_index import make_index
from reelway.platform.contracts import feature_names as names
from reelway.platform.contracts.events import TIMESTAMP_TYPE
from reelway.platform.contracts.release_files import (
    NEIGHBOURS_PER_VIDEO,
    NEIGHBOURS_SCHEMA,
    POPULAR_SCHEMA,
    videos_schema,
)
from reelway.platform.errors import EmptyDatasetError, ReleaseError
from reelway.platform.features.assembly import assemble_videos, columns_from_table
from reelway.platform.release.tables import open_table

DAY_S = 86_400.0


def unit(rows: int, width: int, seed: int = 0) -> NDArray[np.float32]:
    vectors = np.random.default_rng(seed).standard_normal((rows, width)).astype(np.float32)
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


def watches(
    rows: list[tuple[int, int, float]], regions: dict[int, str] | None = None, now_d: float = 10.0
) -> LongWatches:
    """From (viewer, row, day)."""
    viewer, row, day = (np.array(column) for column in zip(*rows, strict=True))
    region = np.array([(regions or {}).get(viewer_id) for viewer_id in viewer.tolist()], dtype=object)
    return LongWatches(viewer, row, day * DAY_S, region, now_d * DAY_S, (now_d - 1) * DAY_S)


def snapshot(video_id: list[int]) -> pa.Table:
    n = len(video_id)
    columns = {
        "video_id": pa.array(video_id, pa.int64()),
        "title": pa.array([None, *["a title"] * (n - 1)], pa.string()),
        "creator_id": pa.array([None, *[7] * (n - 1)], pa.int64()),
        "topic": pa.array([None, *[3] * (n - 1)], pa.int64()),
        "video_language": pa.array([None, *["en"] * (n - 1)], pa.string()),
        "duration_s": pa.array([None, *[12.5] * (n - 1)], pa.float32()),
        "uploaded_at_s": pa.array([None, *[5 * DAY_S] * (n - 1)], pa.float64()),
    }
    live = {
        name: pa.array([None, *[float(i)] * (n - 1)], pa.float32()) for i, name in enumerate(names.VIDEO_LIVE_DENSE)
    }
    return pa.table(columns | live)


def test_video_table_holds_the_models_inputs(tmp_path: Path) -> None:
    table = snapshot([3, 5, 9])
    videos = assemble_videos(columns_from_table(table), np.full(3, 6 * DAY_S), DIMENSIONS)
    parts.write_videos(tmp_path / "videos.arrow", table, videos, unit(3, 8), DIMENSIONS)
    batch = open_table(tmp_path / "videos.arrow", videos_schema(8))
    static = batch["static_dense"].flatten().to_numpy().reshape(3, -1)
    live = batch["live_dense"].flatten().to_numpy().reshape(3, -1)
    np.testing.assert_array_equal(np.column_stack([static, live]), videos.video_dense[:, :-1])
    assert live.shape[1] == len(names.VIDEO_LIVE_DENSE)
    assert batch["video_id"].to_pylist() == [3, 5, 9]
    np.testing.assert_array_equal(batch["creator_codes"].flatten().to_numpy().reshape(3, -1), videos.creator_codes)


def test_video_without_features_has_missing_values(tmp_path: Path) -> None:
    table = snapshot([3, 5])
    videos = assemble_videos(columns_from_table(table), np.full(2, 6 * DAY_S), DIMENSIONS)
    parts.write_videos(tmp_path / "videos.arrow", table, videos, unit(2, 8), DIMENSIONS)
    first = open_table(tmp_path / "videos.arrow", videos_schema(8)).slice(0, 1).to_pylist()[0]
    assert (first["creator_id"], first["topic"], first["title"]) == (-1, -1, None)
    assert np.isnan(first["uploaded_at_s"])
    assert np.isnan(first["live_dense"]).all()
    assert first["creator_codes"] == [0, 0]


def test_writer_rejects_videos_that_serving_cannot_use(tmp_path: Path) -> None:
    table = snapshot([5, 3])
    videos = assemble_videos(columns_from_table(table), np.full(2, 6 * DAY_S), DIMENSIONS)
    with pytest.raises(ReleaseError, match="does not ascend in video_id"):
        parts.write_videos(tmp_path / "videos.arrow", table, videos, unit(2, 8), DIMENSIONS)
    embedding = unit(2, 8)
    embedding[1] = np.nan
    with pytest.raises(ReleaseError, match="video 5 has an embedding of length nan"):
        parts.write_videos(tmp_path / "videos.arrow", snapshot([3, 5]), videos, embedding, DIMENSIONS)
    assert not (tmp_path / "videos.arrow").exists()


def test_popular_list_counts_all_long_watches() -> None:
    long_watches = watches([(1, 4, 0.5), (2, 4, 0.6), (3, 4, 9.5), (1, 2, 0.7), (2, 2, 9.6), (1, 0, 9.7)])
    popular = parts.popular_lists(long_watches, videos=6)["popular"]
    assert popular.rows.tolist() == [4, 2, 0]
    assert popular.scores.tolist() == [3, 2, 1]


def test_rising_video_trends_above_an_old_favourite() -> None:
    old = [(viewer, 0, 1.0 + viewer / 100) for viewer in range(200)]
    recent = [(viewer, row, 9.5) for viewer in range(20) for row in (0, 1)]
    lists = parts.popular_lists(watches([*old, *recent]), videos=3)
    assert lists["popular"].rows.tolist() == [0, 1]
    assert lists["trending"].rows.tolist() == [1, 0]


def test_video_without_recent_watches_does_not_trend() -> None:
    lists = parts.popular_lists(watches([(1, 0, 2.0), (2, 1, 9.9)]), videos=2)
    assert lists["trending"].rows.tolist() == [1]


def test_region_with_enough_watches_has_its_own_trend() -> None:
    count = parts.REGION_MIN_WATCHES
    rows = [(viewer, 0, 9.5) for viewer in range(count)] + [(1_000, 1, 9.6)]
    regions = dict.fromkeys(range(count), "eu") | {1_000: "us"}
    lists = parts.popular_lists(watches(rows, regions), videos=2)
    assert set(lists) == {"popular", "trending", "trending:eu"}
    assert lists["trending:eu"].rows.tolist() == [0]
    assert lists["trending"].rows.tolist() == [0, 1]


def test_popular_table_ranks_each_list_from_zero(tmp_path: Path) -> None:
    lists = parts.popular_lists(watches([(1, 2, 0.5), (2, 2, 9.5), (3, 1, 9.5)]), videos=3)
    parts.write_popular(tmp_path / "popular.arrow", np.array([10, 20, 30]), lists)
    rows = open_table(tmp_path / "popular.arrow", POPULAR_SCHEMA).to_pylist()
    assert [(row["list"], row["rank"], row["video_id"]) for row in rows] == [
        ("popular", 0, 30), ("popular", 1, 20), ("trending", 0, 20), ("trending", 1, 30),
    ]  # fmt: skip


def test_co_watched_videos_precede_similar_videos() -> None:
    vectors = unit(40, 8)
    together = [(viewer, row, 1.0) for viewer in range(6) for row in (3, 30)]
    rows = parts.neighbours(vectors, make_index(vectors), watches(together))
    assert rows.shape == (40, NEIGHBOURS_PER_VIDEO)
    assert rows[3, 0] == 30
    assert rows[30, 0] == 3
    by_similarity = np.argsort(-(vectors[3] @ vectors.T))
    rest = [row for row in by_similarity if row not in (3, 30)]
    assert rows[3, 1:].tolist() == rest[: NEIGHBOURS_PER_VIDEO - 1]


def test_neighbours_are_distinct_other_videos() -> None:
    random = np.random.default_rng(1)
    vectors = unit(60, 8)
    long_watches = watches([(viewer, row, 1.0) for viewer, row in random.integers(0, [9, 60], (500, 2)).tolist()])
    rows = parts.neighbours(vectors, make_index(vectors), long_watches)
    assert not (rows == np.arange(60)[:, None]).any()
    assert all(len(set(row.tolist())) == NEIGHBOURS_PER_VIDEO for row in rows)


def test_one_shared_viewer_makes_no_neighbours() -> None:
    vectors = unit(40, 8)
    nearest_of_3 = int(np.argsort(-(vectors[3] @ vectors.T))[1])
    far = int(np.argmin(vectors[3] @ vectors.T))
    rows = parts.neighbours(vectors, make_index(vectors), watches([(1, 3, 1.0), (1, far, 1.0)]))
    assert rows[3, 0] == nearest_of_3


def test_small_catalogue_pads_the_neighbours(tmp_path: Path) -> None:
    vectors = unit(3, 8)
    rows = parts.neighbours(vectors, make_index(vectors), watches([(1, 0, 1.0)]))
    assert (rows[:, :2] >= 0).all()
    assert (rows[:, 2:] == -1).all()
    parts.write_neighbours(tmp_path / "neighbours.arrow", np.array([1, 2, 3]), rows)
    assert open_table(tmp_path / "neighbours.arrow", NEIGHBOURS_SCHEMA).num_rows == 3


def labels(rows: list[tuple[int, int, int, float]]) -> pa.Table:
    """From (viewer, video, second, long_watch)."""
    viewer, video, second, long_watch = zip(*rows, strict=True) if rows else ((), (), (), ())
    return pa.table(
        {
            "viewer_id": pa.array(viewer, pa.int64()),
            "video_id": pa.array(video, pa.int64()),
            "event_time": pa.array([1_000_000 * s for s in second], pa.int64()).cast(TIMESTAMP_TYPE),
            "long_watch": pa.array(long_watch, pa.float32()),
        }
    )


VIEWERS = pa.table({"viewer_id": pa.array([1, 2], pa.int64()), "region": pa.array(["eu", None], pa.string())})


def test_watches_are_long_watches_of_servable_videos() -> None:
    table = labels([(1, 10, 100, 1.0), (2, 20, 200, 1.0), (3, 10, 300, 1.0), (1, 99, 400, 1.0), (1, 10, 500, 0.0)])
    long_watches = LongWatches.from_labels(table, VIEWERS, np.array([10, 20]))
    assert long_watches.row.tolist() == [0, 1, 0]
    assert long_watches.viewer.tolist() == [1, 2, 3]
    assert long_watches.region.tolist() == ["eu", None, None]
    assert long_watches.now_s == 500.0


def test_recent_period_is_a_day_or_the_last_tenth() -> None:
    dense = labels([(1, 10, second, 1.0) for second in range(0, 5 * 86_400, 3_600)])
    long_watches = LongWatches.from_labels(dense, VIEWERS, np.array([10]))
    assert long_watches.recent_from_s == long_watches.now_s - parts.RECENT_S
    sparse = labels([(1, 10, 86_400 * day, 1.0) for day in range(101)])
    assert LongWatches.from_labels(sparse, VIEWERS, np.array([10])).recent_from_s == pytest.approx(90 * DAY_S)


def test_labels_without_impressions_are_an_empty_data_set() -> None:
    with pytest.raises(EmptyDatasetError, match="no impressions to rank"):
        LongWatches.from_labels(labels([]), VIEWERS, np.array([10]))
