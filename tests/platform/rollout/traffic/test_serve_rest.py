"""Backend and controller on a real Ray Serve: deployments, routing and the duration of a rollback.

The module has one service; each test continues from the state of the previous one.
"""

from __future__ import annotations

import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import httpx
import pytest
from tests.support.rollout.controller_environment import ScriptedEvidence, newest
from tests.support.rollout.webhook_requests import RIGHT, TOKEN, payload

from reelway.platform.contracts.events import Arm
from reelway.platform.rollout.control.alert_registry import AlertRegistry
from reelway.platform.rollout.control.controller import Controller
from reelway.platform.rollout.control.controller_metrics import ControllerMetrics
from reelway.platform.rollout.control.sqlite_store import SqliteRolloutStore
from reelway.platform.rollout.control.webhook import ALERTS_PATH, serve_in_thread, webhook_application
from reelway.platform.rollout.decision import start_state
from reelway.platform.rollout.policy import parse_policy
from reelway.platform.rollout.state import Phase, RolloutState
from reelway.platform.rollout.traffic.bucketing import bucket_of
from reelway.platform.rollout.traffic.routing import Routing
from reelway.platform.rollout.traffic.serve_rest import ServeRestBackend
from reelway.platform.rollout.traffic.target import TrafficTarget, traffic_target
from reelway.platform.run_directory import RunDirectory

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.long, pytest.mark.timeout(300)]

HALF = parse_policy(
    "{steps: [{weight_percent: 40, hold_s: 3600}], outcomes: [{name: long_watch_rate, margin: 0.05}]}", source="half"
)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunDirectory]:
    folder = tmp_path_factory.mktemp("run")
    command = [sys.executable, "-m", "tests.support.rollout.noop_service", str(folder)]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    try:
        assert process.stdout.readline() == "running\n"
        yield RunDirectory(folder)
    finally:
        process.communicate(timeout=60)


@pytest.fixture(scope="module")
def backend(run: RunDirectory) -> Iterator[ServeRestBackend]:
    rest_backend = ServeRestBackend(run)
    yield rest_backend
    rest_backend.close()


def target(canary: str = "new", phase: Phase = Phase.STEPPING, **more: Any) -> TrafficTarget:
    state = RolloutState(
        id="r-1",
        stable_release="old",
        canary_release=canary,
        phase=phase,
        started_at=0,
        changed_at=0,
        tick_at=0,
        salt="one for all states of the rollout",
        **more,
    )
    return traffic_target(state)


def until(condition: Callable[[], bool], within_s: float = 60.0) -> None:
    deadline = time.monotonic() + within_s
    while not condition():
        assert time.monotonic() < deadline, "timeout"
        time.sleep(0.02)


def replicas(backend: ServeRestBackend) -> dict[str, str]:
    """Returns the replica ids of the deployments that do not belong to a release."""
    record = backend._read_serving_record()
    observed = backend._call("GET", record, None).json()["applications"]
    return {name: observed[name]["deployments"][kind]["replicas"][0]["replica_id"]
            for name, kind in (("router", "Router"), ("outcomes", "Outcomes"))}  # fmt: skip


def test_canary_deploys_and_leaves_without_restarting_replicas(
    backend: ServeRestBackend,
) -> None:
    assert backend.observe().routing == Routing.single_release("old")
    before = replicas(backend)
    backend.apply(target(phase=Phase.PREPARING))
    until(lambda: backend.observe().ready == {"old", "new"})
    for weight in (500, 2_500, 0):
        backend.apply(target(canary_bp=weight))
        until(lambda weight=weight: backend.observe().routing == target(canary_bp=weight).routing)  # type: ignore[misc]
    backend.apply(target(phase=Phase.ROLLED_BACK))
    until(lambda: backend.observe().releases == ("old",))
    until(lambda: backend.observe().routing == target(phase=Phase.ROLLED_BACK).routing)
    assert replicas(backend) == before


def test_failed_release_is_reported_with_serves_reason(backend: ServeRestBackend) -> None:
    backend.apply(target("broken", Phase.PREPARING))
    until(lambda: "broken" in backend.observe().failed_permanently)
    observed = backend.observe()
    assert "no such file videos.arrow" in observed.failed["broken"]
    assert "old" in observed.ready
    assert "broken" not in observed.ready
    backend.apply(target("broken", Phase.ROLLED_BACK))
    until(lambda: backend.observe().releases == ("old",))


@dataclass
class BackgroundLoad:
    """Sends requests without pause, each for a new viewer, and records the responses."""

    url: str
    stop: threading.Event = field(default_factory=threading.Event)
    answers: list[tuple[float, int, int, str]] = field(default_factory=list)
    """Time of the request (``time.monotonic``), viewer, status and arm."""

    def run(self, first: int) -> None:
        viewer = first
        with httpx.Client(base_url=self.url, timeout=10, trust_env=False) as client:
            while not self.stop.is_set():
                asked = time.monotonic()
                answer = client.get("/", params={"viewer": viewer})
                arm = answer.json()["arm"] if answer.status_code == 200 else answer.text
                self.answers.append((asked, viewer, answer.status_code, arm))
                viewer += 4


def test_alert_rolls_back_within_a_second_without_a_failed_request(
    run: RunDirectory, backend: ServeRestBackend, capsys: pytest.CaptureFixture[str]
) -> None:
    store = SqliteRolloutStore(run.path / "rollout" / "state.db")
    alerts, stop, wake, metrics = AlertRegistry(store), threading.Event(), threading.Event(), ControllerMetrics()
    controller = Controller(store, backend, ScriptedEvidence("few"), alerts, metrics=metrics)
    rollout = start_state(HALF, rollout_id="r-2", canary_release="c" * 64, stable_release="old", now=time.time() - 1)
    store.create(rollout, HALF)
    load = BackgroundLoad(backend._read_serving_record().internal_url)
    threads = [threading.Thread(target=load.run, args=(first,)) for first in range(4)]
    threads.append(threading.Thread(target=controller.run, args=(stop, wake)))
    try:
        with serve_in_thread(webhook_application(alerts, wake.set, TOKEN, metrics), "127.0.0.1", 0) as url:
            for thread in threads:
                thread.start()
            until(lambda: sum(arm == "canary" for *_, arm in load.answers) > 20)
            alert = payload(release="c" * 64, starts_at=time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()))
            sent = time.monotonic()
            assert httpx.post(url + ALERTS_PATH, json=alert, headers=RIGHT).status_code == 200
            until(lambda: newest(store).state.phase is Phase.ROLLED_BACK)
            until(lambda: backend.observe().releases == ("old",))
            time.sleep(0.5)  # requests continue while the release is removed
    finally:
        load.stop.set()
        stop.set()
        for thread in threads:
            thread.join(30)
    last = max(asked for asked, *_, arm in load.answers if arm == "canary")
    with capsys.disabled():
        print(f"\nlast request to the canary: {1000 * (last - sent):.0f} ms after the alert")
    assert {status for _, _, status, _ in load.answers} == {200}
    assert last - sent < 1.0
    assert len(load.answers) > 200
    assert all(bucket_of(viewer, rollout.salt) < 4_000 for _, viewer, _, arm in load.answers if arm == Arm.CANARY.value)
