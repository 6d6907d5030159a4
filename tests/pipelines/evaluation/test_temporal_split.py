"""The temporal split (evaluated viewers, relevant and seen videos) and the baseline recommenders."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from reelway.pipelines.evaluation.baselines import (
    AlsRecommender,
    AlsSettings,
    PopularityRecommender,
    popularity_counts,
    tune_als,
    validation_split,
)
from reelway.pipelines.evaluation.harness import (
    PAD,
    ViewerVideoPairs,
    catalogue_rows,
    evaluate_ranking,
    make_temporal_split,
    top_unseen,
)
from reelway.pipelines.features.labels import times_us
from reelway.platform.contracts.events import TIMESTAMP_TYPE
from reelway.platform.errors import EmptyDatasetError


def labels_of(events: list[tuple[float, int, int, int]]) -> pa.Table:
    """(second, viewer, video, long watch) as the columns of ``LABELLED`` that evaluation reads."""
    time_s, viewer, video, enjoyed = (np.array(column) for column in zip(*events, strict=True))
    return pa.table(
        {
            "event_time": pa.array((time_s * 1e6).astype(np.int64)).cast(TIMESTAMP_TYPE),
            "viewer_id": pa.array(viewer.astype(np.int64)),
            "video_id": pa.array(video.astype(np.int64)),
            "long_watch": pa.array(enjoyed.astype(np.float32)),
            "device": pa.array(["phone"] * len(events)),
        }
    )


def grouped_labels(*, viewers: int = 60, videos: int = 40, events: int = 2400, seed: int = 0) -> pa.Table:
    """Two groups of viewers; each group likes its own half of the videos."""
    rng = np.random.default_rng(seed)
    viewer = rng.integers(0, viewers, events)
    in_group = rng.random(events) < 0.9
    half = np.where(in_group, viewer % 2, 1 - viewer % 2)
    video = 100 + half * (videos // 2) + rng.integers(0, videos // 2, events)
    return labels_of([(float(i), int(viewer[i]), int(video[i]), 1) for i in range(events)])


class FixedRecommender:
    """A recommender with a fixed answer."""

    def __init__(self, answer: np.ndarray) -> None:
        self.answer = answer

    def rank(self, viewer_ids: np.ndarray, k: int) -> np.ndarray:
        assert len(viewer_ids) == len(self.answer)
        return self.answer[:, :k]


EVENTS = [
    # viewer 1: five impressions, then a new long watch (12), a repeated one (10), one without interest (13)
    *[(float(i), 1, video, 1) for i, video in enumerate([10, 11, 14, 15, 16])],
    (5.0, 2, 12, 1), (6.0, 2, 13, 1),
    (100.0, 1, 12, 1), (101.0, 1, 10, 1), (102.0, 1, 13, 0), (103.0, 1, 99, 1),
    (104.0, 2, 10, 1),
]  # fmt: skip


def test_relevant_video_was_shown_before_and_first_watched_after_the_cut():
    split = make_temporal_split(labels_of(EVENTS), 50.0)
    assert split.viewer_ids.tolist() == [1]  # viewer 2 has two impressions only
    assert split.videos.tolist() == [10, 11, 12, 13, 14, 15, 16]  # 99 came later
    assert split.videos[split.relevant.rows_of(1)].tolist() == [12]
    assert split.videos[split.seen.rows_of(1)].tolist() == [10, 11, 14, 15, 16]
    assert split.before.num_rows == 7


def test_event_at_the_cut_counts_as_later():
    split = make_temporal_split(labels_of(EVENTS), 100.0)
    assert split.videos[split.relevant.rows_of(1)].tolist() == [12]


def test_events_after_until_are_ignored():
    with pytest.raises(EmptyDatasetError, match="expected at least one"):
        make_temporal_split(labels_of(EVENTS), 50.0, until_s=100.0)


def test_too_many_viewers_are_sampled_by_the_seed_and_stay_in_order():
    labels = grouped_labels()
    few = make_temporal_split(labels, 1500.0, max_viewers=10, seed=3)
    again = make_temporal_split(labels, 1500.0, max_viewers=10, seed=3)
    other = make_temporal_split(labels, 1500.0, max_viewers=10, seed=4)
    assert few.viewer_ids.tolist() == again.viewer_ids.tolist() == sorted(few.viewer_ids.tolist())
    assert few.viewer_ids.tolist() != other.viewer_ids.tolist()


@settings(max_examples=100, deadline=None)
@given(
    st.sets(st.tuples(st.integers(0, 5), st.integers(0, 8))),
    st.lists(st.integers(0, 5), min_size=1, max_size=6, unique=True),
    st.sets(st.integers(0, 8), min_size=1),
)
def test_pairs_behave_like_a_set(pairs, viewers, videos):
    catalogue = np.array(sorted(videos))
    viewer_id, video_id = np.array(sorted(pairs), dtype=np.int64).reshape(-1, 2).T
    actual = ViewerVideoPairs.of(viewer_id, video_id, catalogue)
    asked_ids = np.array(viewers)
    rows = np.tile(np.append(np.arange(len(catalogue)), PAD), (len(asked_ids), 1))
    for b, row in enumerate(actual.has(asked_ids, rows)):
        assert [(viewers[b], v) in pairs for v in catalogue.tolist()] == row[:-1].tolist()
        assert not row[-1]
    assert actual.counts(asked_ids).tolist() == [sum((u, v) in pairs for v in videos) for u in viewers]
    assert catalogue[actual.rows_of(viewers[0])].tolist() == sorted(
        v for u, v in pairs if u == viewers[0] and v in videos
    )


def test_top_unseen_leaves_out_seen_videos_with_padding():
    videos = np.array([5, 6, 7])
    seen = ViewerVideoPairs.of(np.array([1, 1]), np.array([5, 6]), videos)
    ranked = top_unseen(np.array([[9.0, 8.0, 1.0], [1.0, 1.0, 2.0]]), np.array([1, 2]), seen, 5)
    assert ranked.tolist() == [[7, PAD, PAD, PAD, PAD], [7, 5, 6, PAD, PAD]]


def test_recommender_that_returns_seen_videos_is_rejected():
    split = make_temporal_split(labels_of(EVENTS), 50.0)
    with pytest.raises(ValueError, match="already seen"):
        evaluate_ranking(FixedRecommender(np.array([[10, 12]])), split)


def test_metrics_of_a_known_answer():
    split = make_temporal_split(labels_of(EVENTS), 50.0)
    result = evaluate_ranking(FixedRecommender(np.array([[13, 12, PAD]])), split)
    assert result.recall.tolist() == [1.0]
    assert result.ndcg[0] == pytest.approx(1 / np.log2(3))
    assert result.estimates["mrr"].value == 0.5
    assert result.coverage == pytest.approx(2 / 7)


def test_recent_popularity_counts_the_latest_share_only():
    events = [(float(i), i, 10, 1) for i in range(90)] + [(90.0 + i, i, 11, 1) for i in range(10)]
    events += [(200.0, 95, 11, 1), (200.0, 50, 11, 1)]
    split = make_temporal_split(labels_of([*events, (50.5, 95, 12, 0)]), 150.0, min_events=1)
    assert popularity_counts(split, 1.0).tolist() == [90, 10, 0]  # 12 was shown, not enjoyed
    assert popularity_counts(split, 0.1).tolist() == [0, 10, 0]
    assert PopularityRecommender(split).rank(np.array([95, 50]), 2).tolist() == [[10, 11], [11, 12]]
    assert PopularityRecommender(split, 0.1).rank(np.array([95, 50]), 2).tolist() == [[11, 10], [11, 12]]


def test_als_finds_the_group_that_popularity_cannot():
    split = make_temporal_split(grouped_labels(), 1800.0)
    als = evaluate_ranking(AlsRecommender(split, AlsSettings(8, 0.1, 5.0)), split)
    popular = evaluate_ranking(PopularityRecommender(split), split)
    assert als.estimates["ndcg_at_10"].low > popular.estimates["ndcg_at_10"].high


def test_als_tuning_reads_no_event_after_the_cut():
    labels = grouped_labels()
    split = make_temporal_split(labels, 1800.0)
    inner = validation_split(split)
    assert inner.cut_s < split.cut_s
    grid = (AlsSettings(1, 1000.0, 0.01, 1), AlsSettings(8, 0.1, 5.0))
    chosen = tune_als(split, grid=grid)
    assert chosen.settings == grid[1]
    assert times_us(inner.before["event_time"]).max() < inner.cut_s * 1e6


def test_recommender_inputs_do_not_depend_on_later_events():
    labels = grouped_labels()
    after = np.arange(labels.num_rows) >= 1800
    video = np.where(after, labels["video_id"].to_numpy()[::-1], labels["video_id"].to_numpy())
    changed = labels.set_column(labels.column_names.index("video_id"), "video_id", pa.array(video))
    split, changed_split = make_temporal_split(labels, 1800.0), make_temporal_split(changed, 1800.0)
    assert split.before.equals(changed_split.before)
    assert split.videos.tolist() == changed_split.videos.tolist()
    assert split.seen.keys.tolist() == changed_split.seen.keys.tolist()
    assert split.relevant.keys.tolist() != changed_split.relevant.keys.tolist()


def test_als_gives_an_unknown_viewer_the_mean_vector():
    split = make_temporal_split(grouped_labels(), 1800.0)
    ranked = AlsRecommender(split, AlsSettings(8, 0.1, 5.0)).rank(np.array([999_999]), 5)
    assert (catalogue_rows(split.videos, ranked) != PAD).all()
