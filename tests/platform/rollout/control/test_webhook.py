"""The webhook over a real socket: valid deliveries and invalid requests."""

from __future__ import annotations

import json
import socket
import stat
import threading
import tracemalloc
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest
from tests.support.rollout.webhook_requests import RELEASE, RIGHT, TOKEN, payload

from reelway.platform.errors import ConfigError, StorageError
from reelway.platform.rollout.alert_stream import MAX_RELEVANT, WebhookStream
from reelway.platform.rollout.alerts import KnownAlert, PolledAlerts, names_one_of
from reelway.platform.rollout.control.alert_registry import AlertRegistry
from reelway.platform.rollout.control.bearer_token import ensure_bearer_token
from reelway.platform.rollout.control.controller_metrics import ControllerMetrics
from reelway.platform.rollout.control.sqlite_store import SqliteRolloutStore
from reelway.platform.rollout.control.webhook import ALERTS_PATH, BODY_LIMIT_BYTES, serve_in_thread, webhook_application
from reelway.platform.rollout.policy import default_policy
from reelway.platform.rollout.state import RolloutState

ROLLOUT = RolloutState(id="r-1", stable_release="5" * 64, canary_release=RELEASE, started_at=0, changed_at=0, tick_at=0)


@dataclass
class WebhookServer:
    url: str
    store: SqliteRolloutStore
    alerts: AlertRegistry
    woken: threading.Event
    metrics: ControllerMetrics

    def post(self, content: Any, **headers: str) -> httpx.Response:
        body = content if isinstance(content, bytes) else json.dumps(content).encode()
        return httpx.post(self.url + ALERTS_PATH, content=body, headers=RIGHT | headers, timeout=10)

    def counted(self, outcome: str) -> float:
        return self.metrics.webhooks.labels(outcome)._value.get()


@pytest.fixture
def server(tmp_path: Path) -> Iterator[WebhookServer]:
    store = SqliteRolloutStore(tmp_path / "state.db")
    store.create(ROLLOUT, default_policy())
    alerts, woken, metrics = AlertRegistry(store), threading.Event(), ControllerMetrics()
    with serve_in_thread(webhook_application(alerts, woken.set, TOKEN, metrics), "127.0.0.1", 0) as url:
        yield WebhookServer(url, store, alerts, woken, metrics)


def test_delivery_is_stored_before_its_answer(server: WebhookServer) -> None:
    answer = server.post(payload())
    assert (answer.status_code, answer.json()) == (200, {"alerts": 1, "relevant": 1, "changed": True})
    other = AlertRegistry(SqliteRolloutStore(server.store.path))
    assert [alert.name for alert in other.firing_for(ROLLOUT)] == ["CanaryErrors"]
    assert server.woken.is_set()


def test_repeated_delivery_changes_nothing(server: WebhookServer) -> None:
    server.post(payload())
    server.woken.clear()
    before = server.store.revision()
    assert server.post(payload()).json()["changed"] is False
    assert (server.store.revision(), server.woken.is_set(), server.counted("known")) == (before, False, 1)


def test_resolved_alert_wins_in_either_order(server: WebhookServer) -> None:
    server.post(payload(status="resolved"))
    server.post(payload())
    assert server.alerts.firing_for(ROLLOUT) == ()


def test_alert_without_a_release_is_accepted_but_not_stored(server: WebhookServer) -> None:
    assert server.post(payload(release=None)).json() == {"alerts": 1, "relevant": 0, "changed": False}


@pytest.mark.parametrize("authorization", ["", "Bearer", "Bearer wrong", f"Basic {TOKEN}", f"Bearer {TOKEN}x", TOKEN])
def test_request_without_the_token_is_rejected(server: WebhookServer, authorization: str) -> None:
    answer = server.post(payload(), Authorization=authorization)
    assert (answer.status_code, answer.headers["www-authenticate"]) == (401, "Bearer")
    assert server.alerts.firing_for(ROLLOUT) == ()
    assert server.counted("unauthorized") == 1


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"{", "not JSON"),
        (b"\xff\xfe", "not JSON"),
        (b"[" * 100_000, "not JSON"),
        ({**payload(), "version": "5"}, "version: "),
        ({**payload(), "alerts": [{**payload()["alerts"][0], "startsAt": "yesterday"}]}, "alerts.0.startsAt: "),
    ],
)
def test_malformed_body_error_names_the_field(server: WebhookServer, content: Any, message: str) -> None:
    answer = server.post(content)
    assert answer.status_code == 400
    assert message in answer.json()["error"]
    assert not server.woken.is_set()


def test_body_with_too_large_a_content_length_is_not_read(server: WebhookServer) -> None:
    host, port = server.url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=10) as connection:
        head = f"POST {ALERTS_PATH} HTTP/1.1\r\nHost: h\r\nAuthorization: Bearer {TOKEN}\r\n"
        connection.sendall(f"{head}Content-Length: {1 << 40}\r\n\r\nonly the beginning".encode())
        assert connection.recv(4096).startswith(b"HTTP/1.1 413 ")


def test_body_without_a_content_length_is_read_up_to_the_limit(server: WebhookServer) -> None:
    sent = 0

    def chunks() -> Iterator[bytes]:
        nonlocal sent
        for _ in range(4000):
            sent += 1 << 16
            yield b" " * (1 << 16)

    try:
        answer = httpx.post(server.url + ALERTS_PATH, content=chunks(), headers=RIGHT, timeout=60)
        assert answer.status_code == 413
    except httpx.NetworkError:
        pass  # the server closed the connection during the request
    assert server.counted("too_long") == 1
    assert sent < 2 * BODY_LIMIT_BYTES


def test_failed_storage_is_answered_with_503(server: WebhookServer) -> None:
    server.store._file.connection.execute("PRAGMA query_only = 1")
    answer = server.post(payload())
    assert answer.status_code == 503
    assert server.woken.is_set(), "a rollback does not wait for the store"
    assert [alert.name for alert in server.alerts.firing_for(ROLLOUT)] == ["CanaryErrors"]
    assert server.post(payload()).status_code == 503, "a known alert is not acknowledged before it is stored"
    server.store._file.connection.execute("PRAGMA query_only = 0")
    assert server.post(payload()).json()["changed"] is True
    assert AlertRegistry(SqliteRolloutStore(server.store.path)).firing_for(ROLLOUT)


def many(foreign: int, *, at: int, padding: str = "") -> Any:
    """A delivery with one alert of the rollout's release among others."""
    ours = payload()["alerts"][0]
    labels = {"alertname": "Node", "namespace": "infra"}
    other = {**ours, "labels": labels, "annotations": {"description": padding}}
    alerts: list[Any] = [
        {**other, "labels": {**labels, "release": f"{i:064}"}} if i % 2 else other for i in range(foreign)
    ]
    return {**payload(), "alerts": [*alerts[:at], ours, *alerts[at:]]}


@pytest.mark.parametrize(
    ("foreign", "at", "padding"), [(1_000, 1_000, ""), (20_000, 19_999, "x" * 300), (12_000, 0, "é")]
)
def test_alert_is_found_among_any_number_of_others(server: WebhookServer, foreign: int, at: int, padding: str) -> None:
    answer = server.post(many(foreign, at=at, padding=padding))
    assert (answer.status_code, answer.json()) == (200, {"alerts": foreign + 1, "relevant": 1, "changed": True})
    assert [alert.name for alert in server.alerts.firing_for(ROLLOUT)] == ["CanaryErrors"]
    assert len(server.store.alerts()) == 1, "alerts that no rollout is concerned with are not stored"
    assert server.alerts.omission() == ""


def test_memory_of_a_large_delivery_is_bounded() -> None:
    head, ours = json.dumps({**payload(), "alerts": []}).encode()[:-2], json.dumps(payload()["alerts"][0]).encode()
    other = json.dumps({**payload(release=None)["alerts"][0], "annotations": {"d": "x" * 5_000}}).encode()
    stream = WebhookStream(names_one_of({RELEASE}))
    tracemalloc.start()
    try:
        stream.feed(head)
        for _ in range(10_000):
            stream.feed(other + b",")
        peak_bytes = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    stream.feed(ours + b"]}")
    assert [alert.resolved for alert in stream.close() if not alert.is_omission] == [False]
    assert peak_bytes < 2 << 20, "50 MB were parsed"


def test_more_alerts_of_the_release_than_kept_count_as_omitted(server: WebhookServer) -> None:
    ours = payload()["alerts"][0]
    alerts = [{**ours, "labels": {**ours["labels"], "n": str(i)}} for i in range(MAX_RELEVANT + 5)]
    assert server.post({**payload(), "alerts": alerts}).json()["relevant"] == MAX_RELEVANT
    assert server.alerts.omission() == "a delivery lacked 5 alerts of the group {}:{}"
    assert len(server.alerts.firing_for(ROLLOUT)) == MAX_RELEVANT


def test_omission_is_known_until_a_complete_delivery_or_poll(server: WebhookServer) -> None:
    truncated = {**payload(release=None), "truncatedAlerts": 7}
    server.post(truncated)
    for registry in (server.alerts, AlertRegistry(SqliteRolloutStore(server.store.path))):
        assert registry.omission() == "a delivery lacked 7 alerts of the group {}:{}"
    assert server.alerts.firing_for(ROLLOUT) == ()
    server.post({**payload(), "groupKey": "another"})
    assert server.alerts.omission()
    server.post(payload())
    assert server.alerts.omission() == ""
    deliveries = server.alerts.deliveries
    server.post(truncated)
    server.alerts.poll(PolledAlerts(()), deliveries=deliveries)
    assert server.alerts.omission(), "the poll began before the delivery"
    server.alerts.poll(PolledAlerts((), "cut"), deliveries=server.alerts.deliveries)
    assert server.alerts.omission(), "the poll was cut"
    server.alerts.poll(PolledAlerts(()), deliveries=server.alerts.deliveries)
    assert server.alerts.omission() == ""


@pytest.mark.parametrize(("labels", "concerned"), [({"release": "d" * 64}, False), ({"release": RELEASE[:12]}, True)])
def test_omission_of_another_releases_group_is_ignored(
    server: WebhookServer, labels: dict[str, str], concerned: bool
) -> None:
    server.post({**payload(release=None), "truncatedAlerts": 7, "groupLabels": labels})
    assert bool(server.alerts.omission()) is concerned


def test_other_methods_and_paths_are_not_found(server: WebhookServer) -> None:
    assert httpx.get(server.url + ALERTS_PATH).status_code == 405
    assert httpx.get(server.url + "/").status_code == 404


def test_health_and_metrics_need_no_token(server: WebhookServer) -> None:
    server.post(payload())
    assert httpx.get(server.url + "/healthz").json() == {"status": "ok"}
    text = httpx.get(server.url + "/metrics").text
    assert 'reelway_rollout_webhooks_total{outcome="stored"} 1.0' in text


def test_error_names_a_port_in_use(server: WebhookServer) -> None:
    port = int(server.url.rsplit(":", 1)[1])
    with pytest.raises(ConfigError, match=f"cannot listen at 127.0.0.1 port {port}"):  # noqa: SIM117
        with serve_in_thread(webhook_application(server.alerts, print, TOKEN, server.metrics), "127.0.0.1", port):
            pass


def test_poll_ends_polled_alerts_but_not_delivered_ones(server: WebhookServer) -> None:
    def polled(*alertnames: str) -> PolledAlerts:
        labels = [(("alertname", name), ("release", RELEASE)) for name in alertnames]
        return PolledAlerts(
            tuple(KnownAlert(group_key="polled", labels=one, starts_at=5, resolved=False) for one in labels)
        )

    server.post(payload())
    assert server.alerts.poll(polled("a", "b"))
    assert server.alerts.poll(polled("b"))
    assert not server.alerts.poll(polled("b"))
    assert {alert.name for alert in server.alerts.firing_for(ROLLOUT)} == {"b", "CanaryErrors"}


def test_token_is_created_once_for_its_owner_only(tmp_path: Path) -> None:
    path = tmp_path / "keys" / "webhook.token"
    tokens: list[str] = []
    threads = [threading.Thread(target=lambda: tokens.append(ensure_bearer_token(path))) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(set(tokens)) == 1
    assert len(tokens[0]) == 64
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert [file.name for file in path.parent.iterdir()] == ["webhook.token"]


def test_empty_token_is_rejected(tmp_path: Path) -> None:
    path = tmp_path / "webhook.token"
    path.write_text("\n")
    with pytest.raises(StorageError, match="0 characters, expected at least 16"):
        ensure_bearer_token(path)
