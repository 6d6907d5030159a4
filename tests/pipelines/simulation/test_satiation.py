from functools import cache

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from reelway.pipelines.simulation import world_constants as constants
from reelway.pipelines.simulation.arrivals import DEVICES, draw_requests
from reelway.pipelines.simulation.config import DAY_S, SimulationConfig
from reelway.pipelines.simulation.live_viewers import LiveViewers, ShownSlate
from reelway.pipelines.simulation.policies import OraclePolicy
from reelway.pipelines.simulation.responses import ShownSlates, responses_to_events
from reelway.pipelines.simulation.satiation import DecayingSums, ViewingHistory
from reelway.pipelines.simulation.world import World

CONFIG = SimulationConfig(viewers=300, videos=400, creators=40, days=4, impressions=12_000)
NOW_S = CONFIG.end_s
times_s = st.floats(0, 30 * DAY_S)


@cache
def world() -> World:
    return World(CONFIG, 0)


def rng(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


def watch(history: ViewingHistory, viewer: int, video: int, time_s: float) -> None:
    slots = history.slots(np.array([viewer]), np.array([[video - 1]]))
    watched = np.ones((1, 1), dtype=np.bool_)
    history.add(slots, np.array([time_s]), examined=watched, enjoyed=watched)


def enjoyment(history: ViewingHistory, viewer: int, video: int, time_s: float) -> float:
    return float(world().enjoyment(np.array([viewer]), np.array([[video]]), np.array([time_s]), history)[0, 0])


@given(
    steps=st.lists(st.lists(st.tuples(st.integers(0, 60), times_s, st.floats(0.1, 2.0)), max_size=12), max_size=25),
    half_life_s=st.floats(3600, 30 * DAY_S),
    capacity_bits=st.sampled_from([4, 12]),
)
def test_decaying_sums_equal_their_definition(
    steps: list[list[tuple[int, float, float]]], half_life_s: float, capacity_bits: int
) -> None:
    """Amounts are added in any order of time and with repeated keys. A small table grows and forgets faint sums."""
    sums = DecayingSums(half_life_s, capacity_bits)
    for step in steps:
        keys, time_s, amount = (np.array(column) for column in zip(*step, strict=True)) if step else (np.zeros(0),) * 3
        sums.add(sums.slots(keys.astype(np.int64)), time_s, amount.astype(np.float32))
    every = [one for step in steps for one in step]
    latest_s = max((time_s for _, time_s, _ in every), default=0.0)
    expected = [
        sum(amount * 0.5 ** ((latest_s - time_s) / half_life_s) for key, time_s, amount in every if key == wanted)
        for wanted in range(61)
    ]
    found = sums.read(sums.slots(np.arange(61)), np.array(latest_s))
    # A small table forgets a key at most once per step, each time a sum below 0.01; a large one forgets nothing.
    forgotten = 0.01 * (1 + len(steps)) if capacity_bits == 4 else 1e-5
    assert found == pytest.approx(expected, rel=1e-4, abs=forgotten)
    assert len(set(sums.slots(np.arange(61)).tolist())) == 61


def test_faint_sums_free_their_memory() -> None:
    sums = DecayingSums(DAY_S, capacity_bits=6)
    for day in range(2_000):
        keys = np.arange(20 * day, 20 * day + 20)
        sums.add(sums.slots(keys), np.full(20, day * DAY_S), np.ones(20, dtype=np.float32))
    assert len(sums) < 1_000


@settings(max_examples=30)
@given(viewer=st.integers(1, CONFIG.viewers), video=st.integers(1, CONFIG.videos), repeats=st.integers(1, 12))
def test_each_repeat_lowers_enjoyment(viewer: int, video: int, repeats: int) -> None:
    history = ViewingHistory(world().videos)
    before = enjoyment(history, viewer, video, NOW_S)
    for _ in range(repeats):
        watch(history, viewer, video, NOW_S)
        after = enjoyment(history, viewer, video, NOW_S)
        assert after < before
        before = after


@settings(max_examples=30)
@given(
    viewer=st.integers(1, CONFIG.viewers),
    video=st.integers(1, CONFIG.videos),
    repeats=st.integers(1, 5),
    days=st.lists(st.floats(0.01, 60), min_size=2, max_size=6, unique=True),
)
def test_satiation_recovers_with_time(viewer: int, video: int, repeats: int, days: list[float]) -> None:
    history = ViewingHistory(world().videos)
    for _ in range(repeats):
        watch(history, viewer, video, NOW_S)
    slots = history.slots(np.array([viewer]), np.array([[video - 1]]))
    penalties = [float(history.penalty(slots, np.array([NOW_S + day * DAY_S]))[0, 0]) for day in sorted(days)]
    assert penalties == sorted(penalties, reverse=True)
    assert float(history.penalty(slots, np.array([NOW_S + 120 * DAY_S]))[0, 0]) < 0.01


def test_repeat_costs_the_documented_odds() -> None:
    history = ViewingHistory(world().videos)
    fresh = enjoyment(history, 1, 5, NOW_S)
    watch(history, 1, 5, NOW_S - 7 * DAY_S)  # its topic and creator are forgotten by now
    repeated = enjoyment(history, 1, 5, NOW_S)
    odds = fresh / (1 - fresh) / (repeated / (1 - repeated))
    assert odds == pytest.approx(1.5**constants.VIDEO_SATIATION, rel=1e-3)


def test_skipped_video_satiates_less_than_a_watched_one() -> None:
    watched, skipped = ViewingHistory(world().videos), ViewingHistory(world().videos)
    watch(watched, 1, 5, NOW_S)
    slots, yes = skipped.slots(np.array([1]), np.array([[4]])), np.ones((1, 1), dtype=np.bool_)
    skipped.add(slots, np.array([NOW_S]), examined=yes, enjoyed=~yes)
    nothing = ViewingHistory(world().videos)
    assert enjoyment(watched, 1, 5, NOW_S) < enjoyment(skipped, 1, 5, NOW_S) < enjoyment(nothing, 1, 5, NOW_S)


@pytest.mark.parametrize("same", ["topic", "creator"])
def test_similar_video_satiates_mildly_within_a_session(same: str) -> None:
    videos = world().videos
    column = getattr(videos, same)
    other = videos.creator if same == "topic" else videos.topic
    pairs = np.argwhere((column[:, None] == column[None]) & (other[:, None] != other[None])) + 1
    seen, similar = pairs[0].tolist()
    history = ViewingHistory(videos)
    alone = enjoyment(history, 1, similar, NOW_S)
    watch(history, 1, seen, NOW_S)
    assert 0.6 * alone < enjoyment(history, 1, similar, NOW_S) < alone
    slots = history.slots(np.array([1]), np.array([[similar - 1]]))
    hour, day = (float(history.penalty(slots, np.array([NOW_S + s]))[0, 0]) for s in (3600.0, DAY_S))
    now = float(history.penalty(slots, np.array([NOW_S]))[0, 0])
    assert 0 < hour < 0.4 * now
    assert day < 1e-6


def test_history_of_one_viewer_does_not_affect_another() -> None:
    history = ViewingHistory(world().videos)
    before = enjoyment(history, 2, 5, NOW_S)
    watch(history, 1, 5, NOW_S)
    assert enjoyment(history, 2, 5, NOW_S) == before


def test_requests_of_one_batch_satiate_in_order_of_time() -> None:
    """Each viewer requests the same slate three times; the later pages are enjoyed less, however a call orders them."""
    viewers = np.arange(1, 201)
    slate = OraclePolicy(world()).slates(viewers, NOW_S, 5, rng())
    time_s = np.repeat([NOW_S, NOW_S + 90, NOW_S + 180], 200)
    order = rng(3).permutation(600)
    answers = world().respond(
        np.tile(viewers, 3)[order], np.tile(slate, (3, 1))[order], time_s[order], rng(), ViewingHistory(world().videos)
    )
    first, second, third = (answers.enjoyed[time_s[order] == at].mean() for at in np.unique(time_s))
    assert first > 3 * second > 0
    assert second > 1.5 * third


def test_frozen_slates_earn_less_with_every_page() -> None:
    """Live traffic: viewers who get the same videos on each page watch less and less; after a month they like them."""
    there = world().available_viewers(NOW_S)
    slates = OraclePolicy(world()).slates(there, NOW_S, 10, rng())
    crowd = LiveViewers(world(), seed=0, now_s=NOW_S)
    shown = [ShownSlate(int(v), row, ["t"] * 10) for v, row in zip(there, slates.tolist(), strict=True)]
    earned = [sum(one.watch_s for one in crowd.react(shown, NOW_S + after_s)) for after_s in (0, 300, 600, 40 * DAY_S)]
    assert earned[0] > 3 * earned[1] > 3 * earned[2]
    assert earned[3] > 3 * earned[2]


def test_log_restores_the_viewing_history() -> None:
    """The outcomes of a log leave the same satiation as the responses that caused them, up to the length of a watch."""
    requests = draw_requests(world(), 800, rng())
    slates = np.argsort(rng(1).random((800, len(world().available_videos(CONFIG.start_s)))), axis=1)[:, :6] + 1
    live, restored = ViewingHistory(world().videos), ViewingHistory(world().videos)
    answers = world().respond(requests.viewer_ids, slates, requests.time_s, rng(), live)
    zeros = np.zeros(slates.shape, np.int8)
    shown = ShownSlates(
        request_id=np.arange(800), viewer_ids=requests.viewer_ids, slates=slates, time_s=requests.time_s,
        propensity=np.ones(slates.shape, np.float32), source=zeros, sources=["random"],
        device=requests.device, devices=DEVICES,
    )  # fmt: skip
    restored.add_outcomes(responses_to_events(shown, answers)[1])
    viewers, time_s = np.arange(1, CONFIG.viewers + 1), np.full(CONFIG.viewers, NOW_S)
    every = np.tile(np.arange(CONFIG.videos), (CONFIG.viewers, 1))
    expected, found = (history.penalty(history.slots(viewers, every), time_s) for history in (live, restored))
    assert (expected > 1.0).sum() > 1_000
    assert found == pytest.approx(expected, rel=0.01, abs=0.01)
