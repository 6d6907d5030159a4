"""Alerts: parsing of webhook payloads and polls, and merging in any order."""

from __future__ import annotations

import itertools
import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from reelway.platform.errors import DataError
from reelway.platform.request_body import parse_json
from reelway.platform.rollout.alert_stream import AlertListStream, JsonListStream, WebhookStream
from reelway.platform.rollout.alerts import (
    MAX_CLOCK_SKEW_S,
    KnownAlert,
    firing_for,
    merge_alerts,
    omission,
    replace_polled,
)
from reelway.platform.rollout.state import RolloutState

RELEASE = "0123456789ab" + "c" * 52
STARTED_AT = 1_767_323_000.0
"""45 s before the alerts of ``_payload``."""
STATE = RolloutState(
    id="r-1", stable_release="5" * 64, canary_release=RELEASE, started_at=STARTED_AT, changed_at=0, tick_at=0
)


def _payload(status: str = "firing", *, release: str | None = RELEASE, starts: str = "2026-01-02T03:04:05Z") -> Any:
    labels = {"alertname": "ReelwayErrorBudgetBurn", "severity": "page"} | ({"release": release} if release else {})
    alert = {"status": status, "labels": labels, "annotations": {"summary": "burning"}, "startsAt": starts,
             "endsAt": "0001-01-01T00:00:00Z", "generatorURL": "http://x", "fingerprint": "ab"}  # fmt: skip
    return {"version": "4", "groupKey": "{}:{}", "truncatedAlerts": 0, "status": status, "receiver": "reelway",
            "groupLabels": {}, "commonLabels": {},
            "commonAnnotations": {}, "externalURL": "", "alerts": [alert]}  # fmt: skip


def _parse(body: bytes, piece_bytes: int = 1 << 16) -> list[KnownAlert]:
    stream = WebhookStream(lambda labels: bool(labels.get("release")))
    for start in range(0, len(body), piece_bytes):
        stream.feed(body[start : start + piece_bytes])
    return [alert.model_copy(update={"rollout": STATE.id}) for alert in stream.close()]


def _parse_list(answer: Any) -> list[KnownAlert]:
    stream = AlertListStream(lambda labels: bool(labels.get("release")))
    stream.feed(json.dumps(answer).encode())
    stream.close()
    return [alert.model_copy(update={"rollout": STATE.id}) for alert in stream.found]


def _news(*args: Any, **kwargs: Any) -> list[KnownAlert]:
    return _parse(json.dumps(_payload(*args, **kwargs)).encode())


def test_firing_alert_with_the_release_label_is_found() -> None:
    firing = firing_for(merge_alerts({}, _news()), STATE)
    assert [(a.name, a.release, a.detail) for a in firing] == [("ReelwayErrorBudgetBurn", RELEASE, "burning")]


@pytest.mark.parametrize("label", [None, "f" * 64, "0123", ""])
def test_alert_of_another_release_is_ignored(label: str | None) -> None:
    assert firing_for(merge_alerts({}, _news(release=label)), STATE) == ()


def test_release_label_may_be_a_prefix_of_12_characters() -> None:
    assert len(firing_for(merge_alerts({}, _news(release=RELEASE[:12])), STATE)) == 1


def test_resolved_alert_does_not_fire_in_any_order() -> None:
    for order in itertools.permutations([_news("firing"), _news("resolved"), _news("firing")]):
        alerts: dict[Any, KnownAlert] = {}
        for news in order:
            alerts = merge_alerts(alerts, news)
        assert firing_for(alerts, STATE) == ()


def test_alert_that_fires_again_is_a_new_alert() -> None:
    alerts = merge_alerts({}, _news("resolved"))
    alerts = merge_alerts(alerts, _news("firing", starts="2026-01-02T04:00:00Z"))
    assert len(firing_for(alerts, STATE)) == 1


def test_alert_from_before_the_rollout_is_ignored() -> None:
    alerts = merge_alerts({}, _news())
    assert firing_for(alerts, STATE.model_copy(update={"id": "r-2"})) == (), "it was received before the rollout"
    later = STARTED_AT + 45 + MAX_CLOCK_SKEW_S
    assert len(firing_for(alerts, STATE.model_copy(update={"started_at": later}))) == 1
    assert firing_for(alerts, STATE.model_copy(update={"started_at": later + 1})) == ()


def test_alert_that_was_known_before_in_another_group_is_ignored() -> None:
    [alert, _] = _news()
    earlier = alert.model_copy(update={"group_key": "another", "rollout": "r-0"})
    assert firing_for(merge_alerts({}, [alert, earlier]), STATE) == ()


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
        (json.dumps(_payload() | {"truncatedAlerts": -1}), "truncatedAlerts"),
    ],
)
def test_invalid_webhook_payload_is_rejected_by_field(body: str | bytes, message: str) -> None:
    for piece_bytes in (1, 13, 1 << 16):
        with pytest.raises(DataError) as error:
            _parse(body if isinstance(body, bytes) else body.encode(), piece_bytes)
        assert message in str(error.value)


ESCAPES = ("\\ud83d\\ude00", "\\\\ud800", "\\\\", "\\n", "\\u0041", "a", "\\ud800", "\\udc00", "\\uD83D")


@settings(deadline=None)
@given(st.lists(st.sampled_from(ESCAPES), max_size=12), st.integers(1, 20))
def test_strings_are_accepted_as_by_the_strict_parser(escapes: list[str], piece_bytes: int) -> None:
    """Wherever the body is divided, a lone surrogate is rejected and a pair is one character."""
    text = json.dumps(_payload()).replace("burning", "".join(escapes)).encode()
    try:
        expected = parse_json(text)["alerts"][0]["annotations"]["summary"]
    except ValueError:
        expected = None
    try:
        assert _parse(text, piece_bytes)[0].summary == expected
    except DataError:
        assert expected is None


JSON_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**62), 2**62) | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(st.characters(exclude_categories=("Cs",))),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text("abc", max_size=3), inner, max_size=4),
    max_leaves=12,
)  # fmt: skip


@settings(deadline=None)
@given(
    st.dictionaries(st.text("xyz", max_size=3), JSON_VALUES, max_size=4), st.lists(JSON_VALUES, max_size=5), st.data()
)
def test_pieces_give_the_items_and_members_of_the_whole(
    members: dict[str, Any], items: list[Any], data: st.DataObject
) -> None:
    both = list(members.items())
    both.insert(data.draw(st.integers(0, len(both))), ("alerts", items))
    text, seen = json.dumps(dict(both)).encode(), list[Any]()
    document = JsonListStream("alerts", lambda _, item: seen.append(item))
    piece_bytes = data.draw(st.integers(1, 40))
    for start in range(0, len(text), piece_bytes):
        document.feed(text[start : start + piece_bytes])
    document.close()
    assert (seen, document.members, document.items) == (items, {**members, "alerts": ()}, len(items))


def test_newest_delivery_of_a_group_decides_its_omission() -> None:
    truncated = _parse(json.dumps(_payload(release=None) | {"truncatedAlerts": 3}).encode())
    alerts = merge_alerts({}, truncated)
    assert [alert.is_omission for alert in alerts.values()] == [True]
    assert firing_for(alerts, STATE) == ()
    assert merge_alerts(alerts, [omission("{}:{}", 0)]) == {}
    assert merge_alerts(merge_alerts(alerts, _news()), truncated).keys() > alerts.keys()
    flood = [KnownAlert(group_key="g", labels=(("a", "b"),), starts_at=i, resolved=True) for i in range(5_000)]
    assert alerts.keys() <= merge_alerts(alerts, flood).keys()


def test_alert_missing_from_a_poll_has_ended() -> None:
    item = {"labels": {"alertname": "Burn", "release": RELEASE}, "startsAt": "2026-01-02T03:04:05.678Z",
            "status": {"state": "active"}}  # fmt: skip
    alerts = replace_polled({}, _parse_list([item]))
    assert len(firing_for(alerts, STATE)) == 1
    assert firing_for(replace_polled(alerts, _parse_list([])), STATE) == ()
    suppressed = item | {"status": {"state": "suppressed"}}
    assert firing_for(replace_polled(alerts, _parse_list([suppressed])), STATE) == ()
    with pytest.raises(DataError, match="not an alert of API v2"):
        _parse_list([{"labels": {}}])
    with pytest.raises(DataError, match="expected a list"):
        _parse_list({"status": "error"})


def test_merged_alerts_are_limited_in_number() -> None:
    news = [KnownAlert(group_key="g", labels=(("release", RELEASE),), starts_at=i, resolved=True) for i in range(6_000)]
    alerts = merge_alerts({}, news)
    assert len(alerts) == 4_096
    assert min(alert.starts_at for alert in alerts.values()) == 6_000 - 4_096
