"""Sampled negatives: available at the request, not shown to their viewer, with features as of the request."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from tests.support.dimensions import DIMENSIONS
from tests.support.pipelines.timestamped_features import timestamped_features
from tests.support.pipelines.training_row_fixtures import made_table, write_rows

from reelway.pipelines.training.negatives import draw_negatives, impression_rows, negative_rows
from reelway.pipelines.training.rows import TrainingRows, load_rows
from reelway.platform.contracts.feature_names import VIDEO_DENSE


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> TrainingRows:
    path: Path = tmp_path_factory.mktemp("rows") / "r.parquet"
    return load_rows(write_rows(path, made_table(requests=150, videos=80, viewers=40)), DIMENSIONS)


def test_negative_was_available_but_not_shown_to_its_viewer(rows: TrainingRows) -> None:
    index = np.arange(400)
    position, video = draw_negatives(rows, index, 3, seed=1)
    assert len(position) > 900
    first_s = {v: rows.event_time_s[index][rows.video_row[index] == v].min() for v in np.unique(video)}
    met = set(zip(rows.viewer_id[index].tolist(), rows.video_row[index].tolist(), strict=True))
    for p, v in zip(position, video, strict=True):
        assert first_s[v] < rows.request_time_s[index[p]]
        assert (rows.viewer_id[index[p]], v) not in met
    assert len(np.unique(np.column_stack([position, video]), axis=0)) == len(position)


def test_early_requests_get_fewer_negatives_than_late_ones(rows: TrainingRows) -> None:
    index = np.arange(400)
    position, _ = draw_negatives(rows, index, 2, seed=1)
    counts = np.bincount(position, minlength=len(index))
    assert (counts[rows.request_time_s[index] == rows.request_time_s[0]] == 0).all()
    assert counts[200:].mean() > 1.8
    assert counts.max() <= 2


def test_negatives_are_uniform_over_available_videos(rows: TrainingRows) -> None:
    index = np.arange(len(rows))
    late = np.flatnonzero(rows.request_time_s > np.quantile(rows.request_time_s, 0.8))
    position, video = draw_negatives(rows, index, 20, seed=1)
    counts = np.bincount(video[np.isin(position, late)], minlength=len(rows.video_ids))
    assert counts.min() > 0.3 * counts.mean()
    assert counts.max() < 2.0 * counts.mean()


def test_negative_has_the_features_of_its_video_at_the_request(rows: TrainingRows) -> None:
    index = np.arange(400)
    position, video = draw_negatives(rows, index, 2, seed=1)
    extra = negative_rows(rows, index, 2, timestamped_features, seed=1)
    moment = rows.request_time_s[index[position]].astype(int) % 997
    engagement = VIDEO_DENSE.index("video_impressions_1h")
    np.testing.assert_allclose(extra.video_dense[:, engagement], rows.video_ids[video] * 1000.0 + moment)
    creator = VIDEO_DENSE.index("creator_followers")
    np.testing.assert_allclose(extra.video_dense[:, creator], rows.video_creator_id[video] * 1000.0 + moment)
    age = extra.video_dense[:, VIDEO_DENSE.index("hours_since_upload")]
    uploaded_s = rows.video_uploaded_at_s[video]
    np.testing.assert_allclose(age, (rows.request_time_s[index[position]] - uploaded_s) / 3600, rtol=1e-6)
    assert (extra.labels == 0).all()
    assert (extra.position == -1).all()
    np.testing.assert_array_equal(extra.event_time_s, rows.event_time_s[index[position]])


def test_negatives_have_all_fields_of_impressions(rows: TrainingRows) -> None:
    shown = impression_rows(rows, np.arange(50))
    both = shown.concat(shown.select(np.array([3, 4])))
    assert len(both) == 52
    np.testing.assert_array_equal(both.video_dense[50], shown.video_dense[3])
