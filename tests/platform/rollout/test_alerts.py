"""Alerts: parsing of webhook payloads and polls, and merging in any order."""

from __future__ import annotations

import itertools
import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from reelway.platform.errors import DataError
from reelway.platform.rollout.alerts import (
    KnownAlert,
    firing_for,
    merge_alerts,
    parse_alerts,
    parse_polled_alerts,
    parse_webhook,
    replace_polled,
)

RELEASE = "0123456789ab" + "c" * 52


def _payload(status: str = "firing", *, release: str | None = RELEASE, starts: str = "2026-01-02T03:04:05Z") -> Any:
    labels = {"alertname": "ReelwayErrorBudgetBurn", "severity": "page"} | ({"release": release} if release else {})
    alert = {"status": status, "labels": labels, "annotations": {"summary": "burning"}, "startsAt": starts,
             "endsAt": "0001-01-01T00:00:00Z", "generatorURL": "http://x", "fingerprint": "ab"}  # fmt: skip
    return {"version": "4", "groupKey": "{}:{}", "truncatedAlerts": 0, "status": status, "receiver": "reelway",
            "groupLabels": {}, "commonLabels": {},
            "commonAnnotations": {}, "externalURL": "", "alerts": [alert]}  # fmt: skip


def _news(*args: Any, **kwargs: Any) -> list[KnownAlert]:
    return parse_alerts(parse_webhook(json.dumps(_payload(*args, **kwargs))))


def test_firing_alert_with_the_release_label_is_found() -> None:
    firing = firing_for(merge_alerts({}, _news()), RELEASE)
    assert [(a.name, a.release, a.detail) for a in firing] == [("ReelwayErrorBudgetBurn", RELEASE, "burning")]


@pytest.mark.parametrize("label", [None, "f" * 64, "0123", ""])
def test_alert_of_another_release_is_ignored(label: str | None) -> None:
    assert firing_for(merge_alerts({}, _news(release=label)), RELEASE) == ()


def test_release_label_may_be_a_prefix_of_12_characters() -> None:
    assert len(firing_for(merge_alerts({}, _news(release=RELEASE[:12])), RELEASE)) == 1


def test_resolved_alert_does_not_fire_in_any_order() -> None:
    for order in itertools.permutations([_news("firing"), _news("resolved"), _news("firing")]):
        alerts: dict[Any, KnownAlert] = {}
        for news in order:
            alerts = merge_alerts(alerts, news)
        assert firing_for(alerts, RELEASE) == ()


def test_alert_that_fires_again_is_a_new_alert() -> None:
    alerts = merge_alerts({}, _news("resolved"))
    alerts = merge_alerts(alerts, _news("firing", starts="2026-01-02T04:00:00Z"))
    assert len(firing_for(alerts, RELEASE)) == 1


def test_alert_from_before_the_rollout_is_ignored() -> None:
    alerts = merge_alerts({}, _news())
    assert firing_for(alerts, RELEASE, since=2e9) == ()


@given(st.lists(st.sampled_from(["firing", "resolved"]), max_size=8), st.randoms())
def test_merged_alerts_do_not_depend_on_order_or_repetition(statuses: list[str], rng: Any) -> None:
    news = [_news(s, starts=f"2026-01-02T0{i % 3}:00:00Z") for i, s in enumerate(statuses)]
    books = []
    for _ in range(2):
        alerts: dict[Any, KnownAlert] = {}
        for item in news:
            alerts = merge_alerts(alerts, item)
        books.append(alerts)
        news = news + news
        rng.shuffle(news)
    assert books[0] == books[1]


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("{", "not JSON"),
        (b"\xff\xfe", "not JSON"),
        ("[]", "(body)"),
        (json.dumps(_payload() | {"version": "3"}), "version"),
        (json.dumps(_payload() | {"alerts": "none"}), "alerts"),
        (json.dumps(_payload(starts="yesterday")), "alerts.0.startsAt"),
        (json.dumps(_payload(starts="2026-01-02T03:04:05")), "alerts.0.startsAt"),
        (json.dumps(_payload(status="maybe")), "status"),
        (json.dumps(_payload() | {"alerts": _payload()["alerts"] * 1001}), "alerts"),
    ],
)
def test_invalid_webhook_payload_is_rejected_by_field(body: str | bytes, message: str) -> None:
    with pytest.raises(DataError) as error:
        parse_webhook(body)
    assert message in str(error.value)


def test_alert_missing_from_a_poll_has_ended() -> None:
    item = {"labels": {"alertname": "Burn", "release": RELEASE}, "startsAt": "2026-01-02T03:04:05Z",
            "status": {"state": "active"}}  # fmt: skip
    alerts = replace_polled({}, parse_polled_alerts([item]))
    assert len(firing_for(alerts, RELEASE)) == 1
    assert firing_for(replace_polled(alerts, parse_polled_alerts([])), RELEASE) == ()
    suppressed = item | {"status": {"state": "suppressed"}}
    assert firing_for(replace_polled(alerts, parse_polled_alerts([suppressed])), RELEASE) == ()
    with pytest.raises(DataError, match="not an alert of API v2"):
        parse_polled_alerts([{"labels": {}}])
    with pytest.raises(DataError, match="expected a list"):
        parse_polled_alerts({"status": "error"})


def test_merged_alerts_are_limited_in_number() -> None:
    news = [KnownAlert(group_key="g", labels=(("release", RELEASE),), starts_at=i, resolved=True) for i in range(6_000)]
    alerts = merge_alerts({}, news)
    assert len(alerts) == 4_096
    assert min(alert.starts_at for alert in alerts.values()) == 6_000 - 4_096
