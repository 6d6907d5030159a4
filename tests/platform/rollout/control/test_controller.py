"""The controller: what it records and writes, in which order, and how it handles faults."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from tests.support.rollout.canary_events import RELEASE, STABLE
from tests.support.rollout.controller_environment import (
    ControllerEnvironment,
    FakeAlertSource,
    disk_full,
    moves,
    newest,
    nothing,
    stepping,
)

from reelway.platform.contracts.events import Arm
from reelway.platform.errors import RolloutError, StorageError
from reelway.platform.rollout.alerts import KnownAlert
from reelway.platform.rollout.control.controller import Controller
from reelway.platform.rollout.control.sqlite_store import SqliteRolloutStore
from reelway.platform.rollout.state import Command, Phase
from reelway.platform.rollout.traffic.routing import Routing
from reelway.platform.rollout.traffic.target import TrafficObservation, TrafficTarget, traffic_target


@pytest.fixture
def world(tmp_path: Path) -> ControllerEnvironment:
    return ControllerEnvironment(tmp_path)


def test_good_release_is_promoted_until_the_old_one_is_removed(world: ControllerEnvironment) -> None:
    world.begin()
    actions = [action for action in world.tick(40) if action != "wait"]
    assert actions == ["prepare", "step", "step", "step", "promote", "complete_promotion", "retire"]
    assert moves(world.store.history()) == actions
    assert world.state.retired
    assert world.traffic == traffic_target(world.state)
    assert world.traffic.releases == (RELEASE,)


def test_harmful_release_is_rolled_back(world: ControllerEnvironment) -> None:
    stepping(world).source.kind = "harm"
    assert world.tick(3) == ["roll_back", "complete_rollback", "wait"]
    assert world.state.phase is Phase.ROLLED_BACK
    assert (world.traffic.releases, world.traffic.routing.weight_of(Arm.STABLE)) == ((STABLE,), 9_800)
    assert "long_watch_rate" in world.store.history()[-2].reason
    assert world.store.history()[-2].evidence["outcomes"][0]["finding"] == "harm_established"


def test_every_write_follows_its_record(world: ControllerEnvironment) -> None:
    written: list[TrafficTarget] = []

    def check(target: TrafficTarget) -> None:
        assert target == traffic_target(newest(SqliteRolloutStore(world.store.path)).state)
        written.append(target)

    world.backend.before = check
    world.begin()
    world.tick(40)
    assert len(written) == 6  # preparing, three steps, all traffic, the old release removed


def test_failed_record_prevents_the_write(world: ControllerEnvironment) -> None:
    stepping(world)
    world.store.before = disk_full
    before = world.traffic
    with pytest.raises(StorageError):
        world.tick()
    assert world.traffic == before
    world.store.before = nothing
    assert world.tick() == ["step"]


def test_failed_write_is_repeated_on_the_next_reconcile(world: ControllerEnvironment) -> None:
    def refuse(*_: object) -> None:
        raise RolloutError("PUT answered 500")

    world.begin()
    world.tick()
    world.source.kind = "few"
    world.backend.before = refuse
    world.tick()
    assert world.state.canary_bp == 100
    assert world.traffic.routing.weight_of(Arm.CANARY) == 0
    seen = world.store.last_reconcile("r-1")
    assert seen is not None
    assert (seen.traffic["reached"], seen.traffic["trouble"]) == (False, "PUT answered 500")
    world.backend.before = nothing
    assert world.tick() == ["wait"]
    assert world.traffic.routing.weight_of(Arm.CANARY) == 100


@pytest.mark.parametrize("ended", [False, True])
def test_manual_change_is_reverted_even_after_the_rollout(world: ControllerEnvironment, ended: bool) -> None:
    stepping(world)
    if ended:
        world.source.kind = "errors"
        world.tick(3)
    world.backend.inner.write(TrafficTarget(Routing.single_release(RELEASE), (RELEASE,)))
    world.tick()
    assert world.traffic == traffic_target(world.state)


def test_traffic_at_its_target_is_not_written(world: ControllerEnvironment) -> None:
    stepping(world).source.kind = "few"
    world.backend.before = _never
    assert world.tick(3, after_s=5) == ["wait"] * 3


def test_missing_observation_or_evidence_holds_the_rollout(world: ControllerEnvironment) -> None:
    stepping(world).source.kind = "refused"
    world.backend.blind = True
    assert world.tick(2) == ["hold", "wait"]
    assert world.state.phase is Phase.HOLDING
    assert world.traffic.routing.weight_of(Arm.CANARY) == 100
    assert moves(world.store.history()) == ["prepare", "step", "hold"]


def test_reason_says_why_a_release_fails_to_start(world: ControllerEnvironment) -> None:
    world.begin()
    world.tick()
    seen = world.backend.observe
    world.backend.observe = lambda: replace(  # type: ignore[method-assign]
        seen(), ready=frozenset({STABLE}), failed={RELEASE: "no such file videos.arrow"}
    )
    assert world.tick() == ["wait"]
    sighting = world.store.last_reconcile("r-1")
    assert sighting is not None
    assert "no such file videos.arrow" in sighting.reason
    assert set(world.tick(12)) >= {"roll_back"}
    assert "no such file videos.arrow" in world.store.history()[1].reason


def test_release_that_the_backend_gave_up_is_rolled_back(world: ControllerEnvironment) -> None:
    world.begin()
    world.tick()
    seen = world.backend.observe
    world.backend.observe = lambda: replace(  # type: ignore[method-assign]
        seen(), ready=frozenset({STABLE}), failed={RELEASE: "no such file"}, failed_permanently=frozenset({RELEASE})
    )
    assert world.tick() == ["roll_back"]
    assert world.store.history()[1].reason == "the release cannot start: no such file"


def test_waits_are_recorded_without_a_history_entry(world: ControllerEnvironment) -> None:
    stepping(world).source.kind = "few"
    world.tick(2, after_s=5)
    assert moves(world.store.history()) == ["prepare", "step"]
    assert world.state.phase_s == 10.0


def test_rejected_command_is_recorded_once(world: ControllerEnvironment) -> None:
    stepping(world).store.submit_command("r-1", Command(id="c", verb="resume", actor="ada"))
    world.source.kind = "few"
    world.tick(3, after_s=5)
    assert moves(world.store.history()) == ["prepare", "step", "refuse"]


def test_reconcile_without_a_rollout_does_nothing(world: ControllerEnvironment) -> None:
    before = world.backend.inner.path.stat().st_mtime_ns
    assert world.tick(2) == ["-", "-"]
    assert (world.source.asked, world.backend.inner.path.stat().st_mtime_ns) == (0, before)


def test_final_rollout_fetches_no_evidence(world: ControllerEnvironment) -> None:
    stepping(world).source.kind = "errors"
    world.tick(2)
    fetches, version = world.source.asked, newest(world.store).version
    world.tick(3)
    assert (world.source.asked, newest(world.store).version) == (fetches, version)


def test_controller_moves_the_newest_rollout_only(world: ControllerEnvironment) -> None:
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


def test_firing_alert_rolls_back_without_an_observation(world: ControllerEnvironment) -> None:
    stepping(world)
    fetches = world.source.asked
    world.backend.observe = _never  # type: ignore[method-assign]
    world.alert()
    decision = world.controller.react()
    assert decision is not None
    assert (world.state.phase, world.traffic) == (Phase.ROLLING_BACK, traffic_target(world.state))
    assert world.traffic.routing.weight_of(Arm.CANARY) == 0
    assert "CanaryErrors" in world.store.history()[-1].reason
    assert world.source.asked == fetches
    assert world.controller.react() is None  # rolled back once


@pytest.mark.parametrize("kind", ["foreign", "resolved", "older than the rollout", "no alert"])
def test_unrelated_alert_has_no_effect(world: ControllerEnvironment, kind: str) -> None:
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


def test_allowed_alert_does_not_trigger_an_evidence_deadline(world: ControllerEnvironment) -> None:
    """With the guardrail off, an expired deadline does not roll back in ``react``, which fetches no evidence."""
    guardrails = world.policy.guardrails.model_copy(update={"firing_alerts": None})
    world.policy = world.policy.model_copy(update={"guardrails": guardrails})
    world.begin()
    world.tick()
    seen = world.backend.observe
    world.backend.observe = lambda: replace(seen(), ready=frozenset({STABLE}))  # type: ignore[method-assign]
    assert world.tick(9) == ["wait"] * 9
    world.backend.observe = seen  # type: ignore[method-assign]
    world.clock.now += 60  # after the deadline of 300 s, with the release ready
    world.alert()
    assert world.controller.react() is None
    assert world.tick(after_s=0) == ["step"]


def test_promoted_release_is_rolled_back_while_the_old_one_is_warm(world: ControllerEnvironment) -> None:
    world.begin()
    while world.state.phase is not Phase.PROMOTED:
        world.tick()
    world.alert()
    assert world.tick(2) == ["complete_rollback", "wait"]
    assert world.traffic.releases == (STABLE,)


def test_slow_reconcile_does_not_overwrite_a_rollback(world: ControllerEnvironment) -> None:
    """An alert arrives while evidence is fetched: the step of this reconcile is dropped."""
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


def test_delivered_alerts_survive_a_restart(world: ControllerEnvironment) -> None:
    stepping(world).alert()
    world.restart()
    assert world.tick() == ["complete_rollback"]  # rolled back, reconciled, and observed the target
    assert moves(world.store.history()) == ["prepare", "step", "roll_back", "complete_rollback"]


def test_failed_poll_is_logged_once(world: ControllerEnvironment, caplog: pytest.LogCaptureFixture) -> None:
    polled = FakeAlertSource()
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


class RunningController:
    """The controller's loop in a thread, on the real clock."""

    def __init__(
        self, world: ControllerEnvironment, *, interval_s: float, alert_source: FakeAlertSource | None = None
    ) -> None:
        self.stop, self.wake = threading.Event(), threading.Event()
        world.clock = time.time  # type: ignore[assignment]
        self.controller = Controller(
            world.store, world.backend, world.source, world.book, alert_source=alert_source, poll_s=0.05
        )
        self.thread = threading.Thread(target=self.controller.run, args=(self.stop, self.wake, interval_s))

    def __enter__(self) -> RunningController:
        self.thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop.set()
        self.thread.join(10)
        assert not self.thread.is_alive()


def until(condition: Callable[[], bool], within_s: float = 5.0) -> float:
    """Seconds until the condition held."""
    began = time.monotonic()
    while not condition():
        assert time.monotonic() - began < within_s, "too late"
        time.sleep(0.002)
    return time.monotonic() - began


def test_command_of_another_process_triggers_a_reconcile(world: ControllerEnvironment) -> None:
    world.begin()
    world.source.kind = "few"
    with RunningController(world, interval_s=60):
        until(lambda: newest(world.store).state.phase is Phase.PREPARING)
        SqliteRolloutStore(world.store.path).submit_command("r-1", Command(id="c", verb="rollback"))
        assert until(lambda: newest(world.store).state.phase is Phase.ROLLING_BACK) < 1.0


def test_delivered_alert_rolls_back_while_a_reconcile_hangs(world: ControllerEnvironment) -> None:
    world.clock.now = time.time()
    stepping(world)
    hangs, goes_on = threading.Event(), threading.Event()

    def observe() -> TrafficObservation:
        hangs.set()
        goes_on.wait(10)
        return world.backend.inner.observe()

    world.backend.observe = observe  # type: ignore[method-assign]
    with RunningController(world, interval_s=0.05) as running:
        assert hangs.wait(5)
        world.book.deliver([_alert_of(time.time() + 100)])
        running.wake.set()
        took_s = until(lambda: world.traffic.routing.weight_of(Arm.CANARY) == 0)
        goes_on.set()
        until(lambda: newest(world.store).state.phase is Phase.ROLLED_BACK)
    assert took_s < 0.3


def test_polled_alert_rolls_back(world: ControllerEnvironment) -> None:
    world.clock.now = time.time()
    stepping(world).source.kind = "few"
    polled = FakeAlertSource()
    with RunningController(world, interval_s=60, alert_source=polled):
        polled.answer = [_alert_of(time.time() + 100)]
        until(lambda: newest(world.store).state.phase is Phase.ROLLED_BACK)


def test_unexpected_error_does_not_end_the_loop(world: ControllerEnvironment, caplog: pytest.LogCaptureFixture) -> None:
    world.begin()
    fetch, faults = world.source.fetch, [ValueError("a bug")]

    def fetch_with_a_bug(*arguments: object) -> object:
        if faults:
            raise faults.pop()
        return fetch(*arguments)  # type: ignore[arg-type]

    world.source.fetch = fetch_with_a_bug  # type: ignore[method-assign, assignment]
    with RunningController(world, interval_s=0.01):
        until(lambda: newest(world.store).state.phase is Phase.STEPPING)
    assert "tick failed with an unexpected error; continuing" in caplog.text


def _alert_of(starts_at: float) -> KnownAlert:
    labels = (("alertname", "CanaryErrors"), ("release", RELEASE))
    return KnownAlert(group_key="polled", labels=labels, starts_at=starts_at, resolved=False)


def _never(*_: object) -> TrafficObservation:
    raise AssertionError("looked")
