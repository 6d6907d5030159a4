"""When snapshots are taken, and which values they contain."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pytest
from tests.support.dimensions import DIMENSIONS
from tests.support.pipelines.event_tables import DAY_US, START_US, impressions, outcomes, random_dataset, videos

from reelway.pipelines.features import views
from reelway.pipelines.features.batch import ENTITY_KEYS, data_end_us, entity_views
from reelway.pipelines.features.labels import label_impressions, times_us
from reelway.platform.contracts.feature_names import VIDEO_WINDOWS, VIEWS

HOUR_US = views.HOUR_US
SETTINGS = views.ViewSettings(DIMENSIONS)


def events_of(shown: list, done: list) -> views.Events:
    ids = sorted({video for _, _, video, _ in shown})
    return views.Events.from_labels(label_impressions(impressions(shown), outcomes(done), videos(ids)))


def at(table: pa.Table, time_us: int) -> dict:
    """Returns the row of the latest snapshot at or before ``time_us``, as a point-in-time join does."""
    rows = [row for row in table.to_pylist() if row["event_timestamp"].timestamp() * 1e6 <= time_us]
    return max(rows, key=lambda row: row["event_timestamp"])


def test_event_exactly_on_the_grid_is_in_the_next_snapshot_only() -> None:
    events = events_of([(1, 5, 9, START_US)], [(1, "like", 1.0, START_US)])
    table = views.viewer_activity(events, SETTINGS, START_US + DAY_US)
    assert times_us(table["event_timestamp"]).min() == START_US + HOUR_US


def test_event_is_in_no_snapshot_before_its_last_outcome_is_known() -> None:
    events = events_of([(1, 5, 9, START_US)], [(1, "like", 1.0, START_US + 5 * HOUR_US)])
    table = views.video_engagement(events, SETTINGS, START_US + DAY_US)
    assert times_us(table["event_timestamp"]).min() == START_US + 6 * HOUR_US


def test_rate_decays_without_new_events() -> None:
    events = events_of([(1, 5, 9, START_US + 1)], [(1, "like", 1.0, START_US + 1)])
    table = views.video_engagement(events, SETTINGS, START_US + 60 * DAY_US)
    for hours in (1, 3, 12, 30, 9 * 24, 40 * 24):
        row = at(table, START_US + hours * HOUR_US)
        expected = [float(w.length_s >= hours * 3600) for w in VIDEO_WINDOWS]
        assert [row[f"video_impressions_{w.name}"] for w in VIDEO_WINDOWS] == expected, hours


def test_heartbeat_rows_are_daily_while_a_window_contains_an_event() -> None:
    events = events_of([(1, 5, 9, START_US + 1)], [(1, "like", 1.0, START_US + 1)])
    table = views.video_engagement(events, SETTINGS, START_US + 60 * DAY_US)
    moments = np.sort(times_us(table["event_timestamp"]))
    assert np.diff(moments).max() <= DAY_US
    longest_us = max(w.length_s for w in VIDEO_WINDOWS) * 1_000_000
    assert START_US + longest_us < moments[-1] <= START_US + longest_us + HOUR_US


def test_no_row_is_later_than_the_end_of_the_data() -> None:
    events = events_of([(1, 5, 9, START_US)], [(1, "like", 1.0, START_US)])
    until_us = START_US + 2 * DAY_US
    for make in (views.viewer_activity, views.viewer_topic_affinity, views.video_engagement):
        assert times_us(make(events, SETTINGS, until_us)["event_timestamp"]).max() <= until_us


def test_prior_strength_pulls_rates_towards_the_prior() -> None:
    events = events_of([(1, 5, 9, START_US + 1)], [(1, "like", 1.0, START_US + 1)])
    row = at(views.video_engagement(events, SETTINGS, START_US + DAY_US), START_US + HOUR_US)
    prior = SETTINGS.like
    assert row["video_like_rate_1h"] == pytest.approx((1 + prior.rate * prior.strength) / (1 + prior.strength))
    assert row["video_skip_rate_1h"] == pytest.approx(0.3 * 20 / 21)


def test_history_holds_the_latest_weighted_impressions_oldest_first() -> None:
    n = DIMENSIONS.history_length + 10
    shown = [(i, 5, 100 + i, START_US + i * 10_000_000) for i in range(n)]
    done = [(i, "like" if i % 2 else "skip", 1.0, START_US + i * 10_000_000) for i in range(n) if i != 30]
    row = at(views.viewer_history(events_of(shown, done), SETTINGS, START_US + DAY_US), START_US + DAY_US)
    expected = [100 + i for i in range(n) if i != 30][-DIMENSIONS.history_length :]
    assert row["history_videos"] == expected
    assert row["history_weights"][-1] == pytest.approx(1.0)
    assert row["history_weights"][-2] == pytest.approx(-0.5)
    assert row["history_times_s"] == sorted(row["history_times_s"])
    assert row["history_times_s"][-1] == (START_US + (n - 1) * 10_000_000) / 1e6


def test_early_history_holds_only_the_viewers_own_past() -> None:
    shown = [(1, 5, 101, START_US), (2, 5, 102, START_US + 60_000_000), (3, 6, 103, START_US)]
    done = [(i, "like", 1.0, START_US + (60_000_000 if i == 2 else 0)) for i in (1, 2, 3)]
    table = views.viewer_history(events_of(shown, done), SETTINGS, START_US + DAY_US)
    rows = {(row["viewer_id"], tuple(row["history_videos"])) for row in table.to_pylist()}
    assert rows == {(5, (101,)), (5, (101, 102)), (6, (103,))}


def test_topic_affinity_is_signed_with_an_absolute_sum_of_at_most_one() -> None:
    tables = random_dataset(seed=3)
    labels = label_impressions(tables["impressions"], tables["outcomes"], tables["videos"])
    table = views.viewer_topic_affinity(views.Events.from_labels(labels), SETTINGS, data_end_us(labels))
    affinity = np.array(table["topic_affinity"].to_pylist())
    assert affinity.shape[1] == DIMENSIONS.topics
    assert np.abs(affinity).sum(axis=1).max() <= 1 + 1e-6
    assert affinity.min() < 0 < affinity.max()


def test_creator_statistics_count_uploads_with_followers() -> None:
    tables = random_dataset(seed=1)
    labels = label_impressions(tables["impressions"], tables["outcomes"], tables["videos"])
    until_us = data_end_us(labels)
    events = views.Events.from_labels(labels)
    table = views.creator_statistics(events, tables["videos"], tables["creators"], SETTINGS, until_us)
    for creator, base in zip(*(tables["creators"][c].to_pylist() for c in ("creator_id", "followers")), strict=True):
        creator_rows = (
            table.filter(pa.array(table["creator_key"].to_numpy() == creator)).sort_by("event_timestamp").to_pylist()
        )
        assert creator_rows[0]["creator_followers"] == base
        assert creator_rows[-1]["creator_followers"] == base + events.follow[events.creator_id == creator].sum()
        assert creator_rows[-1]["creator_uploads"] == (tables["videos"]["creator_id"].to_numpy() == creator).sum()


def test_views_have_the_contract_fields_with_unique_entity_times() -> None:
    tables = random_dataset(seed=2)
    labels = label_impressions(tables["impressions"], tables["outcomes"], tables["videos"])
    view_tables = {
        "viewer_profile": views.viewer_profile(tables["viewers"]),
        "video_content": views.video_content(tables["videos"]),
    }
    for family in ENTITY_KEYS:
        view_tables |= entity_views(
            family, labels, (tables["creators"], tables["videos"]), SETTINGS, data_end_us(labels)
        )
    assert set(view_tables) == set(VIEWS)
    for name, table in view_tables.items():
        assert tuple(table.column_names[3:]) == VIEWS[name]
        key = table.column_names[0]
        assert table.group_by([key, "event_timestamp"]).aggregate([]).num_rows == table.num_rows > 0


def test_snapshot_equals_a_count_over_the_raw_events() -> None:
    tables = random_dataset(seed=4)
    labels = label_impressions(tables["impressions"], tables["outcomes"], tables["videos"])
    table = views.video_engagement(views.Events.from_labels(labels), SETTINGS, data_end_us(labels))
    known = times_us(labels["outcome_time"])
    video, like = labels["video_id"].to_numpy(), labels["like"].to_numpy()
    for row in table.to_pylist()[:: table.num_rows // 40]:
        now = round(row["event_timestamp"].timestamp() * 1e6)
        inside = (video == row["video_id"]) & (known < now) & (known >= now - 6 * HOUR_US)
        assert row["video_impressions_6h"] == inside.sum()
        assert row["video_like_rate_6h"] == pytest.approx((like[inside].sum() + 1.0) / (inside.sum() + 20), rel=1e-6)
