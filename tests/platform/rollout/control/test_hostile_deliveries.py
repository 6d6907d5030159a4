"""Malformed and hostile requests to the alert webhook, of the local controller and of the operator."""

from __future__ import annotations

import json
from collections.abc import Iterator

import pytest
from tests.support.hostile_requests import (
    REQUESTS,
    Endpoint,
    HostileRequest,
    check_hostile,
    error_only,
    send,
    too_long,
)
from tests.support.rollout.webhook_requests import RELEASE, RIGHT, TOKEN, payload

from reelway.platform.cluster.operator_http import operator_application
from reelway.platform.rollout.control.alert_registry import AlertRegistry
from reelway.platform.rollout.control.controller_metrics import ControllerMetrics
from reelway.platform.rollout.control.sqlite_store import SqliteRolloutStore
from reelway.platform.rollout.control.webhook import ALERTS_PATH, BODY_LIMIT_BYTES, serve_in_thread, webhook_application
from reelway.platform.rollout.policy import default_policy
from reelway.platform.rollout.state import RolloutState

ROLLOUT = RolloutState(id="r-1", stable_release="5" * 64, canary_release=RELEASE, started_at=0, changed_at=0, tick_at=0)


class ActiveOperator:
    """An operator that holds the Lease and stores alerts."""

    active = True

    def __init__(self, registry: AlertRegistry) -> None:
        self.deliver, self.relevance = registry.deliver, registry.relevance

    def unhealthy_reason(self) -> str:
        return ""

    def wake(self) -> None:
        """Has no reconcile to start."""


def with_alert(**changes: object) -> bytes:
    body = payload()
    return json.dumps({**body, "alerts": [{**body["alerts"][0], **changes}]}).encode()


DELIVERIES = [
    *too_long(BODY_LIMIT_BYTES),
    HostileRequest("another version", body=json.dumps({**payload(), "version": "5"}).encode()),
    HostileRequest("a label that is a number", body=with_alert(labels={"release": 1})),
    HostileRequest("a long label that is a number", body=with_alert(labels={"r" * 100_000: 1})),
    HostileRequest("100,000 invalid labels", body=with_alert(labels={str(i): 1 for i in range(60_000)})),
    HostileRequest("a start without a zone", body=with_alert(startsAt="2026-01-02T03:04:05")),
    HostileRequest("a start in the year 99999", body=with_alert(startsAt="99999-01-02T03:04:05Z")),
    HostileRequest("an infinite start", body=with_alert(startsAt=5).replace(b'"startsAt": 5', b'"startsAt": 1e999')),
    HostileRequest("negative truncation", body=json.dumps({**payload(), "truncatedAlerts": -1}).encode()),
    HostileRequest("300,000 empty alerts", body=b'{"version": "4", "alerts": [%b{}]}' % (b"{}," * 300_000)),
    HostileRequest("a value of 2 MiB", body=json.dumps({**payload(), "receiver": "r" * (2 << 20)}).encode()),
    HostileRequest("20,000 members", body=json.dumps({**payload(), **{f"m{i}": i for i in range(20_000)}}).encode()),
    HostileRequest("alerts that are no list", body=json.dumps({**payload(), "alerts": {}}).encode()),
    HostileRequest("no alerts", body=json.dumps({k: v for k, v in payload().items() if k != "alerts"}).encode()),
    HostileRequest("no token", 401, json.dumps(payload()).encode(), {"Authorization": None}),
    HostileRequest("a token beyond ASCII", 401, json.dumps(payload()).encode(), {"Authorization": "Bearer \xe9\xff"}),
]


@pytest.fixture(scope="module", params=["controller", "operator"])
def endpoint(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Endpoint]:
    store = SqliteRolloutStore(tmp_path_factory.mktemp("state") / "state.db")
    store.create(ROLLOUT, default_policy())
    registry = AlertRegistry(store)
    metrics = ControllerMetrics()
    if request.param == "operator":
        application = operator_application(ActiveOperator(registry), TOKEN, metrics)
    else:
        application = webhook_application(registry, lambda: None, TOKEN, metrics)

    def counted() -> float:
        samples = next(iter(metrics.webhooks.collect())).samples
        rejected = [
            one for one in samples if one.name.endswith("_total") and one.labels["outcome"] not in ("stored", "known")
        ]
        return sum(one.value for one in rejected)

    with serve_in_thread(application, "127.0.0.1", 0) as url:
        port, valid = int(url.rsplit(":", 1)[1]), json.dumps(payload()).encode()
        yield Endpoint(port, ALERTS_PATH, valid, 400, counted, error_only, RIGHT)


@pytest.mark.parametrize("hostile", [*REQUESTS, *DELIVERIES], ids=lambda one: one.name)
def test_hostile_delivery_gets_a_documented_4xx(
    endpoint: Endpoint, caplog: pytest.LogCaptureFixture, hostile: HostileRequest
) -> None:
    check_hostile(endpoint, hostile, caplog)


def test_honest_delivery_is_stored_after_hostile_ones(endpoint: Endpoint) -> None:
    status, body = send(endpoint, HostileRequest("an honest delivery", 200, lambda valid: valid))
    assert (status, json.loads(body)["relevant"]) == (200, 1)
