"""Alerts about releases: parses Alertmanager's webhook payload (version 4) and its API, and merges alerts.

A webhook delivery can arrive twice, late, out of order or never. The merge of alerts therefore does not depend on the
order of its inputs.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from datetime import datetime
from typing import Annotated, Any, Final, Literal

from pydantic import AwareDatetime, BaseModel, ConfigDict, Field, ValidationError

from reelway.platform.errors import DataError
from reelway.platform.request_body import parse_json
from reelway.platform.rollout.evidence import FiringAlert

RELEASE_LABEL: Final = "release"
NAME_LABEL: Final = "alertname"
MAX_ALERTS: Final = 1_000
MIN_RELEASE_CHARACTERS: Final = 12
REMEMBERED_ALERTS: Final = 4_096
_SHOWN_CHARACTERS: Final = 100
"""Longest part of a field's path in an error: the name of a label is part of the path."""
POLLED_GROUP_KEY: Final = "polled"
"""Group key of polled alerts: ``GET /api/v2/alerts`` returns no groups."""


class Alert(BaseModel):
    """One alert of a payload. Unknown fields are ignored."""

    model_config = ConfigDict(extra="ignore", frozen=True)

    status: Literal["firing", "resolved"]
    labels: dict[str, str]
    annotations: dict[str, str] = Field(default_factory=dict)
    starts_at: Annotated[AwareDatetime, Field(alias="startsAt")]
    ends_at: Annotated[AwareDatetime | None, Field(alias="endsAt")] = None
    fingerprint: str = ""


class WebhookPayload(BaseModel):
    """``POST`` body that Alertmanager sends to a webhook receiver."""

    model_config = ConfigDict(extra="ignore", frozen=True)

    version: Literal["4"]
    group_key: Annotated[str, Field(alias="groupKey", min_length=1)]
    status: Literal["firing", "resolved"]
    truncated_alerts: Annotated[int, Field(alias="truncatedAlerts", ge=0)] = 0
    alerts: Annotated[tuple[Alert, ...], Field(max_length=MAX_ALERTS)]


AlertKey = tuple[str, tuple[tuple[str, str], ...], float]
"""Identity of an alert across deliveries: group key, sorted labels, start time."""


class KnownAlert(BaseModel):
    """An alert in the alert registry."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    group_key: str
    labels: tuple[tuple[str, str], ...]
    starts_at: float
    resolved: bool
    summary: str = ""

    @property
    def key(self) -> AlertKey:
        return (self.group_key, self.labels, self.starts_at)


def parse_webhook(body: bytes | str) -> WebhookPayload:
    """Parses a webhook body.

    Raises:
        DataError: if the body is not an Alertmanager version 4 payload; the message has the field's path.
    """
    try:
        parsed = parse_json(body)
    except ValueError as error:
        raise DataError(f"alert webhook: not JSON: {error}") from error
    try:
        return WebhookPayload.model_validate(parsed)
    except ValidationError as error:
        problems = "; ".join(f"{_path(p['loc']) or '(body)'}: {p['msg']}" for p in error.errors()[:5])
        raise DataError(f"alert webhook: not an Alertmanager version 4 payload: {problems}") from error


def _path(location: Iterable[str | int]) -> str:
    return ".".join(str(part)[:_SHOWN_CHARACTERS] for part in location)


def parse_alerts(payload: WebhookPayload) -> list[KnownAlert]:
    """Returns the payload's alerts that have a release label."""
    return [
        KnownAlert(
            group_key=payload.group_key,
            labels=tuple(sorted(alert.labels.items())),
            starts_at=alert.starts_at.timestamp(),
            resolved=alert.status == "resolved",
            summary=alert.annotations.get("summary", "")[:500],
        )
        for alert in payload.alerts
        if alert.labels.get(RELEASE_LABEL)
    ]


def merge_alerts(
    alerts_by_key: Mapping[AlertKey, KnownAlert], incoming: Iterable[KnownAlert]
) -> dict[AlertKey, KnownAlert]:
    """Merges alerts. For the same key, resolved replaces firing, so order and repetition have no effect.

    An alert that fires again has another start time and is therefore another alert. Keeps the newest
    ``REMEMBERED_ALERTS`` alerts.
    """
    merged = dict(alerts_by_key)
    for alert in incoming:
        known = merged.get(alert.key)
        if known is None or (alert.resolved and not known.resolved):
            merged[alert.key] = alert
    if len(merged) > REMEMBERED_ALERTS:
        newest = sorted(merged.values(), key=lambda a: (a.starts_at, a.group_key, a.labels))[-REMEMBERED_ALERTS:]
        merged = {alert.key: alert for alert in newest}
    return merged


def firing_for(
    alerts_by_key: Mapping[AlertKey, KnownAlert], release: str, *, since: float = float("-inf")
) -> tuple[FiringAlert, ...]:
    """Returns the firing alerts of a release, oldest first; each label set once, even if it arrived in several groups.

    The release label can contain the full id or a prefix of at least 12 characters. Alerts that started before
    ``since``, the start of the rollout, belong to an earlier rollout of the release and are left out.
    """
    over = {(alert.labels, alert.starts_at) for alert in alerts_by_key.values() if alert.resolved}
    found: dict[tuple[tuple[str, str], ...], FiringAlert] = {}
    for alert in sorted(alerts_by_key.values(), key=lambda a: (a.starts_at, a.group_key, a.labels)):
        labels = dict(alert.labels)
        if (
            (alert.labels, alert.starts_at) in over
            or alert.starts_at < since
            or not names_release(labels.get(RELEASE_LABEL, ""), release)
        ):
            continue
        name = labels.get(NAME_LABEL, "alert")
        found.setdefault(alert.labels, FiringAlert(name, release, alert.starts_at, alert.summary))
    return tuple(found.values())


def names_release(label: str, release: str) -> bool:
    """Returns whether the value of a release label refers to this release."""
    return label == release or (len(label) >= MIN_RELEASE_CHARACTERS and release.startswith(label))


def replace_polled(
    alerts_by_key: Mapping[AlertKey, KnownAlert], polled: Iterable[KnownAlert]
) -> dict[AlertKey, KnownAlert]:
    """Merges a successful poll. Alerts of an earlier poll that are missing now have ended and are removed."""
    return merge_alerts(
        {key: alert for key, alert in alerts_by_key.items() if alert.group_key != POLLED_GROUP_KEY}, polled
    )


def parse_polled_alerts(answer: Any) -> list[KnownAlert]:
    """Parses the alerts of Alertmanager's ``GET /api/v2/alerts``, which have no groups.

    Raises:
        DataError: if the response is not a list of alerts.
    """
    if not isinstance(answer, list):
        raise DataError(f"alerts: saw {type(answer).__name__}, expected a list (GET /api/v2/alerts)")
    found = []
    for item in answer[:MAX_ALERTS]:
        try:
            labels = {str(k): str(v) for k, v in item["labels"].items()}
            starts_at = datetime.fromisoformat(item["startsAt"]).timestamp()
            active = item["status"]["state"] == "active"
        except (KeyError, TypeError, AttributeError, ValueError) as error:
            raise DataError(f"alerts: {item!r} is not an alert of API v2: {error!r}") from error
        if labels.get(RELEASE_LABEL):
            found.append(
                KnownAlert(
                    group_key=POLLED_GROUP_KEY,
                    labels=tuple(sorted(labels.items())),
                    starts_at=starts_at,
                    resolved=not active,
                )
            )
    return found
