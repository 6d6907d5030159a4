"""The windows of the list task, against a count of single events; bounds, repeated events and restarts."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Sequence
from math import sqrt
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.support.pipelines.list_events import ListEvent, exposure_rows, outcome_rows, times_of

from reelway.pipelines.features.stream.lists import (
    BUCKET_US,
    DAY_BUCKETS,
    HOUR_BUCKETS,
    MAX_LISTS,
    MIN_LIST_ENGAGEMENT,
    MIN_TREND,
    ListWindows,
    WindowCounts,
    popular_scores,
    trend_scores,
)
from reelway.pipelines.features.stream.recent_ids import RecentIds
from reelway.platform.contracts.events import OUTCOME_WEIGHTS
from reelway.platform.errors import MalformedFileError
from reelway.platform.eventlog.live_lists_file import LiveListsSnapshot

START_US = 5_000 * DAY_BUCKETS * BUCKET_US
HOUR_US = HOUR_BUCKETS * BUCKET_US


def add(windows: ListWindows, events: Sequence[ListEvent]) -> None:
    """Adds the events one after the other, as if each were a record."""
    for event in events:
        take, rows = (
            (windows.add_exposures, exposure_rows([event]))
            if event.kind == "exposure"
            else (windows.add_outcomes, outcome_rows([event]))
        )
        take(rows, times_of([event]))


def weight_of(event: ListEvent) -> float:
    if event.kind == "watch":
        return OUTCOME_WEIGHTS["long_watch"] if event.value >= min(0.7 * (event.duration_ms or 1e9), 30_000) else 0.0
    return OUTCOME_WEIGHTS[event.kind]


def counted_lists(events: Sequence[ListEvent], as_of_us: int) -> dict[str, dict[int, float]]:
    """Video -> score of every list, from single events."""
    now = as_of_us // BUCKET_US
    places: dict[int, tuple[str | None, str | None]] = {}
    shown: dict[str, Counter[int]] = defaultdict(Counter)
    day: dict[str, Counter[int]] = defaultdict(Counter)
    hour: dict[str, Counter[int]] = defaultdict(Counter)
    for event in events:
        if event.kind == "exposure":
            places[event.viewer] = (event.region, event.language)
        region, language = places.get(event.viewer, (None, None))
        names = ["", *([f"region={region}"] if region else []), *([f"language={language}"] if language else [])]
        for name in names:
            if event.time_us // BUCKET_US > now - DAY_BUCKETS:
                if event.kind == "exposure":
                    shown[name][event.video] += 1
                else:
                    day[name][event.video] += weight_of(event)
                    if event.time_us // BUCKET_US > now - HOUR_BUCKETS:
                        hour[name][event.video] += weight_of(event)
    lists: dict[str, dict[int, float]] = {"popular": {}, "trending": {}}
    for name in {*shown, *day}:
        videos = {*shown[name], *day[name]}
        e = {v: max(day[name][v], 0.0) for v in videos}
        if name and sum(e.values()) < MIN_LIST_ENGAGEMENT:
            continue
        n = {v: max(shown[name][v], e[v]) for v in videos}
        mean = sum(e.values()) / max(sum(n.values()), 1)
        x = {v: max(hour[name][v], 0.0) for v in videos}
        before = {v: max(e[v] - x[v], 0.0) for v in videos}
        share = (sum(x.values()) + 100) / (sum(before.values()) + 2300)
        suffix = f":{name}" if name else ""
        popular = {v: e[v] * (e[v] + 20 * mean) / (n[v] + 20) / mean if mean else 0.0 for v in videos}
        trend = {v: 2 * (sqrt(x[v] + 0.375) - sqrt(share * before[v] + 0.375)) for v in videos}
        lists[f"popular{suffix}"] = {v: s for v, s in popular.items() if s > 0}
        lists[f"trending{suffix}"] = {v: s for v, s in trend.items() if s >= MIN_TREND}
    return lists


def scores(snapshot: LiveListsSnapshot) -> dict[str, dict[int, float]]:
    return {
        name: dict(zip(ranked.video_ids.tolist(), ranked.scores.tolist(), strict=True))
        for name, ranked in snapshot.lists.items()
    }


def event(kind: str, video: int, minute: int, number: int, viewer: int = 1, region: str | None = None) -> ListEvent:
    return ListEvent(kind, number, viewer, video, START_US + minute * 60_000_000, region, value=9_000.0)


@given(
    st.lists(
        st.tuples(
            st.sampled_from(["exposure", "watch", "like", "skip", "report"]), st.integers(1, 6), st.integers(0, 2000),
            st.integers(1, 4), st.sampled_from([None, "eu", "us"]), st.integers(1, 12),
        ),
        min_size=1, max_size=25,
    )
)  # fmt: skip
@settings(max_examples=40, deadline=None)
def test_lists_equal_a_count_of_single_events(
    drawn: list[tuple[str, int, int, int, str | None, int]],
) -> None:
    events = [
        event(kind, video, minute, 1_000 * number + copy, viewer, region)
        for number, (kind, video, minute, viewer, region, copies) in enumerate(sorted(drawn, key=lambda one: one[2]))
        for copy in range(copies)
    ]
    windows = ListWindows()
    for position, one in enumerate(events):
        add(windows, [one])
        if position % 40 == 7:
            windows.lists(one.time_us)  # lists between events change nothing later
    as_of_us = events[-1].time_us
    found, expected = scores(windows.lists(as_of_us)), counted_lists(events, as_of_us)
    assert found.keys() == expected.keys()
    for name, videos in expected.items():
        assert found[name] == pytest.approx(videos, rel=1e-5), name


def test_planted_trend_leads_the_list_within_thirty_seconds() -> None:
    rng, windows, number = np.random.default_rng(0), ListWindows(), 0
    background = []
    for minute in range(0, 24 * 60, 2):
        for video in rng.integers(1, 300, 40).tolist():
            number += 1
            background.append(event("watch", video, minute, number))
    windows.add_outcomes(outcome_rows(background), times_of(background))
    now_us = START_US + 24 * HOUR_US
    steady = windows.lists(now_us).lists["trending"].video_ids
    assert 777 not in steady.tolist()
    burst = [ListEvent("watch", 10**6 + i, i, 777, now_us + i * 1_000_000, value=9_000.0) for i in range(30)]
    windows.add_outcomes(outcome_rows(burst), times_of(burst))
    snapshot = windows.lists(now_us + 30_000_000)
    assert snapshot.lists["trending"].video_ids[0] == 777
    assert snapshot.lists["popular"].video_ids[0] != 777


def test_trend_leaves_the_list_when_the_video_stops_growing() -> None:
    windows = ListWindows()
    add(windows, [event("like", 7, 0, number) for number in range(50)])
    assert windows.lists(START_US).lists["trending"].video_ids.tolist() == [7]
    later = windows.lists(START_US + 2 * HOUR_US)
    assert later.lists["trending"].video_ids.tolist() == []
    assert later.lists["popular"].video_ids.tolist() == [7]
    assert windows.lists(START_US + 24 * HOUR_US).lists["popular"].video_ids.tolist() == []


def test_growth_of_all_videos_is_no_trend() -> None:
    """At twice the traffic of the day, a video with its usual share has a score near 0, a doubled share a large one."""
    day = np.full(1000, 230.0 + 20.0)
    hour = np.full(1000, 20.0)
    assert np.abs(trend_scores(hour, day)).max() < 0.1
    day[0], hour[0] = 230.0 + 40.0, 40.0
    assert trend_scores(hour, day)[0] > 3.0


def test_popular_score_prefers_the_better_watched_of_equal_counts() -> None:
    scores_R = popular_scores(np.array([50.0, 50.0, 3.0]), np.array([100.0, 1000.0, 3.0]))
    assert scores_R[0] > scores_R[1] > scores_R[2]


def test_regional_list_needs_enough_engagement() -> None:
    windows = ListWindows()
    for number in range(60):
        viewer = 1 if number < 55 else 2
        add(windows, [event("exposure", 3, 0, number, viewer, "eu" if viewer == 1 else "us")])
        add(windows, [event("like", 3, 0, number, viewer)])
    assert set(windows.lists(START_US).lists) == {"popular", "trending", "popular:region=eu", "trending:region=eu"}


def test_repeated_events_count_once() -> None:
    events = [event("exposure", 3, 0, 1, region="eu"), event("like", 3, 0, 1), event("like", 4, 0, 2)]
    once, twice = ListWindows(), ListWindows()
    add(once, events)
    add(twice, [*events, *events])
    assert scores(twice.lists(START_US)) == scores(once.lists(START_US))


def test_recent_ids_forget_nothing_before_their_slots_are_used() -> None:
    ids = RecentIds(slots=64)
    assert ids.add(np.array([5, 5, 9])).tolist() == [True, False, True]
    assert ids.add(np.array([9, 5])).tolist() == [False, False]
    ids.add(np.arange(10_000, 11_000))
    assert ids.add(np.array([5])).tolist() == [True]


def test_restored_state_gives_equal_lists(tmp_path: Path) -> None:
    rng = np.random.default_rng(3)
    events = [
        event(("exposure", "watch", "like", "skip")[rng.integers(4)], int(rng.integers(1, 50)), minute, number,
              int(rng.integers(1, 9)), (None, "eu", "us")[rng.integers(3)])
        for number, minute in enumerate(np.sort(rng.integers(0, 1500, 600)).tolist())
    ]  # fmt: skip
    through, first, second = ListWindows(), ListWindows(), ListWindows()
    add(through, events)
    add(first, events[:300])
    first.lists(events[299].time_us)
    first.save(tmp_path / "lists.npz", {"outcomes": {0: 7, 2: 9}, "exposures": {}})
    assert second.restore(tmp_path / "lists.npz") == {"outcomes": {0: 7, 2: 9}, "exposures": {}}
    add(second, events[250:])  # the last fifty again: their ids are remembered
    as_of_us = events[-1].time_us
    restored, expected = scores(second.lists(as_of_us)), scores(through.lists(as_of_us))
    assert restored.keys() == expected.keys()
    assert len(expected["popular"]) > 20
    for name, videos in expected.items():
        assert restored[name] == pytest.approx(videos), name


def test_values_of_clients_use_no_list_for_ever(tmp_path: Path) -> None:
    windows = ListWindows()
    invented = [ListEvent("exposure", i, i, 1, START_US, region=f"r{i}") for i in range(MAX_LISTS + 4)]
    add(windows, invented)
    assert windows.refused_values == 5  # code 0 is all viewers
    windows.lists(START_US)
    add(windows, [ListEvent("exposure", 9_000, 9_000, 1, START_US, region="eu")])
    assert windows.refused_values == 6  # all lists have a counted pair
    later_us = START_US + DAY_BUCKETS * BUCKET_US
    windows.lists(later_us)
    windows.save(tmp_path / "lists.npz", {})
    windows = ListWindows()
    windows.restore(tmp_path / "lists.npz")
    count = int(MIN_LIST_ENGAGEMENT) + 1
    add(windows, [ListEvent("exposure", 10_000 + i, 10_000 + i, 2, later_us, region="eu") for i in range(count)])
    add(windows, [ListEvent("like", 10_000 + i, 10_000 + i, 2, later_us) for i in range(count)])
    # Viewers of the first region, whose code "eu" has now, are of no region until their next exposure.
    add(windows, [ListEvent("like", 0, 0, 3, later_us)])
    lists = windows.lists(later_us).lists
    assert windows.refused_values == 0
    assert lists["popular:region=eu"].video_ids.tolist() == [2]
    assert sorted(lists["popular"].video_ids.tolist()) == [2, 3]


def test_damaged_state_is_reported(tmp_path: Path) -> None:
    path = tmp_path / "lists.npz"
    ListWindows().save(path, {})
    whole = path.read_bytes()
    for content in (b"PK not a state", b"", whole[: len(whole) // 2], whole[:60] + bytes(200) + whole[260:]):
        path.write_bytes(content)
        with pytest.raises(MalformedFileError, match=r"lists\.npz.*list task; delete the file"):
            ListWindows().restore(path)
    assert ListWindows().restore(tmp_path / "none.npz") == {}


def test_bucket_keeps_the_pairs_with_the_most_engagement() -> None:
    counts = WindowCounts(max_rows=10)
    bucket = np.full(30, 5)
    counts.add(bucket, np.arange(30), 1, np.arange(30, dtype=np.float64))
    assert counts.dropped == 20
    counts.advance(6)
    pairs, _ = counts.window(DAY_BUCKETS)
    assert pairs.tolist() == list(range(20, 30))
