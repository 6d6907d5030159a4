"""Real Ray Serve under the backend and the controller: what runs, who is asked, and how long a way back takes.

One service for the module; the tests go on from each other's state.
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
from tests.platform.rollout.control.test_webhook import RIGHT, TOKEN, payload
from tests.platform.rollout.made_world import NamedEvidence, newest

from reelway.platform.contracts.events import Arm
from reelway.platform.rollout.control.alert_book import AlertBook
from reelway.platform.rollout.control.controller import Controller
from reelway.platform.rollout.control.controller_metrics import ControllerMetrics
from reelway.platform.rollout.control.sqlite_store import SqliteRolloutStore
from reelway.platform.rollout.control.webhook import ALERTS_PATH, serving, webhook_application
from reelway.platform.rollout.decision import start
from reelway.platform.rollout.policy import parse_policy
from reelway.platform.rollout.state import Phase, RolloutState
from reelway.platform.rollout.traffic.bucketing import bucket_of
from reelway.platform.rollout.traffic.routing import Routing
from reelway.platform.rollout.traffic.serve_rest import ServeRestBackend
from reelway.platform.rollout.traffic.target import TrafficTarget, target_of
from reelway.platform.runs import RunDirectory

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.long, pytest.mark.timeout(300)]

HALF = parse_policy(
    "{steps: [{weight_percent: 40, hold_s: 3600}], outcomes: [{name: long_watch_rate, margin: 0.05}]}", source="half"
)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunDirectory]:
    folder = tmp_path_factory.mktemp("run")
    command = [sys.executable, "-m", "tests.platform.rollout.traffic.noop_service", str(folder)]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    try:
        assert process.stdout.readline() == "running\n"
        yield RunDirectory(folder)
    finally:
        process.communicate(timeout=60)


@pytest.fixture(scope="module")
def backend(run: RunDirectory) -> Iterator[ServeRestBackend]:
    found = ServeRestBackend(run)
    yield found
    found.close()


def target(canary: str = "new", phase: Phase = Phase.STEPPING, **more: Any) -> TrafficTarget:
    state = RolloutState(
        id="r-1",
        stable_release="old",
        canary_release=canary,
        phase=phase,
        started_at=0,
        changed_at=0,
        tick_at=0,
        **more,
    )
    return target_of(state)


def until(condition: Callable[[], bool], within_s: float = 60.0) -> None:
    deadline = time.monotonic() + within_s
    while not condition():
        assert time.monotonic() < deadline, "too late"
        time.sleep(0.02)


def replicas(backend: ServeRestBackend) -> dict[str, str]:
    """Deployment -> the replica's id, of what is no release."""
    place = backend._place()
    seen = backend._call("GET", place, None).json()["applications"]
    return {name: seen[name]["deployments"][kind]["replicas"][0]["replica_id"]
            for name, kind in (("router", "Router"), ("outcomes", "Outcomes"))}  # fmt: skip


def test_a_release_comes_beside_takes_a_share_and_goes_without_restarting_anything(
    backend: ServeRestBackend,
) -> None:
    assert backend.observe().routing == Routing.whole("old")
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


def test_a_release_that_cannot_start_is_failed_with_serves_reason_and_stable_stays(backend: ServeRestBackend) -> None:
    backend.apply(target("broken", Phase.PREPARING))
    until(lambda: "broken" in backend.observe().gave_up)
    seen = backend.observe()
    assert "no such file videos.arrow" in seen.failed["broken"]
    assert "old" in seen.ready
    assert "broken" not in seen.ready
    backend.apply(target("broken", Phase.ROLLED_BACK))
    until(lambda: backend.observe().releases == ("old",))


@dataclass
class Load:
    """Asks without pause, a new viewer each time, and writes down what was answered to whom and when."""

    url: str
    stop: threading.Event = field(default_factory=threading.Event)
    answers: list[tuple[float, int, int, str]] = field(default_factory=list)
    """When it was asked (``time.monotonic``), the viewer, the status, the arm."""

    def run(self, first: int) -> None:
        viewer = first
        with httpx.Client(base_url=self.url, timeout=10, trust_env=False) as client:
            while not self.stop.is_set():
                asked = time.monotonic()
                answer = client.get("/", params={"viewer": viewer})
                arm = answer.json()["arm"] if answer.status_code == 200 else answer.text
                self.answers.append((asked, viewer, answer.status_code, arm))
                viewer += 4


def test_an_alert_at_the_webhook_has_everybody_on_stable_within_a_second_and_no_request_fails(
    run: RunDirectory, backend: ServeRestBackend, capsys: pytest.CaptureFixture[str]
) -> None:
    store = SqliteRolloutStore(run.path / "rollout" / "state.db")
    book, stop, wake, metrics = AlertBook(store), threading.Event(), threading.Event(), ControllerMetrics()
    controller = Controller(store, backend, NamedEvidence("few"), book, metrics=metrics)
    rollout = start(HALF, rollout_id="r-2", canary_release="c" * 64, stable_release="old", now=time.time() - 1)
    store.create(rollout, HALF)
    load = Load(backend._place().url)
    threads = [threading.Thread(target=load.run, args=(first,)) for first in range(4)]
    threads.append(threading.Thread(target=controller.run, args=(stop, wake)))
    try:
        with serving(webhook_application(book, wake.set, TOKEN, metrics), "127.0.0.1", 0) as url:
            for thread in threads:
                thread.start()
            until(lambda: sum(arm == "canary" for *_, arm in load.answers) > 20)
            alert = payload(release="c" * 64, starts_at=time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()))
            sent = time.monotonic()
            assert httpx.post(url + ALERTS_PATH, json=alert, headers=RIGHT).status_code == 200
            until(lambda: newest(store).state.phase is Phase.ROLLED_BACK)
            until(lambda: backend.observe().releases == ("old",))
            time.sleep(0.5)  # and requests go on while the release is taken away
    finally:
        load.stop.set()
        stop.set()
        for thread in threads:
            thread.join(30)
    last = max(asked for asked, *_, arm in load.answers if arm == "canary")
    with capsys.disabled():
        print(f"\nwebhook -> last request answered by the canary was asked {1000 * (last - sent):.0f} ms later")
    assert {status for _, _, status, _ in load.answers} == {200}
    assert last - sent < 1.0
    assert len(load.answers) > 200
    assert all(bucket_of(viewer, "r-2") < 4_000 for _, viewer, _, arm in load.answers if arm == Arm.CANARY.value)
