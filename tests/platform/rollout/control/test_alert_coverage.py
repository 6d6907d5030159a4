"""Alerts that may be missing hold a rollout, and clocks decide nothing about them."""

from __future__ import annotations

from pathlib import Path

import pytest
from tests.support.rollout.canary_events import RELEASE
from tests.support.rollout.controller_environment import ControllerEnvironment, FakeAlertSource, firing, stepping

from reelway.platform.rollout.alerts import omission
from reelway.platform.rollout.control.controller import Controller
from reelway.platform.rollout.state import Phase


@pytest.fixture
def world(tmp_path: Path) -> ControllerEnvironment:
    return ControllerEnvironment(tmp_path)


def polling(world: ControllerEnvironment) -> tuple[Controller, FakeAlertSource]:
    source = FakeAlertSource()
    controller = Controller(
        world.store, world.backend, world.source, world.book, alert_source=source, clock=world.clock
    )
    world.controller = controller
    return controller, source


def test_cut_poll_holds_the_rollout_until_a_complete_one(world: ControllerEnvironment) -> None:
    stepping(world)
    controller, polled = polling(world)
    polled.problem = "Alertmanager: the answer was cut"
    assert not controller.poll_alerts()
    assert world.tick() == ["hold"]
    assert "telemetry down: firing_alerts: telemetry down (Alertmanager: the answer was cut)" in world.state.reason
    polled.problem = ""
    controller.poll_alerts()
    assert world.tick() == ["step"]


def test_alert_of_a_cut_poll_rolls_back(world: ControllerEnvironment) -> None:
    stepping(world)
    controller, polled = polling(world)
    polled.answer, polled.problem = [firing(RELEASE, world.clock.now)], "Alertmanager: the answer was cut"
    assert controller.poll_alerts()
    assert world.tick() == ["complete_rollback"]


def test_silent_alertmanager_holds_the_rollout_when_its_answer_is_old(world: ControllerEnvironment) -> None:
    stepping(world).source.kind = "few"
    controller, polled = polling(world)
    polled.answer = None
    controller.poll_alerts()
    assert world.tick(after_s=world.policy.evidence_max_age_s) != ["hold"]
    assert world.tick(after_s=1) == ["hold"]
    assert "no complete answer of Alertmanager for 121 s, allowed 120 s (Alertmanager: connection" in world.state.reason


def test_truncated_delivery_holds_the_rollout(world: ControllerEnvironment) -> None:
    stepping(world)
    controller, _ = polling(world)
    world.book.deliver([omission("{}:{}", 3)])
    assert world.tick() == ["hold"]
    assert controller._metrics.failures.labels("alerts")._value.get() == 1
    assert "a delivery lacked 3 alerts of the group {}:{}" in world.state.reason
    world.book.deliver([omission("{}:{}", 0)])
    assert world.tick() == ["step"]


@pytest.mark.parametrize("skew_s", [-45.0, 0.0, 45.0])
def test_skewed_clock_of_prometheus_hides_no_alert(world: ControllerEnvironment, skew_s: float) -> None:
    stepping(world).source.kind = "few"
    world.alert(starts_at=world.state.started_at + 1 + skew_s)
    assert world.controller.react() is not None
    assert world.state.phase is Phase.ROLLING_BACK


def test_alert_of_an_earlier_rollout_does_not_end_a_retry(world: ControllerEnvironment) -> None:
    stepping(world).alert()
    world.tick(2)
    assert world.state.phase is Phase.ROLLED_BACK
    world.store.create(
        world.state.model_copy(update={"id": "r-2", "phase": Phase.PENDING, "started_at": world.clock.now, "step": -1}),
        world.policy,
    )
    world.source.kind = "few"
    world.alert(starts_at=10_060)  # Alertmanager repeats it
    world.restart()
    world.alert(starts_at=10_060)
    assert world.tick(2) == ["prepare", "step"]
    world.alert(starts_at=world.clock.now)  # it fires again
    assert world.tick() == ["complete_rollback"]
