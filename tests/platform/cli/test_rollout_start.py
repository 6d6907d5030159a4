"""``reelway rollout start``: rejected rollouts, the stored rollout, and the exit codes of ``--wait``."""

from __future__ import annotations

import re
import time
from pathlib import Path

import pytest
from tests.support.cli.rollout_fixtures import (
    SWIFT,
    SWIFT_TEXT,
    CommandResult,
    RunDirectoryEnvironment,
    SyntheticEvidence,
    controlling,
    reelway,
)

from reelway.platform.cli.rollout.start import previous_rollout
from reelway.platform.rollout.state import Command, Phase
from reelway.platform.rollout.traffic.routing import Routing
from reelway.platform.rollout.traffic.target import TrafficTarget
from reelway.platform.rollout.transition import start_state as begin_rollout


@pytest.fixture
def served(run_with_releases: Path, releases: tuple[str, str]) -> RunDirectoryEnvironment:
    """A run that serves the first of its two releases."""
    world = RunDirectoryEnvironment(run_with_releases)
    world.served(releases[0])
    world.controlled()
    world.backend.inner.write(TrafficTarget(Routing.single_release(releases[0]), (releases[0],)))
    world.source = SyntheticEvidence(viewers=2_400)  # type: ignore[assignment]
    (run_with_releases / "swift.yaml").write_text(SWIFT_TEXT)
    return world


def start(world: RunDirectoryEnvironment, release: str, *more: object) -> CommandResult:
    return reelway("rollout", "start", release, "--run", world.run, "--policy", world.run / "swift.yaml", *more)


def test_start_verifies_and_stores_a_release_by_id_prefix(
    served: RunDirectoryEnvironment, releases: tuple[str, str]
) -> None:
    ended = reelway("rollout", "start", releases[1][:8], "--run", served.run, "--note", "new ranker")
    assert ended.code == 0
    rollout_id = ended.out.strip()
    assert re.fullmatch(r"r-\d{8}-[0-9a-f]{6}", rollout_id)
    assert "checks passed" in ended.err
    assert "reelway rollout watch" in ended.err
    state = served.state
    assert (state.id, state.canary_release, state.stable_release) == (rollout_id, releases[1], releases[0])
    assert state.phase is Phase.PENDING
    assert state.reason.endswith(": new ranker")
    assert served.store.latest().policy.name == "default"  # type: ignore[union-attr]


def test_start_fails_if_the_run_is_not_served(run_with_releases: Path) -> None:
    ended = reelway("rollout", "start", "latest", "--run", run_with_releases)
    assert ended.code == 9
    assert "is not being served" in ended.err
    assert f"reelway serve --run {run_with_releases}" in ended.err


def test_start_ignores_the_record_of_an_exited_service(
    served: RunDirectoryEnvironment, releases: tuple[str, str]
) -> None:
    served.served(releases[0], pid=2**22 + 1)
    assert reelway("rollout", "start", releases[1], "--run", served.run).code == 9


def test_start_rejects_the_live_release(served: RunDirectoryEnvironment, releases: tuple[str, str]) -> None:
    ended = reelway("rollout", "start", releases[0], "--run", served.run)
    assert ended.code == 9
    assert "is already live" in ended.err
    assert served.store.latest() is None


def test_start_rejects_a_tampered_release_without_a_write(
    served: RunDirectoryEnvironment, releases: tuple[str, str]
) -> None:
    with (served.run / "releases" / releases[1] / "blend.yaml").open("a") as file:
        file.write("# changed\n")
    ended = reelway("rollout", "start", releases[1], "--run", served.run)
    assert ended.code == 6
    assert served.store.latest() is None


def test_start_that_waits_rejects_a_tampered_release(
    served: RunDirectoryEnvironment, releases: tuple[str, str]
) -> None:
    """The release is verified in a process of its own then, so that the libraries leave memory with it."""
    with (served.run / "releases" / releases[1] / "blend.yaml").open("a") as file:
        file.write("# changed\n")
    ended = reelway("rollout", "start", releases[1], "--run", served.run, "--wait")
    assert ended.code == 6
    assert "blend.yaml" in ended.err
    assert served.store.latest() is None


def test_start_rejects_a_second_active_rollout(served: RunDirectoryEnvironment, releases: tuple[str, str]) -> None:
    assert reelway("rollout", "start", releases[1], "--run", served.run).code == 0
    ended = reelway("rollout", "start", releases[1], "--run", served.run, "--force")
    assert ended.code == 9
    assert "is pending" in ended.err


def test_start_warns_if_no_controller_is_running(served: RunDirectoryEnvironment, releases: tuple[str, str]) -> None:
    (served.run / "rollout" / "controller.json").unlink()
    ended = reelway("rollout", "start", releases[1], "--run", served.run)
    assert ended.code == 0
    assert "no controller is running" in ended.err
    assert f"reelway rollout controller --run {served.run}" in ended.err


def test_start_wait_exits_with_0_if_promoted_or_10_if_rolled_back(
    served: RunDirectoryEnvironment, releases: tuple[str, str]
) -> None:
    with controlling(served):
        good = start(served, releases[1], "--wait", "--timeout", 20)
        assert good.code == 0
        assert "promote" in good.err
        served.source.drop = 0.3  # type: ignore[attr-defined]
        back = start(served, releases[0], "--wait", "--timeout", 20)
        assert back.code == 10
        assert "long_watch_rate: harm beyond the margin" in back.err
        assert "is no longer kept warm" in back.err
        again = start(served, releases[0])
        assert again.code == 9
        assert "to roll it out again, use --force" in again.err


def test_start_wait_exits_with_11_at_the_timeout(served: RunDirectoryEnvironment, releases: tuple[str, str]) -> None:
    served.source.viewers = 60  # type: ignore[attr-defined]
    with controlling(served):
        ended = start(served, releases[1], "--wait", "--timeout", 1)
        assert ended.code == 11
        rollout = served.store.latest()
        assert rollout is not None
        assert time.time() - rollout.state.started_at < 5  # the release was verified before that
        assert served.state.active


def test_last_promoted_release_is_the_next_stable_release(
    served: RunDirectoryEnvironment, releases: tuple[str, str]
) -> None:
    with controlling(served):
        start(served, releases[1], "--wait", "--timeout", 20)
    start(served, releases[0])
    assert served.state.stable_release == releases[1]


def test_ended_drill_restricts_only_its_own_release(served: RunDirectoryEnvironment, releases: tuple[str, str]) -> None:
    served.policy = SWIFT
    state = begin_rollout(
        SWIFT, rollout_id="d-20260131-3fa91c", canary_release="c" * 64, stable_release=releases[0], now=served.clock()
    )
    served.store.create(state, SWIFT)
    assert "is pending" in start(served, releases[1]).err
    served.store.submit_command(state.id, Command(id="1", verb="rollback"))
    served.tick(3, after_s=1)
    assert served.state.phase is Phase.ROLLED_BACK
    assert previous_rollout(served.store, releases[1]) is None
    assert previous_rollout(served.store, "c" * 64) == served.store.latest()
    assert start(served, releases[1]).code == 0


def test_start_wait_exits_with_12_if_the_rollout_is_paused(
    served: RunDirectoryEnvironment, releases: tuple[str, str]
) -> None:
    policy = served.run / "asks.yaml"
    policy.write_text(SWIFT_TEXT + "deadlines: {insufficient: {after_s: 0.3, action: pause}}\n")
    served.source.viewers = 60  # type: ignore[attr-defined]
    with controlling(served):
        more = ("--policy", policy, "--wait", "--timeout", 30)
        ended = reelway("rollout", "start", releases[1], "--run", served.run, *more)
    assert ended.code == 12
    assert "pause: p99_ms: insufficient (120 requests, needs 200); for 0 s, deadline 0 s" in ended.err
    assert served.state.phase is Phase.PAUSED
