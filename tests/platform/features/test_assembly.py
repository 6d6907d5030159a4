"""Model inputs from feature values: a single served row and a whole training table give the same numbers."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pyarrow as pa
import pytest
from tests.support.dimensions import DIMENSIONS

from reelway.platform.contracts import feature_names as names
from reelway.platform.features.assembly import (
    assemble_videos,
    assemble_viewers,
    columns_from_row,
    columns_from_table,
)
from reelway.platform.features.hashing import category_code, id_codes

NOW_S = 1_700_000_000.0


def viewer(**changes: object) -> dict[str, object]:
    row: dict[str, object] = {name: float(i) for i, name in enumerate(names.VIEWER_ACTIVITY)}
    row |= {
        "region": "eu", "language": "de", "segment": None, "created_at_s": NOW_S - 86_400,
        "history_videos": [11, 12, 13], "history_weights": [1.0, -0.5, 2.0],
        "history_times_s": [NOW_S - 7200, NOW_S - 3600, NOW_S - 1800],
        "topic_affinity": [1.0 / DIMENSIONS.topics] * DIMENSIONS.topics,
    }  # fmt: skip
    return row | changes


def video(**changes: object) -> dict[str, object]:
    row: dict[str, object] = {name: float(i) for i, name in enumerate(names.VIDEO_LIVE_DENSE)}
    row |= {
        "video_id": 5, "creator_id": 9, "topic": 0, "video_language": "en", "duration_s": 12.5,
        "uploaded_at_s": NOW_S - 7200, "visual": [0.5] * DIMENSIONS.visual,
        "audio": [0.25] * DIMENSIONS.audio, "text": None,
    }  # fmt: skip
    return row | changes


def dense_of(row: np.ndarray, order: tuple[str, ...], name: str) -> float:
    return float(row[order.index(name)])


def as_table(rows: list[dict[str, object]]) -> pa.Table:
    return pa.Table.from_pylist(rows)


def test_served_row_equals_the_trained_table() -> None:
    rows = [viewer(), viewer(region=None, history_videos=[4] * 60, history_weights=[1.0] * 60,
                             history_times_s=[NOW_S - 60.0] * 60)]  # fmt: skip
    trained = assemble_viewers(columns_from_table(as_table(rows)), np.full(2, NOW_S), ["tv", "phone"], DIMENSIONS)
    for i, (row, device) in enumerate(zip(rows, ("tv", "phone"), strict=True)):
        served = assemble_viewers(columns_from_row(row), np.array([NOW_S]), [device], DIMENSIONS).as_inputs()
        for name, values in trained.as_inputs().items():
            np.testing.assert_array_equal(served[name][0], values[i], err_msg=name)


def test_dense_values_have_the_positions_of_the_contract() -> None:
    dense = assemble_viewers(columns_from_row(viewer()), np.array([NOW_S]), ["tv"], DIMENSIONS).viewer_dense[0]
    assert len(dense) == len(DIMENSIONS.viewer_dense)
    assert dense_of(dense, DIMENSIONS.viewer_dense, "like_ratio_7d") == names.VIEWER_ACTIVITY.index("like_ratio_7d")
    assert dense_of(dense, DIMENSIONS.viewer_dense, "account_age_d") == 1.0
    assert dense_of(dense, DIMENSIONS.viewer_dense, "topic_affinity_0") == pytest.approx(1.0 / DIMENSIONS.topics)
    assert dense_of(dense, DIMENSIONS.viewer_dense, "hours_since_last_activity") == pytest.approx(0.5)
    assert dense[-len(names.SESSION_FEATURES) :].tolist() == [2.0, 0.0, 0.0, 2.5]


def test_history_is_padded_in_front_with_the_latest_last() -> None:
    arrays = assemble_viewers(
        columns_from_row(viewer()), np.array([NOW_S]), ["tv"], replace(DIMENSIONS, history_length=5)
    )
    assert arrays.history_codes[0, :2].sum() == 0
    np.testing.assert_array_equal(arrays.history_codes[0, 2:], id_codes(np.array([11, 12, 13]), DIMENSIONS.id_buckets))
    assert arrays.history_weights[0].tolist() == [0.0, 0.0, 1.0, -0.5, 2.0]
    assert arrays.history_age_h[0].tolist() == [0.0, 0.0, 2.0, 1.0, 0.5]


def test_longer_history_keeps_its_latest_part() -> None:
    arrays = assemble_viewers(
        columns_from_row(viewer()), np.array([NOW_S]), ["tv"], replace(DIMENSIONS, history_length=2)
    )
    np.testing.assert_array_equal(arrays.history_codes[0], id_codes(np.array([12, 13]), DIMENSIONS.id_buckets))


def test_unknown_viewer_has_only_clock_features_with_the_device() -> None:
    nothing = {name: None for view in names.VIEWER_VIEWS for name in names.VIEWS[view]}
    arrays = assemble_viewers(columns_from_row(nothing), np.array([NOW_S]), ["tv"], DIMENSIONS)
    clock = {"hour_sin", "hour_cos", "weekday_sin", "weekday_cos"}
    for name, value in zip(DIMENSIONS.viewer_dense, arrays.viewer_dense[0], strict=True):
        assert np.isnan(value) == (name not in clock and name not in names.SESSION_FEATURES), name
    assert not arrays.viewer_dense[0, -len(names.SESSION_FEATURES) :].any()
    assert arrays.viewer_categories[0].tolist() == [0, 0, 0, category_code("tv", DIMENSIONS.category_buckets)]
    assert not arrays.history_codes.any()


def test_videos_have_codes_with_flags_and_age() -> None:
    columns = columns_from_table(as_table([video(), video(topic=-1, visual=None)]))
    arrays = assemble_videos(columns, np.full(2, NOW_S), DIMENSIONS)
    assert arrays.video_categories[:, 0].tolist() == [1, 0]
    assert arrays.video_static_dense[0].tolist() == [12.5, 1.0, 1.0, 0.0]
    assert arrays.video_static_dense[1].tolist() == [12.5, 0.0, 1.0, 0.0]
    assert dense_of(arrays.video_dense[0], names.VIDEO_DENSE, "hours_since_upload") == 2.0
    live = dense_of(arrays.video_dense[0], names.VIDEO_DENSE, "creator_followers")
    assert live == names.VIDEO_LIVE_DENSE.index("creator_followers")
    assert arrays.visual[0].tolist() == [0.5] * DIMENSIONS.visual
    assert not arrays.visual[1].any()
    assert arrays.text.shape == (2, DIMENSIONS.text)


def test_embedding_of_another_width_or_with_nan_counts_as_missing() -> None:
    rows = [video(visual=[1.0] * (DIMENSIONS.visual - 1)), video(visual=[float("nan")] * DIMENSIONS.visual)]
    arrays = assemble_videos(columns_from_table(as_table(rows)), np.full(2, NOW_S), DIMENSIONS)
    assert arrays.video_static_dense[:, 1].tolist() == [0.0, 0.0]
    assert np.isfinite(arrays.visual).all()


def test_list_in_place_of_a_number_is_rejected_with_its_name() -> None:
    with pytest.raises(TypeError, match="'duration_s' is a list"):
        assemble_videos(columns_from_row(video(duration_s=[1.0])), np.array([NOW_S]), DIMENSIONS)


def test_video_without_features_has_zeros_with_missing_values() -> None:
    arrays = assemble_videos({"video_id": [5]}, np.array([NOW_S]), DIMENSIONS)
    assert arrays.video_codes.all()
    assert not arrays.creator_codes.any()
    assert np.isnan(arrays.video_dense[0][len(names.VIDEO_STATIC_DENSE) :]).all()


def test_integer_columns_with_nulls_keep_the_other_ids() -> None:
    table = as_table([video(), video(creator_id=None)])
    arrays = assemble_videos(columns_from_table(table), np.full(2, NOW_S), DIMENSIONS)
    np.testing.assert_array_equal(arrays.creator_codes[0], id_codes(np.array([9]), DIMENSIONS.id_buckets)[0])
    assert not arrays.creator_codes[1].any()
