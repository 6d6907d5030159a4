from dataclasses import fields, replace
from functools import cache

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pytest

from reelway.pipelines.datasets.store import cast_to_schema
from reelway.pipelines.simulation.config import DAY_S, SimulationConfig
from reelway.pipelines.simulation.responses import (
    FLAGS,
    Responses,
    ShownSlates,
    attention,
    draw_responses,
    expected_watch_ms,
    responses_to_events,
)
from reelway.pipelines.simulation.satiation import ViewingHistory
from reelway.pipelines.simulation.world import PAD, World
from reelway.platform.contracts.events import DATASET_TABLES, OutcomeType
from reelway.platform.errors import ConfigError, DataError

CONFIG = SimulationConfig(viewers=800, videos=1000, creators=100, days=6, impressions=20_000)


@cache
def world(seed: int = 0) -> World:
    return World(CONFIG, seed)


def rng(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


def slates(count: int, size: int, seed: int = 1) -> tuple[np.ndarray, np.ndarray]:
    available = world().available_videos(CONFIG.end_s)
    draw = rng(seed)
    viewers = draw.integers(1, CONFIG.viewers + 1, count)
    return viewers, np.argsort(draw.random((count, len(available))), axis=1)[:, :size] + 1


@pytest.mark.parametrize("name", ["viewers", "creators", "videos"])
def test_entity_tables_have_the_event_schema(name: str) -> None:
    table = getattr(world(), f"{name}_table")()
    assert table.schema.equals(DATASET_TABLES[name])
    assert cast_to_schema(name, table, name).num_rows == getattr(CONFIG, name)  # type: ignore[arg-type]


def test_world_depends_only_on_its_seed() -> None:
    again, other = World(CONFIG, 0), World(CONFIG, 1)
    assert again.videos_table().equals(world().videos_table())
    assert again.viewers_table().equals(world().viewers_table())
    assert not other.videos_table().equals(world().videos_table())


def test_new_viewers_and_videos_arrive_during_the_log() -> None:
    for created in (world().viewers.created_s, world().videos.uploaded_s[: CONFIG.videos]):
        per_day = np.histogram(created, bins=CONFIG.start_s + DAY_S * np.arange(CONFIG.days + 1))[0]
        assert (per_day > 10).all()
        assert (created < CONFIG.start_s).mean() > 0.3
    early, late = world().available_videos(CONFIG.start_s), world().available_videos(CONFIG.end_s)
    assert len(early) < len(late) == CONFIG.videos
    assert (world().videos.uploaded_s[early - 1] <= CONFIG.start_s).all()


def test_embeddings_are_partly_missing_or_poor() -> None:
    table = world().videos_table()
    for name, expected in (("visual", 0.03), ("audio", 0.25), ("text", 0.12)):
        assert table[name].null_count / table.num_rows == pytest.approx(expected, abs=0.04)
    visual, topic = world().videos.visual, world().videos.topic
    centre = np.stack([visual[topic == t].mean(axis=0) if (topic == t).any() else np.zeros(32) for t in range(32)])
    fit = (visual * centre[topic]).sum(axis=1) / np.linalg.norm(centre[topic], axis=1)
    assert 0.05 < (fit < 0.35).mean() < 0.4


@pytest.mark.parametrize("name", ["visual", "text"])
def test_similar_embeddings_share_a_topic(name: str) -> None:
    values = getattr(world().videos, name)
    near = values @ values.T - 2 * np.eye(len(values))
    same = world().videos.topic[near.argmax(axis=1)] == world().videos.topic
    chance = ((np.bincount(world().videos.topic) / len(values)) ** 2).sum()
    assert same.mean() > 8 * chance


def without_drift(created: World) -> World:
    created.taste_drift_DVT = np.zeros_like(created.taste_drift_DVT)
    created.topic_drift_HT = np.zeros_like(created.topic_drift_HT)
    return created


def test_viewer_tastes_change() -> None:
    viewers, changed = np.arange(1, CONFIG.viewers + 1), without_drift(World(CONFIG, 0))
    first, last = (
        changed.viewer_vectors(viewers, np.full(len(viewers), t))[:, :32] for t in (CONFIG.start_s, CONFIG.end_s)
    )
    moved = np.linalg.norm(last - first, axis=1)
    assert (moved > 1.0).mean() > 0.25
    assert (world().viewers.early_taste > 0.2).sum(axis=1).min() >= 4


def test_trends_rise_and_fall() -> None:
    viewer = np.array([1])
    hours = np.arange(0, CONFIG.days * 24, 6)
    still = without_drift(World(CONFIG, 0))
    still.viewers = replace(still.viewers, late_taste=still.viewers.early_taste)
    path = np.stack([still.viewer_vectors(viewer, CONFIG.start_s + 3600.0 * np.array([h]))[0, :32] for h in hours])
    swing = path.max(axis=0) - np.maximum(path[0], path[-1])
    assert (swing > 0.3).sum() >= 2


def test_responses_follow_taste() -> None:
    viewers, shown = slates(3000, 1)
    moment = np.full(len(viewers), CONFIG.end_s)
    enjoy = world().enjoyment(viewers, shown, moment)
    answers = world().respond(viewers, shown, CONFIG.end_s, rng(), ViewingHistory(world().videos))
    liked = enjoy[:, 0] > 0.5
    assert answers.enjoyed[liked].mean() == pytest.approx(enjoy[liked].mean(), abs=0.06)
    assert answers.watch_ms[liked].mean() > 3 * answers.watch_ms[~liked].mean()
    assert answers.not_interested[liked].sum() < answers.not_interested[~liked].sum()


def test_video_in_a_foreign_language_is_enjoyed_less() -> None:
    viewers, shown = slates(4000, 1)
    enjoy = world().enjoyment(viewers, shown, np.full(len(viewers), CONFIG.end_s))[:, 0]
    language, first_language = world().videos.language[shown[:, 0] - 1], world().viewers.language[viewers - 1]
    second = world().viewers.second_language[viewers - 1]
    foreign = (language >= 0) & (language != first_language) & (language != second)
    assert enjoy[foreign].mean() < 0.5 * enjoy[~foreign].mean()


def test_lower_positions_are_examined_less_often() -> None:
    viewers, shown = slates(4000, 10)
    examined = (
        world().respond(viewers, shown, CONFIG.end_s, rng(), ViewingHistory(world().videos)).examined.mean(axis=0)
    )
    assert examined[0] == 1.0
    assert (np.diff(examined) < 0).all()
    assert examined[-1] < 0.75


def test_unexamined_positions_have_no_response() -> None:
    viewers, shown = slates(2000, 10)
    answers = world().respond(viewers, shown, CONFIG.end_s, rng(), ViewingHistory(world().videos))
    for field in fields(Responses):
        if field.name not in ("present", "examined", "shown_ms"):
            assert not getattr(answers, field.name)[~answers.examined].any()
    assert (answers.watch_ms[answers.examined] > 0).all()


def test_expected_watch_time_is_the_mean_of_drawn_watch_time() -> None:
    shape, duration = (20_000, 1), np.float32(20_000)
    means = []
    for p in (0.0, 0.3, 0.9):
        present, enjoy = np.ones(shape, dtype=np.bool_), np.full(shape, p, np.float32)
        examined, enjoyed = attention(rng(1).random((2, *shape), dtype=np.float32), present, enjoy)
        answers = draw_responses(
            rng(), present=present, examined=examined, enjoyed=enjoyed, enjoy_probability=enjoy,
            duration_ms=np.full(shape, duration), quality=np.zeros(shape, np.float32),
            reactivity=np.ones(shape[0], np.float32),
        )  # fmt: skip
        means.append(answers.watch_ms.mean())
        assert expected_watch_ms(np.float32(p), duration) == pytest.approx(means[-1], rel=0.06)
    assert means == sorted(means)


def test_pads_duplicates_or_future_videos_are_never_enjoyed() -> None:
    last = CONFIG.videos
    early_s = world().videos.uploaded_s[last - 1] - 60
    slate = np.array([[1, 1, last, PAD]])
    enjoy = world().enjoyment(np.array([1]), slate, np.array([early_s]))
    assert enjoy[0, 0] > 0
    assert (enjoy[0, 1:] == 0).all()
    answers = world().respond(np.array([1]), slate, early_s, rng(), ViewingHistory(world().videos))
    assert answers.present.tolist() == [[True, True, True, False]]
    assert not answers.examined[0, 3]


def test_slate_with_a_single_topic_is_enjoyed_less() -> None:
    topic = np.bincount(world().videos.topic).argmax()
    same = np.flatnonzero(world().videos.topic == topic)[:6] + 1
    moment = np.array([CONFIG.end_s])
    alone = world().enjoyment(np.array([1]), same[-1:][None], moment)[0, 0]
    assert world().enjoyment(np.array([1]), same[None], moment)[0, -1] < alone


@pytest.mark.parametrize(
    ("viewer", "video", "message"), [(0, 1, "viewer id 0"), (10**6, 1, "viewer id"), (1, 10**6, "video id 1000000")]
)
def test_unknown_ids_are_rejected(viewer: int, video: int, message: str) -> None:
    with pytest.raises(DataError, match=message):
        world().respond(np.array([viewer]), np.array([[video]]), CONFIG.end_s, rng(), ViewingHistory(world().videos))


def test_responses_become_events_in_the_schema() -> None:
    viewers, shown = slates(200, 5)
    shown[:50, 3:] = PAD
    answers = world().respond(viewers, shown, CONFIG.end_s, rng(), ViewingHistory(world().videos))
    slates_shown = ShownSlates(
        request_id=np.arange(200) + 7, viewer_ids=viewers, slates=shown, time_s=np.full(200, CONFIG.end_s),
        propensity=np.full(shown.shape, 0.5, np.float32), source=np.zeros(shown.shape, np.int8), sources=["ann"],
        device=np.zeros(200, np.int64), devices=["tv"], release="r9", arm="canary",
    )  # fmt: skip
    impressions, outcomes = responses_to_events(slates_shown, answers, first_impression_id=1000, first_outcome_id=5000)
    assert impressions.schema.equals(DATASET_TABLES["impressions"])
    assert outcomes.schema.equals(DATASET_TABLES["outcomes"])
    assert impressions.num_rows == 200 * 5 - 100
    assert set(impressions["arm"].to_pylist()) == {"canary"}
    assert impressions["impression_id"].to_numpy().min() == 1000
    kinds = {row["values"]: row["counts"] for row in pc.value_counts(outcomes["type"].cast(pa.string())).to_pylist()}
    assert kinds["watch"] == answers.examined.sum()
    for kind in OutcomeType:
        if kind is not OutcomeType.WATCH:
            simulated = getattr(answers, kind.value).sum() if kind.value in FLAGS else 0  # no viewer blocks anything
            assert kinds.get(kind.value, 0) == simulated
    watch = outcomes.filter(pc.equal(outcomes["type"].cast(pa.string()), "watch"))
    assert pc.sum(watch["value"]).as_py() == pytest.approx(float(answers.watch_ms.sum()), rel=1e-5)


@pytest.mark.parametrize(
    ("bad", "message"),
    [({"videos": 20}, "20 videos"), ({"days": 0}, "days is 0"), ({"explore_share": 0.9}, "sum to")],
)
def test_invalid_configuration_is_rejected(bad: dict[str, float], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        replace(CONFIG, **bad)  # type: ignore[arg-type]
