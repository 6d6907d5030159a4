"""``reelway rollout start``: what is refused, what is written down, and how waiting ends."""

from __future__ import annotations

import re
import time
from pathlib import Path

import pytest
from tests.platform.cli.made_rollouts import SWIFT, SWIFT_TEXT, Ended, RunWorld, SeenEvidence, controlling, reelway

from reelway.platform.cli.rollout.start import previous_of
from reelway.platform.rollout.state import Command, Phase
from reelway.platform.rollout.traffic.routing import Routing
from reelway.platform.rollout.traffic.target import TrafficTarget
from reelway.platform.rollout.transition import start as begin_rollout


@pytest.fixture
def served(run_with_releases: Path, releases: tuple[str, str]) -> RunWorld:
    """A run that serves the first of its two releases, with plain evidence."""
    world = RunWorld(run_with_releases)
    world.served(releases[0])
    world.controlled()
    world.backend.inner.write(TrafficTarget(Routing.whole(releases[0]), (releases[0],)))
    world.source = SeenEvidence(viewers=2_400)  # type: ignore[assignment]
    (run_with_releases / "swift.yaml").write_text(SWIFT_TEXT)
    return world


def start(world: RunWorld, release: str, *more: object) -> Ended:
    return reelway("rollout", "start", release, "--run", world.run, "--policy", world.run / "swift.yaml", *more)


def test_a_release_by_the_beginning_of_its_id_is_verified_and_written_down(
    served: RunWorld, releases: tuple[str, str]
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


def test_a_run_that_nobody_serves_is_refused_with_what_to_do(run_with_releases: Path) -> None:
    ended = reelway("rollout", "start", "latest", "--run", run_with_releases)
    assert ended.code == 9
    assert "is not being served" in ended.err
    assert f"reelway serve --run {run_with_releases}" in ended.err


def test_a_record_of_a_service_that_is_gone_does_not_count_as_served(
    served: RunWorld, releases: tuple[str, str]
) -> None:
    served.served(releases[0], pid=2**22 + 1)
    assert reelway("rollout", "start", releases[1], "--run", served.run).code == 9


def test_the_live_release_itself_is_refused(served: RunWorld, releases: tuple[str, str]) -> None:
    ended = reelway("rollout", "start", releases[0], "--run", served.run)
    assert ended.code == 9
    assert "is the one that is live" in ended.err
    assert served.store.latest() is None


def test_a_release_with_a_changed_file_is_refused_before_anything_is_written(
    served: RunWorld, releases: tuple[str, str]
) -> None:
    with (served.run / "releases" / releases[1] / "blend.yaml").open("a") as file:
        file.write("# changed\n")
    ended = reelway("rollout", "start", releases[1], "--run", served.run)
    assert ended.code == 6
    assert served.store.latest() is None


def test_a_second_rollout_is_refused_while_one_is_under_way(served: RunWorld, releases: tuple[str, str]) -> None:
    assert reelway("rollout", "start", releases[1], "--run", served.run).code == 0
    ended = reelway("rollout", "start", releases[1], "--run", served.run, "--force")
    assert ended.code == 9
    assert "is pending" in ended.err


def test_without_a_controller_it_is_accepted_and_the_person_is_told_that_nothing_moves(
    served: RunWorld, releases: tuple[str, str]
) -> None:
    (served.run / "rollout" / "controller.json").unlink()
    ended = reelway("rollout", "start", releases[1], "--run", served.run)
    assert ended.code == 0
    assert "no controller runs" in ended.err
    assert f"reelway rollout controller --run {served.run}" in ended.err


def test_waiting_for_a_good_release_ends_with_0_and_for_a_harmful_one_with_10(
    served: RunWorld, releases: tuple[str, str]
) -> None:
    with controlling(served):
        good = start(served, releases[1], "--wait", "--timeout", 20)
        assert good.code == 0
        assert "promote" in good.err
        served.source.drop = 0.3  # type: ignore[attr-defined]
        back = start(served, releases[0], "--wait", "--timeout", 20)
        assert back.code == 10
        assert "long_watch_rate: harm beyond the margin" in back.err
        assert "is kept warm no longer" in back.err
        again = start(served, releases[0])
        assert again.code == 9
        assert "roll it out again with --force" in again.err


def test_waiting_gives_up_at_its_timeout_with_11_and_leaves_the_rollout_alone(
    served: RunWorld, releases: tuple[str, str]
) -> None:
    served.source.viewers = 60  # type: ignore[attr-defined]
    with controlling(served):
        began = time.monotonic()
        ended = start(served, releases[1], "--wait", "--timeout", 1)
        assert ended.code == 11
        assert time.monotonic() - began < 5
        assert served.state.active


def test_the_release_that_was_promoted_last_is_the_next_ones_stable(
    served: RunWorld, releases: tuple[str, str]
) -> None:
    with controlling(served):
        start(served, releases[1], "--wait", "--timeout", 20)
    start(served, releases[0])
    assert served.state.stable_release == releases[1]


def test_a_drill_holds_no_real_rollout_back_but_its_own_release_stays_refused(
    served: RunWorld, releases: tuple[str, str]
) -> None:
    served.policy = SWIFT
    state = begin_rollout(
        SWIFT, rollout_id="d-20260131-3fa91c", canary_release="c" * 64, stable_release=releases[0], now=served.clock()
    )
    served.store.create(state, SWIFT)
    assert "is pending" in start(served, releases[1]).err
    served.store.ask(state.id, Command(id="1", verb="rollback"))
    served.tick(3, after_s=1)
    assert served.state.phase is Phase.ROLLED_BACK
    assert previous_of(served.store, releases[1]) is None
    assert previous_of(served.store, "c" * 64) == served.store.latest()
    assert start(served, releases[1]).code == 0


def test_waiting_ends_with_12_when_the_rollout_is_paused_for_a_person(
    served: RunWorld, releases: tuple[str, str]
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
