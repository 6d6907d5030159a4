"""The webhook over a real socket: valid deliveries and invalid requests."""

from __future__ import annotations

import json
import socket
import stat
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest
from tests.support.rollout.webhook_requests import RELEASE, RIGHT, TOKEN, payload

from reelway.platform.errors import ConfigError, StorageError
from reelway.platform.rollout.alerts import KnownAlert
from reelway.platform.rollout.control.alert_registry import AlertRegistry
from reelway.platform.rollout.control.bearer_token import ensure_bearer_token
from reelway.platform.rollout.control.controller_metrics import ControllerMetrics
from reelway.platform.rollout.control.sqlite_store import SqliteRolloutStore
from reelway.platform.rollout.control.webhook import ALERTS_PATH, BODY_LIMIT_BYTES, serve_in_thread, webhook_application


@dataclass
class WebhookServer:
    url: str
    store: SqliteRolloutStore
    book: AlertRegistry
    woken: threading.Event
    metrics: ControllerMetrics

    def post(self, content: Any, **headers: str) -> httpx.Response:
        body = content if isinstance(content, bytes) else json.dumps(content).encode()
        return httpx.post(self.url + ALERTS_PATH, content=body, headers=RIGHT | headers, timeout=10)

    def counted(self, outcome: str) -> float:
        return self.metrics.webhooks.labels(outcome)._value.get()


@pytest.fixture
def door(tmp_path: Path) -> Iterator[WebhookServer]:
    store = SqliteRolloutStore(tmp_path / "state.db")
    book, woken, metrics = AlertRegistry(store), threading.Event(), ControllerMetrics()
    with serve_in_thread(webhook_application(book, woken.set, TOKEN, metrics), "127.0.0.1", 0) as url:
        yield WebhookServer(url, store, book, woken, metrics)


def test_delivery_is_stored_before_its_answer(door: WebhookServer) -> None:
    answer = door.post(payload())
    assert (answer.status_code, answer.json()) == (200, {"alerts": 1, "with_release": 1, "changed": True})
    other = AlertRegistry(SqliteRolloutStore(door.store.path))
    assert [alert.name for alert in other.firing_for(RELEASE, since=0)] == ["CanaryErrors"]
    assert door.woken.is_set()


def test_repeated_delivery_changes_nothing(door: WebhookServer) -> None:
    door.post(payload())
    door.woken.clear()
    before = door.store.revision()
    assert door.post(payload()).json()["changed"] is False
    assert (door.store.revision(), door.woken.is_set(), door.counted("known")) == (before, False, 1)


def test_resolved_alert_wins_in_either_order(door: WebhookServer) -> None:
    door.post(payload(status="resolved"))
    door.post(payload())
    assert door.book.firing_for(RELEASE, since=0) == ()


def test_alert_without_a_release_is_accepted_but_not_stored(door: WebhookServer) -> None:
    assert door.post(payload(release=None)).json() == {"alerts": 1, "with_release": 0, "changed": False}


@pytest.mark.parametrize("given", ["", "Bearer", "Bearer wrong", f"Basic {TOKEN}", f"Bearer {TOKEN}x", TOKEN])
def test_request_without_the_token_is_rejected(door: WebhookServer, given: str) -> None:
    answer = door.post(payload(), Authorization=given)
    assert (answer.status_code, answer.headers["www-authenticate"]) == (401, "Bearer")
    assert door.book.firing_for(RELEASE, since=0) == ()
    assert door.counted("unauthorized") == 1


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"{", "not JSON"),
        (b"\xff\xfe", "not JSON"),
        (b"[" * 100_000, "not JSON"),
        ({**payload(), "version": "5"}, "version: "),
        ({**payload(), "alerts": [{**payload()["alerts"][0], "startsAt": "yesterday"}]}, "alerts.0.startsAt: "),
    ],
)
def test_malformed_body_error_names_the_field(door: WebhookServer, content: Any, said: str) -> None:
    answer = door.post(content)
    assert answer.status_code == 400
    assert said in answer.json()["error"]
    assert not door.woken.is_set()


def test_body_with_too_large_a_content_length_is_not_read(door: WebhookServer) -> None:
    host, port = door.url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=10) as connection:
        head = f"POST {ALERTS_PATH} HTTP/1.1\r\nHost: h\r\nAuthorization: Bearer {TOKEN}\r\n"
        connection.sendall(f"{head}Content-Length: {1 << 40}\r\n\r\nonly the beginning".encode())
        assert connection.recv(4096).startswith(b"HTTP/1.1 413 ")


def test_body_without_a_content_length_is_read_up_to_the_limit(door: WebhookServer) -> None:
    sent = 0

    def chunks() -> Iterator[bytes]:
        nonlocal sent
        for _ in range(1000):
            sent += 1 << 16
            yield b" " * (1 << 16)

    try:
        answer = httpx.post(door.url + ALERTS_PATH, content=chunks(), headers=RIGHT, timeout=10)
        assert answer.status_code == 413
    except httpx.NetworkError:
        pass  # the server closed the connection during the request
    assert door.counted("too_long") == 1
    assert sent < 32 * BODY_LIMIT_BYTES


def test_failed_storage_is_answered_with_503(door: WebhookServer) -> None:
    door.store._file.connection.execute("PRAGMA query_only = 1")
    answer = door.post(payload())
    assert answer.status_code == 503
    assert not door.woken.is_set()
    door.store._file.connection.execute("PRAGMA query_only = 0")
    assert door.post(payload()).json()["changed"] is True


def test_other_methods_and_paths_are_not_found(door: WebhookServer) -> None:
    assert httpx.get(door.url + ALERTS_PATH).status_code == 405
    assert httpx.get(door.url + "/").status_code == 404


def test_health_and_metrics_need_no_token(door: WebhookServer) -> None:
    door.post(payload())
    assert httpx.get(door.url + "/healthz").json() == {"status": "ok"}
    text = httpx.get(door.url + "/metrics").text
    assert 'reelway_rollout_webhooks_total{outcome="stored"} 1.0' in text


def test_error_names_a_port_in_use(door: WebhookServer) -> None:
    port = int(door.url.rsplit(":", 1)[1])
    with pytest.raises(ConfigError, match=f"cannot listen at 127.0.0.1 port {port}"):  # noqa: SIM117
        with serve_in_thread(webhook_application(door.book, print, TOKEN, door.metrics), "127.0.0.1", port):
            pass


def test_poll_ends_polled_alerts_but_not_delivered_ones(door: WebhookServer) -> None:
    def polled(name: str) -> KnownAlert:
        return KnownAlert(
            group_key="polled", labels=(("alertname", name), ("release", RELEASE)), starts_at=5, resolved=False
        )

    door.post(payload())
    assert door.book.poll([polled("a"), polled("b")])
    assert door.book.poll([polled("b")])
    assert not door.book.poll([polled("b")])
    assert {alert.name for alert in door.book.firing_for(RELEASE, since=0)} == {"b", "CanaryErrors"}


def test_token_is_created_once_for_its_owner_only(tmp_path: Path) -> None:
    path = tmp_path / "keys" / "webhook.token"
    made: list[str] = []
    threads = [threading.Thread(target=lambda: made.append(ensure_bearer_token(path))) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(set(made)) == 1
    assert len(made[0]) == 64
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert [file.name for file in path.parent.iterdir()] == ["webhook.token"]


def test_empty_token_is_rejected(tmp_path: Path) -> None:
    path = tmp_path / "webhook.token"
    path.write_text("\n")
    with pytest.raises(StorageError, match="0 characters, expected at least 16"):
        ensure_bearer_token(path)
