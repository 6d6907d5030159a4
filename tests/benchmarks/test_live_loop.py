"""The live loop in a tiny world: a release of random models, and hours instead of days."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
from tests.benchmarks.bench_live_loop import FROZEN, LIVE, REMEMBERED, LoopSize, ratio_interval, report_rows, run_loop
from tests.benchmarks.live_loop_service import LISTS_INTERVAL_S, LiveParts, LoopRelease, LoopService, Part
from tests.benchmarks.live_loop_traffic import ArmTotals, loop_requests
from tests.support.dimensions import DIMENSIONS
from tests.support.pipelines.trained_run import write_evaluation, write_features, write_random_models

from reelway.pipelines.commands.signing_key import ensure_signing_key
from reelway.pipelines.datasets.store import write_dataset
from reelway.pipelines.features.materialisation import materialise
from reelway.pipelines.features.views import ViewSettings
from reelway.pipelines.release_builder import build_release
from reelway.pipelines.simulation.config import SimulationConfig
from reelway.pipelines.simulation.simulate_log import simulate
from reelway.pipelines.simulation.world import World
from reelway.platform.atomic_files import write_json
from reelway.platform.release.signing import load_private_key
from reelway.platform.run_directory import RunDirectory

pytestmark = pytest.mark.slow

SIZE = LoopSize(viewers=12, videos=150, log_days=3, days=1, pages_per_day=5.0, seed=3)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> RunDirectory:
    """A simulated run with a release, as ``prepare`` makes it, without training."""
    directory = RunDirectory(tmp_path_factory.mktemp("loop") / "run")
    config = SimulationConfig(SIZE.viewers, SIZE.videos, creators=20, days=SIZE.log_days, impressions=1_500)
    dataset = simulate(config, SIZE.seed)
    write_dataset(directory.dataset, dataset.tables, dataset.info, dimensions=dataset.dimensions)
    write_features(directory, dataset.tables, DIMENSIONS)
    write_random_models(directory.models)
    write_evaluation(directory)
    settings = {"config": {"views": asdict(ViewSettings(DIMENSIONS))}, "identity": "test"}
    write_json(directory.record_path("features"), settings)
    materialise(directory.features, config.end_s)
    release = build_release(directory, name="loop", key=load_private_key(ensure_signing_key(directory)))
    write_json(directory.record_path("release"), {"summary": {"release_id": release}})
    return directory


@pytest.fixture(scope="module")
def totals(run: RunDirectory, tmp_path_factory: pytest.TempPathFactory) -> dict[str, ArmTotals]:
    return run_loop(run, tmp_path_factory.mktemp("arms"), SIZE, (FROZEN, REMEMBERED, LIVE))


@pytest.fixture
def live(run: RunDirectory, tmp_path: Path) -> Iterator[tuple[World, LoopService, LiveParts]]:
    world = World(SimulationConfig(**json.loads((run.dataset / "dataset.json").read_text())["config"]), SIZE.seed)
    release = run.record("release")["summary"]["release_id"]
    service, parts = LoopRelease(run, release, world, tmp_path).live(LIVE, frozenset(Part))
    yield world, service, parts
    parts.close()


def test_arms_answer_the_same_requests(totals: dict[str, ArmTotals]) -> None:
    impressions = {name: arm.impressions for name, arm in totals.items()}
    assert impressions == dict.fromkeys(impressions, round(SIZE.viewers * SIZE.pages_per_day) * 10)


def test_memory_prevents_repeats(totals: dict[str, ArmTotals]) -> None:
    assert totals[FROZEN].repeats > 50
    assert totals[REMEMBERED].repeats == 0
    assert totals[LIVE].repeats == 0


def test_live_arm_alone_shows_uploads(totals: dict[str, ArmTotals]) -> None:
    assert totals[LIVE].uploads_shown > 0
    assert {totals[name].uploads_shown for name in (FROZEN, REMEMBERED)} == {0}


def test_live_lists_replace_those_of_the_release(live: tuple[World, LoopService, LiveParts]) -> None:
    world, service, parts = live
    service.advance(world.end_s)
    slate = service.recommend(1, "phone", world.end_s + 5, request_id=0)
    service.report([{"token": slate.tokens[3], "type": "like", "value": 1.0}], world.end_s + 58)
    service.advance(world.end_s + LISTS_INTERVAL_S)
    assert parts.lists.current().as_of_s == world.end_s + LISTS_INTERVAL_S
    liked = parts.lists.current().popular[0]
    assert parts.table.video_id[[liked]].tolist() == [slate.video_ids[3]]


def test_live_row_follows_the_outcomes(live: tuple[World, LoopService, LiveParts]) -> None:
    """The viewer's history has the reported like at the next tick."""
    world, service, _ = live
    service.advance(world.end_s)
    slate = service.recommend(1, "phone", world.end_s + 5, request_id=0)
    outcome = {"token": slate.tokens[3], "type": "like", "value": 1.0}
    service.report([outcome], world.end_s + 58)
    service.advance(world.end_s + 60)
    assert service.read_row(1)["history_videos"][-1] == slate.video_ids[3]


def test_loop_requests_continue_after_the_log(live: tuple[World, LoopService, LiveParts]) -> None:
    world, _, _ = live
    requests = loop_requests(world, 2, 5.0)
    assert len(requests.time_s) == 2 * 5 * SIZE.viewers
    assert requests.time_s.min() >= world.end_s
    assert requests.time_s.max() < world.end_s + 2 * 86_400
    again = loop_requests(world, 2, 5.0)
    np.testing.assert_array_equal(again.time_s, requests.time_s)


def arm(name: str, watch_s: list[float]) -> ArmTotals:
    return ArmTotals(name, np.array([[0.0], *([value] for value in watch_s)]), impressions=10)


def test_ratio_interval_pairs_viewers() -> None:
    """Viewers who watch 20 % more each give the ratio 1.2 in every resample, however much they differ."""
    ratio, low, high = ratio_interval(arm(LIVE, [12.0, 120.0, 1200.0]), arm(FROZEN, [10.0, 100.0, 1000.0]), 0)
    np.testing.assert_allclose([ratio, low, high], 1.2)


@pytest.mark.parametrize(("live_s", "holds"), [(11.4, False), (11.6, True)])
def test_report_judges_the_ratio_to_the_arm_with_memory(live_s: float, holds: bool) -> None:
    arms = {FROZEN: arm(FROZEN, [1.0] * 12), REMEMBERED: arm(REMEMBERED, [10.0] * 12), LIVE: arm(LIVE, [live_s] * 12)}
    rows = list(report_rows(arms, SIZE))
    judged = {row.metric: row.holds for row in rows if row.holds is not None}
    assert judged == {f"{LIVE} over {REMEMBERED}": holds}
    assert Counter(row.metric for row in rows)[f"{LIVE} over {FROZEN}"] == 1
