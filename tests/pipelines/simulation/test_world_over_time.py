"""Uploads, trends and drifts of the simulated world, in the log and in the days after it."""

from functools import cache

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from reelway.pipelines.simulation import world_constants as constants
from reelway.pipelines.simulation.config import DAY_S, SimulationConfig
from reelway.pipelines.simulation.drift import draw_taste_drift, draw_topic_drift, largest_step
from reelway.pipelines.simulation.live_viewers import LiveViewers, ShownSlate
from reelway.pipelines.simulation.policies import OraclePolicy, RandomPolicy
from reelway.pipelines.simulation.satiation import ViewingHistory
from reelway.pipelines.simulation.world import World
from reelway.platform.contracts.events import VIDEOS
from reelway.platform.errors import DataError

CONFIG = SimulationConfig(viewers=300, videos=4_000, creators=100, days=7, impressions=10_000)
LAST_S = CONFIG.end_s + constants.LIVE_DAYS * DAY_S


@cache
def world(seed: int = 0) -> World:
    return World(CONFIG, seed)


def rng(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


def uploads_between(from_s: float, until_s: float) -> int:
    uploaded_s = world().videos.uploaded_s
    return int(((uploaded_s >= from_s) & (uploaded_s < until_s)).sum())


@pytest.mark.parametrize("seed", range(3))
def test_uploads_continue_at_the_rate_of_the_log(seed: int) -> None:
    uploaded_s = world(seed).videos.uploaded_s
    rate = CONFIG.videos * (1 - CONFIG.videos_at_start_ratio) / CONFIG.days
    per_day = np.histogram(uploaded_s, bins=CONFIG.start_s + DAY_S * np.arange(CONFIG.days + constants.LIVE_DAYS + 1))[
        0
    ]
    assert (np.abs(per_day - rate) < 5 * np.sqrt(rate)).all()
    assert (uploaded_s <= CONFIG.end_s).sum() == CONFIG.videos
    assert uploaded_s.max() < LAST_S


def test_videos_are_uploaded_every_hour_with_a_daily_cycle() -> None:
    hours = np.arange(CONFIG.start_s, LAST_S, 3600.0)
    per_hour = np.histogram(world().videos.uploaded_s, bins=np.append(hours, LAST_S))[0]
    assert (per_hour > 0).mean() > 0.98
    by_hour = per_hour.reshape(-1, 24).mean(axis=0)
    peak = int(constants.UPLOAD_PEAK_H)
    assert (
        by_hour[peak - 1 : peak + 2].mean() > 2 * by_hour[[(peak + 11) % 24, (peak + 12) % 24, (peak + 13) % 24]].mean()
    )


def test_later_uploads_resemble_those_of_the_log() -> None:
    videos, log = world().videos, np.s_[: CONFIG.videos]
    later = np.s_[CONFIG.videos :]
    assert abs(videos.quality[log].mean() - videos.quality[later].mean()) < 0.1
    centre = np.stack([videos.visual[log][videos.topic[log] == t].mean(axis=0) for t in range(32)])
    near = (videos.visual[later] @ centre.T).argmax(axis=1)
    assert (near == videos.topic[later]).mean() > 0.5  # one map from topics to embeddings


def test_tables_separate_the_log_from_later_uploads() -> None:
    log, every = world().videos_table(), world().all_videos_table()
    assert log.num_rows == CONFIG.videos
    assert every.num_rows == len(world().videos.topic) > CONFIG.videos
    assert every.schema.equals(VIDEOS)
    assert every.slice(0, CONFIG.videos).equals(log)


@settings(max_examples=25, deadline=None)
@given(time_s=st.floats(CONFIG.start_s, LAST_S), seed=st.integers(0, 100))
def test_policies_show_no_video_before_its_upload(time_s: float, seed: int) -> None:
    viewers = rng(seed).integers(1, CONFIG.viewers + 1, 8)
    for policy in (RandomPolicy(world()), OraclePolicy(world())):
        shown = policy.slates(viewers, time_s, 10, rng(seed))
        assert (world().videos.uploaded_s[shown - 1] <= time_s).all()


@settings(max_examples=25, deadline=None)
@given(video=st.integers(1, 6_000), before_s=st.floats(1.0, DAY_S))
def test_video_is_never_enjoyed_before_its_upload(video: int, before_s: float) -> None:
    uploaded_s = world().videos.uploaded_s[video - 1]
    viewers, slates = np.arange(1, 51), np.full((50, 1), video)
    early, late = np.full(50, uploaded_s - before_s), np.full(50, uploaded_s + 1)
    assert not world().enjoyment(viewers, slates, early).any()
    assert world().enjoyment(viewers, slates, late).all()
    answers = world().respond(viewers, slates, early, rng(), ViewingHistory(world().videos))
    assert not answers.enjoyed.any()


def test_live_viewers_get_new_videos_only_after_their_upload() -> None:
    crowd, video = LiveViewers(world(), seed=0, now_s=CONFIG.end_s), CONFIG.videos + 20
    uploaded_s = float(world().videos.uploaded_s[video - 1])
    shown = [ShownSlate(viewer, [video], ["t"]) for viewer in range(1, 101)]
    assert uploads_between(CONFIG.end_s, uploaded_s + 1) >= 20
    with pytest.raises(DataError, match=f"video id {video} is not uploaded yet"):
        crowd.react(shown, uploaded_s - 1)
    assert sum(one.watch_s for one in crowd.react(shown, uploaded_s + 1)) > 0


def test_new_video_is_enjoyed_more_than_later_in_its_life() -> None:
    viewers, video = np.arange(1, 201), np.full((200, 1), 3_000)
    ages_s = (0.0, 6 * 3600.0, DAY_S, 5 * DAY_S)
    still = World(CONFIG, 0)
    still.trend_HT = np.zeros_like(still.trend_HT)
    still.topic_drift_HT = np.zeros_like(still.topic_drift_HT)
    still.taste_drift_DVT = np.zeros_like(still.taste_drift_DVT)
    still.viewers.drift_at_s[:] = 0.0
    uploaded_s = still.videos.uploaded_s[2_999]
    logits = []
    for age_s in ages_s:
        enjoy = still.enjoyment(viewers, video, np.full(200, uploaded_s + age_s))[:, 0].astype(np.float64)
        logits.append(np.log(enjoy / (1 - enjoy)).mean())
    assert logits == sorted(logits, reverse=True)
    assert logits[0] - logits[2] == pytest.approx(constants.FRESH * 0.75 - constants.AGE * np.log(2), abs=0.02)


def drifts(name: str, seed: int) -> tuple[np.ndarray, float, float]:
    """The drift, its standard deviation and its half-life in steps."""
    if name == "taste":
        walk = draw_taste_drift(rng(seed), CONFIG).astype(np.float64)
        return walk.reshape(len(walk), -1), constants.TASTE_DRIFT, constants.TASTE_DRIFT_HALF_LIFE_D
    return (
        draw_topic_drift(rng(seed), CONFIG).astype(np.float64),
        constants.TOPIC_DRIFT,
        constants.TOPIC_DRIFT_HALF_LIFE_H,
    )


@settings(max_examples=20, deadline=None)
@given(name=st.sampled_from(["taste", "topic"]), seed=st.integers(0, 10_000))
def test_drift_is_bounded(name: str, seed: int) -> None:
    walk, std, half_life = drifts(name, seed)
    rounding = 2.0**-12  # half precision, twice: values stay below 0.5
    assert np.abs(walk).max() <= constants.DRIFT_BOUND * std + rounding
    assert np.abs(np.diff(walk, axis=0)).max() <= largest_step(std, half_life) + rounding


@pytest.mark.parametrize("name", ["taste", "topic"])
def test_drift_returns_to_its_mean(name: str) -> None:
    """After a half-life, half of a drift is left; its spread is the same at all times."""
    walks = [drifts(name, seed) for seed in range(1 if name == "taste" else 60)]
    walk, std, half_life = np.concatenate([one[0] for one in walks], axis=1), *walks[0][1:]
    later = int(half_life)
    before, after = walk[:-later].ravel(), walk[later:].ravel()
    assert (before @ after) / (before @ before) == pytest.approx(0.5, abs=0.06)
    assert walk.std(axis=1) == pytest.approx(std, rel=0.1)
    assert abs(walk.mean()) < 0.1 * std


def test_viewer_tastes_drift_slowly_and_apart() -> None:
    viewers = np.arange(1, CONFIG.viewers + 1)
    still = World(CONFIG, 0)
    still.trend_HT, still.topic_drift_HT = np.zeros_like(still.trend_HT), np.zeros_like(still.topic_drift_HT)
    still.viewers.drift_at_s[:] = 0.0
    at = [
        still.viewer_vectors(viewers, np.full(len(viewers), CONFIG.start_s + h * 3600.0))[:, :32] for h in (0, 1, 240)
    ]
    hour, days = at[1] - at[0], at[2] - at[0]
    step = constants.TOPIC * largest_step(constants.TASTE_DRIFT, constants.TASTE_DRIFT_HALF_LIFE_D)
    assert 0 < np.abs(hour).max() < step / 24 * 1.05
    assert days.std() > 0.3
    assert abs(np.corrcoef(days)[np.triu_indices(len(viewers), 1)].mean()) < 0.02  # not one movement of all viewers


def test_world_is_defined_until_the_last_live_day() -> None:
    viewers, slates = np.arange(1, 101), np.tile(np.arange(1, 11), (100, 1))
    for time_s in (CONFIG.start_s - DAY_S, CONFIG.end_s, LAST_S, LAST_S + 30 * DAY_S):
        enjoy = world().enjoyment(viewers, slates, np.full(100, time_s))
        assert np.isfinite(enjoy).all()
        assert world().viewer_vectors(viewers, np.full(100, time_s)).shape == (100, 40)
