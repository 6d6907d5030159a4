"""One look after the other: what is recorded, what is written to the world, in which order, and what a fault costs."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from tests.benchmarks.canary_events import RELEASE, STABLE
from tests.platform.rollout.made_world import World, moves, newest, nothing

from reelway.platform.contracts.events import Arm
from reelway.platform.errors import RolloutError, StorageError
from reelway.platform.rollout.alerts import KnownAlert
from reelway.platform.rollout.control.controller import Controller
from reelway.platform.rollout.control.sqlite_store import SqliteRolloutStore
from reelway.platform.rollout.state import Command, Phase
from reelway.platform.rollout.traffic.routing import Routing
from reelway.platform.rollout.traffic.target import TrafficObservation, TrafficTarget, target_of


@pytest.fixture
def world(tmp_path: Path) -> World:
    return World(tmp_path)


def stepping(world: World) -> World:
    """At its first step."""
    world.begin()
    assert world.tick(2) == ["prepare", "step"]
    return world


def test_a_good_release_is_promoted_retired_and_the_old_one_removed(world: World) -> None:
    world.begin()
    actions = [action for action in world.tick(40) if action != "wait"]
    assert actions == ["prepare", "step", "step", "step", "promote", "complete_promotion", "retire"]
    assert moves(world.store.history()) == actions
    assert world.state.retired
    assert world.traffic == target_of(world.state)
    assert world.traffic.releases == (RELEASE,)


def test_a_harmful_release_is_rolled_back_and_removed(world: World) -> None:
    stepping(world).source.kind = "harm"
    assert world.tick(3) == ["roll_back", "complete_rollback", "wait"]
    assert world.state.phase is Phase.ROLLED_BACK
    assert (world.traffic.releases, world.traffic.routing.weight_of(Arm.STABLE)) == ((STABLE,), 9_800)
    assert "long_watch_rate" in world.store.history()[-2].reason
    assert world.store.history()[-2].evidence["outcomes"][0]["finding"] == "harm_established"


def test_every_write_is_of_a_state_that_was_recorded_before(world: World) -> None:
    written: list[TrafficTarget] = []

    def check(target: TrafficTarget) -> None:
        assert target == target_of(newest(SqliteRolloutStore(world.store.path)).state)
        written.append(target)

    world.backend.before = check
    world.begin()
    world.tick(40)
    assert len(written) == 6  # preparing, three steps, everybody, the old one removed


def test_nothing_is_written_when_the_record_fails(world: World) -> None:
    stepping(world).source.kind = "harm"

    def full() -> None:
        raise StorageError("disk full")

    world.store.before = full
    before = world.traffic
    with pytest.raises(StorageError):
        world.tick()
    assert world.traffic == before
    world.store.before = nothing
    assert world.tick() == ["roll_back"]
    assert world.traffic.routing.weight_of(Arm.CANARY) == 0


def test_a_write_that_failed_is_done_at_the_next_look(world: World) -> None:
    def refuse(*_: object) -> None:
        raise RolloutError("PUT answered 500")

    world.begin()
    world.tick()
    world.source.kind = "few"
    world.backend.before = refuse
    world.tick()
    assert world.state.canary_bp == 100
    assert world.traffic.routing.weight_of(Arm.CANARY) == 0
    seen = world.store.sighting("r-1")
    assert seen is not None
    assert (seen.traffic["reached"], seen.traffic["trouble"]) == (False, "PUT answered 500")
    world.backend.before = nothing
    assert world.tick() == ["wait"]
    assert world.traffic.routing.weight_of(Arm.CANARY) == 100


@pytest.mark.parametrize("ended", [False, True])
def test_a_hand_edit_is_undone_even_after_the_end(world: World, ended: bool) -> None:
    stepping(world)
    if ended:
        world.source.kind = "errors"
        world.tick(3)
    world.backend.inner.write(TrafficTarget(Routing.whole(RELEASE), (RELEASE,)))
    world.tick()
    assert world.traffic == target_of(world.state)


def test_nothing_is_written_when_the_world_is_as_it_should_be(world: World) -> None:
    stepping(world).source.kind = "few"
    world.backend.before = _never
    assert world.tick(3, after_s=5) == ["wait"] * 3


def test_traffic_that_cannot_be_seen_and_evidence_that_cannot_be_had_hold(world: World) -> None:
    stepping(world).source.kind = "refused"
    world.backend.blind = True
    assert world.tick(2) == ["hold", "wait"]
    assert world.state.phase is Phase.HOLDING
    assert world.traffic.routing.weight_of(Arm.CANARY) == 100
    assert moves(world.store.history()) == ["prepare", "step", "hold"]


def test_a_release_that_fails_to_start_says_why(world: World) -> None:
    world.begin()
    world.tick()
    seen = world.backend.observe
    world.backend.observe = lambda: replace(  # type: ignore[method-assign]
        seen(), ready=frozenset({STABLE}), failed={RELEASE: "no such file videos.arrow"}
    )
    assert world.tick() == ["wait"]
    sighting = world.store.sighting("r-1")
    assert sighting is not None
    assert "no such file videos.arrow" in sighting.reason
    assert set(world.tick(12)) >= {"roll_back"}
    assert "no such file videos.arrow" in world.store.history()[1].reason


def test_a_release_that_the_backend_gave_up_is_taken_back_at_once(world: World) -> None:
    world.begin()
    world.tick()
    seen = world.backend.observe
    world.backend.observe = lambda: replace(  # type: ignore[method-assign]
        seen(), ready=frozenset({STABLE}), failed={RELEASE: "no such file"}, gave_up=frozenset({RELEASE})
    )
    assert world.tick() == ["roll_back"]
    assert world.store.history()[1].reason == "the release cannot start: no such file"


def test_waits_are_remembered_but_make_no_history(world: World) -> None:
    stepping(world).source.kind = "few"
    world.tick(2, after_s=5)
    assert moves(world.store.history()) == ["prepare", "step"]
    assert world.state.phase_s == 10.0


def test_a_refused_command_is_written_down_once(world: World) -> None:
    stepping(world).store.ask("r-1", Command(id="c", verb="resume", actor="ada"))
    world.source.kind = "few"
    world.tick(3, after_s=5)
    assert moves(world.store.history()) == ["prepare", "step", "refuse"]


def test_without_a_rollout_nothing_is_touched(world: World) -> None:
    before = world.backend.inner.path.stat().st_mtime_ns
    assert world.tick(2) == ["-", "-"]
    assert (world.source.asked, world.backend.inner.path.stat().st_mtime_ns) == (0, before)


def test_a_retired_or_rolled_back_rollout_asks_for_no_evidence(world: World) -> None:
    stepping(world).source.kind = "errors"
    world.tick(2)
    asked, version = world.source.asked, newest(world.store).version
    world.tick(3)
    assert (world.source.asked, newest(world.store).version) == (asked, version)


def test_the_newest_rollout_is_the_one_that_counts(world: World) -> None:
    stepping(world).source.kind = "errors"
    world.tick(2)
    world.store.create(
        world.state.model_copy(update={"id": "r-2", "phase": Phase.PENDING, "started_at": world.clock.now}),
        world.policy,
    )
    world.source.kind = "good"
    assert world.tick(2) == ["prepare", "step"]
    assert world.traffic.routing.rollout == "r-2"


# Alerts


def test_a_firing_alert_rolls_back_without_looking_at_anything(world: World) -> None:
    stepping(world)
    asked = world.source.asked
    world.backend.observe = _never  # type: ignore[method-assign]
    world.alert()
    decision = world.controller.react()
    assert decision is not None
    assert (world.state.phase, world.traffic) == (Phase.ROLLING_BACK, target_of(world.state))
    assert world.traffic.routing.weight_of(Arm.CANARY) == 0
    assert "CanaryErrors" in world.store.history()[-1].reason
    assert world.source.asked == asked
    assert world.controller.react() is None  # once


@pytest.mark.parametrize("kind", ["foreign", "resolved", "older than the rollout", "no alert"])
def test_no_other_alert_does_anything(world: World, kind: str) -> None:
    stepping(world)
    if kind == "foreign":
        world.alert(release="f" * 64)
    elif kind == "resolved":
        world.alert()
        world.alert(resolved=True)
    elif kind == "older than the rollout":
        world.alert(starts_at=9_000)
    assert world.controller.react() is None
    world.source.kind = "few"
    assert world.tick() == ["wait"]


def test_an_alert_alone_never_ends_a_rollout_for_want_of_evidence(world: World) -> None:
    """With the guardrail off, a deadline that is over is no reason for the fast path, which looks at no evidence."""
    guardrails = world.policy.guardrails.model_copy(update={"firing_alerts": None})
    world.policy = world.policy.model_copy(update={"guardrails": guardrails})
    world.begin()
    world.tick()
    seen = world.backend.observe
    world.backend.observe = lambda: replace(seen(), ready=frozenset({STABLE}))  # type: ignore[method-assign]
    assert world.tick(9) == ["wait"] * 9
    world.backend.observe = seen  # type: ignore[method-assign]
    world.clock.now += 60  # past the deadline of 300 s, and the release is ready by now
    world.alert()
    assert world.controller.react() is None
    assert world.tick(after_s=0) == ["step"]


def test_a_promoted_release_is_taken_back_while_the_old_one_is_warm(world: World) -> None:
    world.begin()
    while world.state.phase is not Phase.PROMOTED:
        world.tick()
    world.alert()
    assert world.tick(2) == ["complete_rollback", "wait"]
    assert world.traffic.releases == (STABLE,)


def test_a_slow_look_does_not_write_over_a_reaction(world: World) -> None:
    """An alert comes while evidence for a step is being fetched: the step is given up, not applied afterwards."""
    stepping(world)
    fetch = world.source.fetch

    def fetch_slowly(*arguments: object) -> object:
        world.alert()
        assert world.controller.react() is not None
        return fetch(*arguments)  # type: ignore[arg-type]

    world.source.fetch = fetch_slowly  # type: ignore[method-assign, assignment]
    assert world.tick() == ["-"]
    assert world.state.phase is Phase.ROLLING_BACK
    assert world.traffic.routing.weight_of(Arm.CANARY) == 0


def test_what_was_delivered_is_known_after_a_restart(world: World) -> None:
    stepping(world).alert()
    world.restart()
    assert world.tick() == ["complete_rollback"]  # reacted, looked, and saw it done
    assert moves(world.store.history()) == ["prepare", "step", "roll_back", "complete_rollback"]


class Polled:
    """An alert source that a test fills."""

    def __init__(self) -> None:
        self.answer: list[KnownAlert] | None = []

    def poll(self) -> list[KnownAlert]:
        if self.answer is None:
            raise RolloutError("Alertmanager: connection refused")
        return self.answer


def test_a_poll_that_fails_is_a_warning_that_is_said_once(world: World, caplog: pytest.LogCaptureFixture) -> None:
    polled = Polled()
    polled.answer = None
    controller = Controller(world.store, world.backend, world.source, world.book, alert_source=polled)
    with caplog.at_level(logging.INFO):
        assert not controller.poll_alerts()
        assert not controller.poll_alerts()
        polled.answer = []
        controller.poll_alerts()
    assert [record.message for record in caplog.records] == [
        "poll: Alertmanager: connection refused",
        "poll: recovered",
    ]


# The loop


class Running:
    """The loop in a thread, on the real clock."""

    def __init__(self, world: World, *, interval_s: float, alert_source: Polled | None = None) -> None:
        self.stop, self.wake = threading.Event(), threading.Event()
        world.clock = time.time  # type: ignore[assignment]
        self.controller = Controller(
            world.store, world.backend, world.source, world.book, alert_source=alert_source, poll_s=0.05
        )
        self.thread = threading.Thread(target=self.controller.run, args=(self.stop, self.wake, interval_s))

    def __enter__(self) -> Running:
        self.thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop.set()
        self.thread.join(10)
        assert not self.thread.is_alive()


def until(condition: Callable[[], bool], within_s: float = 5.0) -> float:
    """How long it took."""
    began = time.monotonic()
    while not condition():
        assert time.monotonic() - began < within_s, "too late"
        time.sleep(0.002)
    return time.monotonic() - began


def test_a_command_of_another_process_is_noticed_long_before_the_next_look(world: World) -> None:
    world.begin()
    world.source.kind = "few"
    with Running(world, interval_s=60):
        until(lambda: newest(world.store).state.phase is Phase.PREPARING)
        SqliteRolloutStore(world.store.path).ask("r-1", Command(id="c", verb="rollback"))
        assert until(lambda: newest(world.store).state.phase is Phase.ROLLING_BACK) < 1.0


def test_a_delivered_alert_is_acted_upon_while_a_look_hangs(world: World) -> None:
    world.clock.now = time.time()
    stepping(world)
    hangs, goes_on = threading.Event(), threading.Event()

    def observe() -> TrafficObservation:
        hangs.set()
        goes_on.wait(10)
        return world.backend.inner.observe()

    world.backend.observe = observe  # type: ignore[method-assign]
    with Running(world, interval_s=0.05) as running:
        assert hangs.wait(5)
        world.book.deliver([_alert_of(time.time() + 100)])
        running.wake.set()
        took_s = until(lambda: world.traffic.routing.weight_of(Arm.CANARY) == 0)
        goes_on.set()
        until(lambda: newest(world.store).state.phase is Phase.ROLLED_BACK)
    assert took_s < 0.3


def test_a_polled_alert_is_acted_upon_too(world: World) -> None:
    world.clock.now = time.time()
    stepping(world).source.kind = "few"
    polled = Polled()
    with Running(world, interval_s=60, alert_source=polled):
        polled.answer = [_alert_of(time.time() + 100)]
        until(lambda: newest(world.store).state.phase is Phase.ROLLED_BACK)


def test_a_bug_in_a_look_is_written_down_and_does_not_end_the_loop(
    world: World, caplog: pytest.LogCaptureFixture
) -> None:
    world.begin()
    fetch, faults = world.source.fetch, [ValueError("a bug")]

    def fetch_with_a_bug(*arguments: object) -> object:
        if faults:
            raise faults.pop()
        return fetch(*arguments)  # type: ignore[arg-type]

    world.source.fetch = fetch_with_a_bug  # type: ignore[method-assign, assignment]
    with Running(world, interval_s=0.01):
        until(lambda: newest(world.store).state.phase is Phase.STEPPING)
    assert "tick failed with an unexpected error; continuing" in caplog.text


def _alert_of(starts_at: float) -> KnownAlert:
    labels = (("alertname", "CanaryErrors"), ("release", RELEASE))
    return KnownAlert(group_key="polled", labels=labels, starts_at=starts_at, resolved=False)


def _never(*_: object) -> TrafficObservation:
    raise AssertionError("looked")
