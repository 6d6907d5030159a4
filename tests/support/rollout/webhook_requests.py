"""Requests to the controller's alert webhook, as Alertmanager sends them."""

from __future__ import annotations

from typing import Any

TOKEN = "t0ken-of-the-run-0123456789"


RELEASE = "c" * 64


RIGHT = {"Authorization": f"Bearer {TOKEN}"}


def payload(*, status: str = "firing", release: str | None = RELEASE, starts_at: str = "2026-01-02T03:04:05Z") -> Any:
    labels = {"alertname": "CanaryErrors"} | ({"release": release} if release else {})
    alert = {
        "status": status, "labels": labels, "annotations": {"summary": "errors"}, "startsAt": starts_at,
        "endsAt": "0001-01-01T00:00:00Z", "generatorURL": "http://p/", "fingerprint": "a1",
    }  # fmt: skip
    return {
        "version": "4", "groupKey": "{}:{}", "truncatedAlerts": 0, "status": status, "receiver": "reelway",
        "groupLabels": {}, "commonLabels": {}, "commonAnnotations": {}, "externalURL": "http://a/", "alerts": [alert],
    }  # fmt: skip
