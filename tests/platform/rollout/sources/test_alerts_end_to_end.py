"""Alert rule, Prometheus, Alertmanager, webhook and rollback with real servers and simulated traffic."""

from __future__ import annotations

import json
import re
import socket
import threading
from collections.abc import Iterator, Mapping
from contextlib import closing, contextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path

import httpx
import pytest
from tests.support.rollout.controller_environment import FileBackend
from tests.support.rollout.exporter import Exporter
from tests.support.rollout.observed_rollout import QUICK, ObservedRollout
from tests.support.rollout.servers import Server, alertmanager, eventually, free_address

from reelway.platform.contracts.events import Arm
from reelway.platform.errors import RolloutError
from reelway.platform.rollout.alerts import names_one_of
from reelway.platform.rollout.control.alert_registry import AlertRegistry
from reelway.platform.rollout.control.controller import Controller
from reelway.platform.rollout.control.controller_metrics import ControllerMetrics
from reelway.platform.rollout.control.sqlite_store import SqliteRolloutStore
from reelway.platform.rollout.control.webhook import ALERTS_PATH, serve_in_thread, webhook_application
from reelway.platform.rollout.policy import Guardrails
from reelway.platform.rollout.sources import alert_source
from reelway.platform.rollout.state import Phase, RolloutState
from reelway.platform.rollout.traffic.target import traffic_target

TOKEN = "0123456789abcdef"
ONLY_ALERTS = QUICK.model_copy(
    update={
        "guardrails": Guardrails(error_ratio=None, empty_slate_ratio=None, p99_ms=None, parity_mismatches=None),
    }
)


@contextmanager
def failing(exporter: Exporter) -> Iterator[None]:
    """A canary with 50 % failed requests next to a stable release with a few."""
    over = threading.Event()

    def requests() -> None:
        while not over.wait(0.1):
            exporter.count(Arm.CANARY, times=10)
            exporter.count(Arm.CANARY, "failed", times=10)
            exporter.count(Arm.STABLE, "failed", times=50)

    thread = threading.Thread(target=requests)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()


@contextmanager
def running(controller: Controller, wake: threading.Event) -> Iterator[None]:
    stop = threading.Event()
    thread = threading.Thread(target=controller.run, args=(stop, wake, 0.5))
    thread.start()
    try:
        yield
    finally:
        stop.set()
        wake.set()
        thread.join()


def test_alertmanager_webhook_rolls_back_a_faulty_canary(watched: ObservedRollout, tmp_path: Path) -> None:
    state = watched.state.model_copy(update={"phase": Phase.STEPPING, "step": 0, "canary_bp": 500})
    backend = FileBackend(tmp_path / "traffic.json")
    backend.apply(traffic_target(state))
    wake, metrics = threading.Event(), ControllerMetrics()
    with closing(SqliteRolloutStore(tmp_path / "state.db")) as store:
        store.create(state, ONLY_ALERTS)
        registry = AlertRegistry(store)
        controller = Controller(store, backend, watched.through, registry)
        application = webhook_application(registry, wake.set, TOKEN, metrics)

        def newest() -> RolloutState:
            rollout = store.latest()
            assert rollout is not None
            return rollout.state

        with (
            serve_in_thread(application, "127.0.0.1", 0) as url,
            alertmanager(tmp_path, watched.monitoring.alertmanager, url + ALERTS_PATH, TOKEN) as manager,
            running(controller, wake),
            failing(watched.exporter),
        ):
            after = eventually(lambda: s if (s := newest()).phase is Phase.ROLLED_BACK else None, within_s=20)
            assert "guardrail: alerts firing for the release: ReelwayCanaryErrors" in after.reason
            assert backend.read().routing.weight_of(Arm.CANARY) == 0
            assert re.search(rb'webhooks_total{outcome="stored"} [1-9]', metrics.render())
            with closing(alert_source(manager.url)) as source:
                [polled] = source.poll(names_one_of({state.canary_release})).alerts
        [delivered] = store.alerts().values()
    assert (polled.labels, polled.resolved) == (delivered.labels, False)
    assert polled.starts_at == pytest.approx(delivered.starts_at, abs=1e-3)
    assert dict(polled.labels)["release"] == watched.canary[:12]
    assert "of the requests to release" in delivered.summary


# Polling


def anything(labels: Mapping[str, str]) -> bool:
    return bool(labels)


@pytest.fixture(scope="module")
def manager(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("alertmanager")
    with alertmanager(folder, free_address(), "http://127.0.0.1:1/", TOKEN) as started:
        yield started


def test_poll_returns_active_alerts_with_a_release_only(manager: Server) -> None:
    now = datetime.now(UTC)

    def alert(name: str, ends_after_s: float = 600, **labels: str) -> dict[str, object]:
        ends = now + timedelta(seconds=ends_after_s)
        return {"labels": {"alertname": name, **labels}, "startsAt": now.isoformat(), "endsAt": ends.isoformat()}

    silence = {
        "matchers": [{"name": "alertname", "value": "Silenced", "isRegex": False, "isEqual": True}],
        "startsAt": now.isoformat(), "endsAt": (now + timedelta(hours=1)).isoformat(), "createdBy": "t", "comment": "t",
    }  # fmt: skip
    alerts = [
        alert("Firing", release="abc"), alert("Silenced", release="abc"), alert("Foreign"),
        alert("Over", 0.2, release="abc"),
    ]  # fmt: skip
    httpx.post(f"{manager.url}/api/v2/silences", json=silence).raise_for_status()
    httpx.post(f"{manager.url}/api/v2/alerts", json=alerts).raise_for_status()
    with closing(alert_source(manager.url + "/")) as source:
        [found] = eventually(lambda: seen if len(seen := source.poll(anything).alerts) == 1 else None)
    assert found.labels == (("alertname", "Firing"), ("release", "abc"))
    assert found.starts_at == pytest.approx(now.timestamp(), abs=1e-3)
    assert not found.resolved


@pytest.mark.parametrize(
    ("status", "body", "message"),
    [
        (200, b"<html>", "expected an answer of API v2"),
        (200, b"{}", "saw dict, expected a list"),
        (200, b'[{"labels": {}}]', "is not an alert of API v2"),
    ],
)
def test_invalid_answer_of_a_poll_counts_as_cut(status: int, body: bytes, message: str) -> None:
    page = Exporter("", "")
    page.answer = {"/api/v2/alerts": (status, body)}
    try:
        with closing(alert_source(f"http://{page.address}")) as source:
            polled = source.poll(anything)
            assert (polled.alerts, message in polled.problem) == ((), True), polled.problem
            page.answer = {"/api/v2/alerts": (500, b"[]")}
            with pytest.raises(RolloutError, match="500"):
                source.poll(anything)
    finally:
        page.stop()


def test_poll_raises_when_alertmanager_is_down() -> None:
    with (
        closing(alert_source(f"http://{free_address()}")) as source,
        pytest.raises(RolloutError, match="no alerts from Alertmanager at"),
    ):
        source.poll(anything)


def test_alerts_before_the_end_of_a_cut_answer_are_known() -> None:
    """The server promises more bytes than it sends, as one that is killed does."""
    alert = {"labels": {"release": "abc"}, "startsAt": "2026-01-02T03:04:05.000Z", "status": {"state": "active"}}
    other = {**alert, "labels": {"release": "def"}}
    sent = json.dumps([other] * 2_000 + [alert])[:-1].encode()
    with socket.create_server(("127.0.0.1", 0)) as listening:

        def answer_once() -> None:
            connection, _ = listening.accept()
            with connection:
                connection.recv(1 << 16)
                connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n%b" % (len(sent) + 9, sent))

        thread = threading.Thread(target=answer_once)
        thread.start()
        with closing(alert_source(f"http://127.0.0.1:{listening.getsockname()[1]}")) as source:
            polled = source.poll(lambda labels: labels.get("release") == "abc")
        thread.join()
    assert [dict(one.labels) for one in polled.alerts] == [{"release": "abc"}]
    assert f"the answer was cut after {len(sent)} bytes" in polled.problem


def test_poll_of_thousands_of_alerts_is_complete(manager: Server) -> None:
    ends = (datetime.now(UTC) + timedelta(hours=1)).isoformat()
    alerts = [{"labels": {"alertname": "Many", "release": f"{i:064}"}, "endsAt": ends} for i in range(3_000)]
    httpx.post(f"{manager.url}/api/v2/alerts", json=alerts, timeout=30).raise_for_status()
    wanted = names_one_of({f"{2_999:064}"})
    with closing(alert_source(manager.url)) as source:
        polled = eventually(lambda: seen if (seen := source.poll(wanted)).alerts else None)
    assert (len(polled.alerts), polled.problem) == (1, "")
