from functools import cache

import numpy as np
import pyarrow as pa
import pytest

from reelway.pipelines.datasets.checks import check_dataset
from reelway.pipelines.datasets.store import Dataset
from reelway.pipelines.features.labels import label_impressions
from reelway.pipelines.simulation.arrivals import draw_requests
from reelway.pipelines.simulation.config import DAY_S, SimulationConfig
from reelway.pipelines.simulation.logging_policy import LoggingPolicy
from reelway.pipelines.simulation.policies import OraclePolicy, Policy, RandomPolicy, RecentPopularity
from reelway.pipelines.simulation.satiation import ViewingHistory
from reelway.pipelines.simulation.simulate_log import simulate, simulate_traffic_log
from reelway.pipelines.simulation.world import World

CONFIG = SimulationConfig(viewers=1500, videos=2000, creators=150, days=8, impressions=90_000)


@cache
def world() -> World:
    return World(CONFIG, 0)


@cache
def logged() -> Dataset:
    return simulate_traffic_log(world())


def test_log_depends_only_on_configuration_and_seed() -> None:
    small = SimulationConfig(viewers=200, videos=300, creators=40, days=3, impressions=5_000)
    first, again, other = simulate(small, 3), simulate(small, 3), simulate(small, 4)
    for name, table in first.tables.items():
        assert table.equals(again.tables[name])
    assert not first.impressions.equals(other.impressions)


def test_log_passes_all_data_checks() -> None:
    assert check_dataset(logged()).rejected_rows == 0
    assert logged().impressions.num_rows == CONFIG.impressions


def test_every_outcome_follows_its_impression() -> None:
    outcomes, shown = logged().outcomes, logged().impressions
    assert len(set(outcomes["type"].to_pylist())) == 9
    order = np.argsort(shown["impression_id"].to_numpy())
    shown_us = shown["event_time"].cast(pa.int64()).to_numpy()[order][outcomes["impression_id"].to_numpy()]
    assert (outcomes["event_time"].cast(pa.int64()).to_numpy() > shown_us).all()


def test_requests_fill_the_given_span() -> None:
    """All viewers have an account after the log, so requests come from its first hour to its last."""
    end_s = world().end_s
    requests = draw_requests(world(), 5_000, np.random.default_rng(0), (end_s, end_s + 2 * DAY_S))
    hour = (requests.time_s - end_s) // 3600
    assert len(requests.time_s) == 5_000
    assert (hour.min(), hour.max()) == (0, 47)


def test_traffic_has_a_daily_cycle_sessions_and_new_viewers() -> None:
    requests = draw_requests(world(), 20_000, np.random.default_rng(0))
    assert len(requests.time_s) == 20_000
    assert (np.diff(requests.time_s) >= 0).all()
    assert (requests.time_s >= world().viewers.created_s[requests.viewer_ids - 1]).all()
    american = world().viewers.region[requests.viewer_ids - 1] == 0
    hour = ((requests.time_s[american] / 3600 - 6) % 24).astype(int)
    per_hour = np.bincount(hour, minlength=24)
    assert per_hour[18:22].mean() > 2.5 * per_hour[2:6].mean()
    order = np.lexsort((requests.time_s, requests.viewer_ids))
    gap = np.diff(requests.time_s[order])[np.diff(requests.viewer_ids[order]) == 0]
    assert (gap < 150).mean() > 0.3
    cold = world().viewers.created_s[requests.viewer_ids - 1] > CONFIG.start_s
    assert cold.mean() > 0.1


def test_slate_has_no_future_or_duplicate_videos() -> None:
    shown = logged().impressions
    video = shown["video_id"].to_numpy()
    assert (shown["event_time"].cast(pa.int64()).to_numpy() / 1e6 >= world().videos.uploaded_s[video - 1]).all()
    pairs = shown["request_id"].to_numpy() * 10_000 + video
    assert len(np.unique(pairs)) == len(pairs)


def test_recorded_propensities_match_the_drawn_frequencies() -> None:
    small = World(SimulationConfig(viewers=50, videos=70, creators=10, slate=4, impressions=100), 2)
    policy = LoggingPolicy(small)
    policy.begin_period(small.config.end_s)
    viewers = np.full(60_000, 7)
    slates, propensity, _ = policy.choose(viewers, np.random.default_rng(1))
    _, first, counts = np.unique(slates[:, 0], return_index=True, return_counts=True)
    expected = propensity[first, 0] * len(viewers)
    assert expected.sum() == pytest.approx(len(viewers), rel=1e-3)
    assert (np.abs(counts - expected) < 5 * np.sqrt(expected)).all()
    # Each position is drawn from the videos that are not above it: the mean inverse propensity is their number.
    for position in (1, 3):
        assert (1 / propensity[:, position]).mean() == pytest.approx(70 - position, rel=0.03)
        top = np.bincount(slates[:, position]).argmax()
        hit = slates[:, position] == top
        free = ~(slates[:, :position] == top).any(axis=1)
        assert hit.sum() == pytest.approx(propensity[hit, position].mean() * free.sum(), rel=0.1)


def watch_s(policy: Policy, seed: int = 5) -> float:
    rng = np.random.default_rng(seed)
    viewers = rng.permutation(world().available_viewers(CONFIG.end_s))[:1000]
    slates = policy.slates(viewers, CONFIG.end_s, 10, rng)
    return world().respond(viewers, slates, CONFIG.end_s, rng, ViewingHistory(world().videos)).watch_s_per_impression


class TopicAffinity:
    """A recommender by counts: the viewer's long-watch rate per topic times the video's long-watch rate."""

    def __init__(self, dataset: Dataset) -> None:
        labels = label_impressions(dataset.impressions, dataset.outcomes, dataset.videos)
        hit = labels["long_watch"].to_numpy().astype(np.float64)
        viewer, video = labels["viewer_id"].to_numpy() - 1, labels["video_id"].to_numpy() - 1
        topic = labels["video_topic"].to_numpy()
        hits, shown = np.zeros((CONFIG.viewers, 32)), np.zeros((CONFIG.viewers, 32))
        np.add.at(hits, (viewer, topic), hit)
        np.add.at(shown, (viewer, topic), 1)
        self.affinity = (hits + 2 * hit.mean()) / (shown + 2)
        count = np.bincount(video, minlength=CONFIG.videos)
        self.rate = (np.bincount(video, hit, CONFIG.videos) + 4 * hit.mean()) / (count + 4)

    def slates(self, viewer_ids, time_s, count, rng, /, *, seen=None):  # type: ignore[no-untyped-def]  # noqa: ARG002
        score = self.affinity[viewer_ids - 1][:, world().videos.topic[: CONFIG.videos]] * self.rate
        score[:, len(world().available_videos(time_s)) :] = 0
        return np.argsort(-score, axis=1)[:, :count] + 1


def test_watch_time_ranks_recommenders_by_quality() -> None:
    popular = watch_s(RecentPopularity(world(), logged().outcomes, CONFIG.end_s))
    random, oracle = watch_s(RandomPolicy(world())), watch_s(OraclePolicy(world()))
    learned = watch_s(TopicAffinity(logged()))
    print(f"watch s: random {random:.2f}, popular {popular:.2f}, counted {learned:.2f}, oracle {oracle:.2f}")
    assert popular > 1.1 * random
    assert oracle > 2.5 * popular
    assert learned > 1.3 * popular


def test_repeated_video_is_watched_less_in_the_log() -> None:
    """The same pairs of viewer and video: the second exposure is enjoyed less than the first."""
    labels = label_impressions(logged().impressions, logged().outcomes, logged().videos).sort_by("event_time")
    pair = labels["viewer_id"].to_numpy() * 10_000 + labels["video_id"].to_numpy()
    order = np.argsort(pair, kind="stable")
    first = np.flatnonzero(np.diff(pair[order], prepend=-1))
    repeated = first[:-1][np.diff(first) > 1]
    long_watch = labels["long_watch"].to_numpy()[order].astype(np.float64)
    assert len(repeated) > 2_000
    assert long_watch[repeated + 1].mean() < 0.5 * long_watch[repeated].mean()


def test_policies_recommend_only_available_unseen_videos() -> None:
    rng = np.random.default_rng(0)
    viewers = np.arange(1, 51)
    early_s = CONFIG.start_s + 3600
    seen = np.zeros((50, CONFIG.videos), dtype=np.bool_)
    for policy in (RandomPolicy(world()), OraclePolicy(world()), RecentPopularity(world(), logged().outcomes, early_s)):
        first = policy.slates(viewers, early_s, 10, rng)
        assert first.max() <= len(world().available_videos(early_s))
        np.put_along_axis(seen, first - 1, True, axis=1)
        second = policy.slates(viewers, early_s, 10, rng, seen=seen)
        assert not np.take_along_axis(seen, second - 1, axis=1).any()
        seen[:] = False


def test_propensities_include_random_exploration() -> None:
    propensity = logged().impressions["propensity"].to_numpy()
    assert propensity.min() >= 0.5 * CONFIG.explore_share / CONFIG.videos
    assert np.median(propensity) < 0.05
