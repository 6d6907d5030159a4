"""Live traffic over HTTP: the report counts every request, every failure and every unexpected arm change."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tests.support.pipelines.fake_service import FakeService, liked_slates, running, with_canary

from reelway.pipelines.datasets.store import write_dataset
from reelway.pipelines.simulation.arm_stickiness import GRACE_S, ArmStickinessCheck
from reelway.pipelines.simulation.config import DAY_S, SimulationConfig
from reelway.pipelines.simulation.live_traffic import LiveTraffic, TrafficOptions, ViewerTokens
from reelway.pipelines.simulation.live_viewers import LiveViewers, ShownSlate, load_world
from reelway.pipelines.simulation.simulate_log import simulate
from reelway.pipelines.simulation.world import World
from reelway.platform.cli.processes import reelway_command
from reelway.platform.errors import ConfigError, DataError
from reelway.platform.rollout.traffic.access_options import JwtOptions
from reelway.platform.rollout.traffic.routing import Routing
from reelway.platform.viewer_assertions import ViewerTokenSigner, create_viewer_key, read_viewer_key
from reelway.platform.viewer_pseudonyms import viewer_pseudonym
from reelway.serving.access.assertions import JwtVerifier

OLD, NEW = "a" * 64, "b" * 64
CONFIG = SimulationConfig(viewers=400, videos=300, creators=30, days=4, impressions=4_000)


@pytest.fixture(scope="module")
def world() -> World:
    return World(CONFIG, seed=3)


def sent(service: FakeService, world: World, *, viewers: int | None = None, **options: Any) -> dict[str, Any]:
    crowd = LiveViewers(world, seed=1, now_s=time.time(), count=viewers)
    return asyncio.run(LiveTraffic(TrafficOptions(service.url, service.url, **options), crowd).run())


def test_traffic_report_matches_the_service(world: World, tmp_path: Path) -> None:
    with running(FakeService(with_canary(OLD, NEW, 3_000), CONFIG.videos)) as service:
        report = sent(service, world, rate=150, seconds=2, report=tmp_path / "report.json")
    assert report == json.loads((tmp_path / "report.json").read_text()) | {"running": False}
    assert {(r["release"], r["arm"]): r["requests"] for r in report["releases"]} == dict(service.slates)
    assert 200 < report["requests"] == sum(service.slates.values()) < 400
    assert report["failed"] == report["arm_changes"] == report["outcomes"]["posts_failed"] == 0
    assert report["outcomes"]["sent"] == len(service.outcomes) == report["outcomes"]["answered"]["accepted"]
    assert sum(r["viewers"] for r in report["releases"]) == report["viewers"] == len(service.asked)
    examined = sum(r["videos_looked_at"] for r in report["releases"])
    watches = [o for o in service.outcomes if o["type"] == "watch"]
    assert len(watches) == examined
    seconds = sum(r["videos_looked_at"] * r["watch_s_per_impression"] for r in report["releases"])
    assert seconds == pytest.approx(sum(o["value"] for o in watches) / 1000, rel=1e-4)


def test_failed_request_is_counted_with_its_reason(world: World) -> None:
    viewer_ids = LiveViewers(world, seed=1, now_s=time.time())._ids
    unlucky = frozenset(viewer_ids[: len(viewer_ids) // 4].tolist())
    with running(FakeService(Routing.single_release(OLD), CONFIG.videos, fail_viewers=unlucky)) as service:
        report = sent(service, world, rate=100, seconds=1.5)
    assert 0 < report["failed"] < report["requests"]
    assert report["requests"] - report["failed"] == sum(service.slates.values())
    assert "503" in report["failures"][0]
    assert "injected failure" in report["failures"][0]
    assert len(report["failures"]) <= 10


def test_timeout_or_connection_error_is_a_failure(world: World) -> None:
    with running(FakeService(Routing.single_release(OLD), CONFIG.videos, delay_s=0.6)) as service:
        late = sent(service, world, rate=30, seconds=0.5, timeout_s=0.2)
    unreachable = sent(service, world, rate=30, seconds=0.5)
    assert late["failed"] == late["requests"] > 0
    assert unreachable["failed"] == unreachable["requests"] > 0
    assert "Timeout" in late["failures"][0]


def test_arrivals_do_not_wait_for_a_slow_service(world: World) -> None:
    with running(FakeService(Routing.single_release(OLD), CONFIG.videos, delay_s=0.3)) as service:
        open_loop = sent(service, world, rate=100, seconds=0.6)
        bounded = sent(service, world, rate=100, seconds=0.6, max_in_flight=10)
    assert open_loop["requests"] > 35  # one at a time would be 2
    assert open_loop["held_back"] == 0
    assert bounded["held_back"] > 0
    assert bounded["latency_ms"]["stable"]["p95"] > 2 * open_loop["latency_ms"]["stable"]["p95"]


def test_outcomes_are_retried_until_acknowledged(world: World) -> None:
    with running(FakeService(Routing.single_release(OLD), CONFIG.videos, fail_next_outcomes=2)) as service:
        report = sent(service, world, rate=100, seconds=1)
    assert report["outcomes"]["sent"] == len(service.outcomes) > 0
    assert report["outcomes"]["posts_failed"] == 0
    assert max(service.posts) <= 1_000


def test_better_slate_is_watched_longer(world: World) -> None:
    best = liked_slates(world, world.end_s, 10)
    with running(FakeService(Routing.single_release(OLD), CONFIG.videos)) as service:
        chance = sent(service, world, rate=150, seconds=1)
        service.best = best
        oracle = sent(service, world, rate=150, seconds=1)
    by_chance, by_taste = (report["releases"][0]["watch_s_per_impression"] for report in (chance, oracle))
    assert by_taste > 1.5 * by_chance


def test_simulated_time_continues_from_the_log(world: World) -> None:
    lately = LiveViewers(world, seed=0, now_s=world.end_s + 3 * DAY_S)
    assert lately.simulated_time_s(world.end_s + 3 * DAY_S + 7) == world.end_s + 3 * DAY_S + 7
    long_ago = LiveViewers(world, seed=0, now_s=world.end_s + 300 * DAY_S)
    assert long_ago.simulated_time_s(world.end_s + 300 * DAY_S + 7) == world.end_s + 7


def test_active_viewers_are_drawn_more_often(world: World) -> None:
    first, again, other = (LiveViewers(world, seed=s, now_s=world.end_s, count=50) for s in (4, 4, 5))
    drawn = [first.next_viewer() for _ in range(3_000)]
    assert drawn == [again.next_viewer() for _ in range(3_000)]
    assert drawn != [other.next_viewer() for _ in range(3_000)]
    viewers, often = np.unique([viewer for viewer, _ in drawn], return_counts=True)
    assert len(viewers) == 50
    assert np.corrcoef(often, world.viewers.activity[viewers - 1])[0, 1] > 0.9


def test_slates_of_different_lengths_get_reactions(world: World) -> None:
    crowd = LiveViewers(world, seed=0, now_s=world.end_s)
    none, two, four = crowd.react(
        [ShownSlate(1, [], []), ShownSlate(2, [5, 6], ["p", "q"]), ShownSlate(3, [1, 2, 3, 4], ["a", "b", "c", "d"])],
        world.end_s,
    )
    assert none.outcomes == []
    assert {o["token"] for o in two.outcomes} <= {"p", "q"}
    assert 1 <= four.looked_at <= 4
    assert [o["token"] for o in four.outcomes if o["type"] == "watch"] == ["a", "b", "c", "d"][: four.looked_at]


def test_slate_of_another_run_is_rejected(world: World) -> None:
    crowd = LiveViewers(world, seed=0, now_s=world.end_s)
    with pytest.raises(DataError, match="a release of this run"):
        crowd.react([ShownSlate(1, [CONFIG.videos + 1], ["t"])], world.end_s)
    with running(FakeService(Routing.single_release(OLD), 10 * CONFIG.videos)) as service, pytest.raises(DataError):
        sent(service, world, rate=100, seconds=20)


def test_imported_data_set_has_no_simulated_viewers() -> None:
    with pytest.raises(ConfigError, match="'MovieLens'"):
        load_world({"name": "MovieLens", "seed": 0})


def test_data_set_of_an_earlier_world_is_rejected() -> None:
    info = simulate(CONFIG, 3).info
    assert load_world(dict(info)).config == CONFIG
    with pytest.raises(ConfigError, match="version 1 of the simulated world"):
        load_world({**info, "world_version": 1})


def record_responses(ledger: ArmStickinessCheck, canaries: set[str], at_s: float, **answers: str) -> None:
    """Records responses to the viewers v1, v2, ... from these releases, then the routing."""
    for viewer, release in answers.items():
        ledger.record_response(int(viewer[1:]), release, "canary" if release in canaries else "stable", at_s)
    ledger.record_routing(frozenset(canaries), at_s)


def test_regular_rollout_counts_no_arm_change() -> None:
    ledger = ArmStickinessCheck()
    record_responses(ledger, {NEW}, 0, v1=OLD, v2=NEW, v3=OLD)
    record_responses(ledger, {NEW}, 10, v1=NEW, v2=NEW, v3=OLD)
    record_responses(ledger, set(), 20, v1=OLD, v2=OLD, v3=OLD)  # rolled back
    record_responses(ledger, {NEW}, 40, v1=OLD, v2=NEW, v3=NEW)  # once more, under another salt
    for viewer in (1, 2, 3):
        ledger.record_response(viewer, NEW, "stable", 50)  # promoted: the canary is the stable release now
    record_responses(ledger, set(), 60)
    record_responses(ledger, set(), 70)
    assert ledger.changes == 0


def test_viewer_who_leaves_a_running_canary_is_counted() -> None:
    ledger = ArmStickinessCheck()
    record_responses(ledger, {NEW}, 0, v1=NEW, v2=NEW)
    record_responses(ledger, {NEW}, 10, v1=NEW)
    ledger.record_response(2, OLD, "stable", 10.5)
    ledger.record_routing(frozenset({NEW}), 11)
    assert ledger.changes == 0  # the routing may have been read before the response
    ledger.record_routing(frozenset({NEW}), 10.5 + GRACE_S + 0.1)
    assert ledger.changes == 1
    assert viewer_pseudonym(2) in ledger.examples[0]


def test_reshuffled_viewers_are_counted_over_http(world: World) -> None:
    async def reshuffled(service: FakeService) -> dict[str, Any]:
        crowd = LiveViewers(world, seed=1, now_s=time.time(), count=40)
        options = TrafficOptions(service.url, service.url, rate=100, seconds=GRACE_S + 1.5)
        traffic = asyncio.create_task(LiveTraffic(options, crowd).run())
        await asyncio.sleep(0.7)
        service.routing = service.routing.model_copy(update={"salt": "two"})
        return await traffic

    with running(FakeService(with_canary(OLD, NEW, 5_000), CONFIG.videos)) as service:
        report = asyncio.run(reshuffled(service))
    assert report["arm_changes"] > 0
    assert "still running" in report["arm_change_examples"][0]


def test_traffic_proves_each_viewers_identity(world: World, tmp_path: Path) -> None:
    public = create_viewer_key(tmp_path / "viewers.pem")
    signer = ViewerTokenSigner(read_viewer_key(tmp_path / "viewers.pem"), audience="reelway")
    verifier = JwtVerifier(JwtOptions(keys_file=public, audience="reelway"), lambda: None)
    crowd = LiveViewers(world, seed=1, now_s=time.time(), count=20)
    with running(FakeService(Routing.single_release(OLD), CONFIG.videos, verifier=verifier)) as service:
        options = TrafficOptions(service.url, None, rate=100, seconds=1)
        report = asyncio.run(LiveTraffic(options, crowd, signer=signer).run())
    assert report["failed"] == report["outcomes"]["posts_failed"] == 0
    assert report["outcomes"]["sent"] == len(service.outcomes) > 0
    assert len(service.tokens) == report["viewers"]  # one token per viewer, as long as it is valid


def test_viewers_token_is_renewed_before_it_expires(tmp_path: Path) -> None:
    create_viewer_key(tmp_path / "viewers.pem")
    signer = ViewerTokenSigner(read_viewer_key(tmp_path / "viewers.pem"), audience="reelway", lifetime_s=100)
    now = [1000.0]
    tokens = ViewerTokens(signer, clock=lambda: now[0])
    first = tokens.headers(7)
    now[0] += 79
    assert tokens.headers(7) == first != tokens.headers(8)
    now[0] += 2
    assert tokens.headers(7) != first


def test_ctrl_c_ends_traffic_with_a_complete_report(tmp_path: Path) -> None:
    log = simulate(CONFIG, 3)
    write_dataset(tmp_path / "run" / "dataset", log.tables, log.info, log.dimensions)
    report = tmp_path / "report.json"
    with running(FakeService(Routing.single_release(OLD), CONFIG.videos, delay_s=0.2)) as service:
        (tmp_path / "run" / "serving.json").write_text(json.dumps({"url": service.url, "internal_url": service.url}))
        command = reelway_command("traffic", "--run", str(tmp_path / "run"), "--report", str(report))
        process = subprocess.Popen(command, stdout=subprocess.PIPE, env={**os.environ, "OMP_NUM_THREADS": "1"})
        while not report.exists() and process.poll() is None:
            time.sleep(0.05)
        process.send_signal(signal.SIGINT)
        output, _ = process.communicate(timeout=20)
    assert process.returncode == 0
    written = json.loads(report.read_text())
    assert written["running"] is False
    assert written["failed"] == 0
    assert written["requests"] == sum(service.slates.values()) > 0
    assert written["outcomes"]["sent"] == len(service.outcomes)
    assert f"{written['requests']} requests" in output.decode()
