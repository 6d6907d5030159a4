"""Why: an alert that names a release is reason enough to take it back, whichever way and however often it arrives.

Pure handling of Alertmanager's webhook payload, version 4. A webhook is a hint: it may come twice, late, out of order
or not at all, so the book of alerts is a merge that does not depend on the order of its inputs. Refuses payloads that
are not what version 4 says, and never acts by itself.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from datetime import datetime
from typing import Annotated, Any, Final, Literal

from pydantic import AwareDatetime, BaseModel, ConfigDict, Field, ValidationError

from reelway.platform.errors import DataError
from reelway.platform.rollout.evidence import FiringAlert

RELEASE_LABEL: Final = "release"
NAME_LABEL: Final = "alertname"
MAX_ALERTS: Final = 1_000
MIN_RELEASE_CHARACTERS: Final = 12
REMEMBERED_ALERTS: Final = 4_096
POLLED: Final = "polled"
"""Group key of what ``GET /api/v2/alerts`` gave, which knows no groups."""


class Alert(BaseModel):
    """One alert of a payload. Unknown fields are Alertmanager's business and are let through."""

    model_config = ConfigDict(extra="ignore", frozen=True)

    status: Literal["firing", "resolved"]
    labels: dict[str, str]
    annotations: dict[str, str] = Field(default_factory=dict)
    starts_at: Annotated[AwareDatetime, Field(alias="startsAt")]
    ends_at: Annotated[AwareDatetime | None, Field(alias="endsAt")] = None
    fingerprint: str = ""


class WebhookPayload(BaseModel):
    """``POST`` body of Alertmanager's webhook receiver."""

    model_config = ConfigDict(extra="ignore", frozen=True)

    version: Literal["4"]
    group_key: Annotated[str, Field(alias="groupKey", min_length=1)]
    status: Literal["firing", "resolved"]
    truncated_alerts: Annotated[int, Field(alias="truncatedAlerts", ge=0)] = 0
    alerts: Annotated[tuple[Alert, ...], Field(max_length=MAX_ALERTS)]


AlertKey = tuple[str, tuple[tuple[str, str], ...], float]
"""Group key, sorted labels, starts-at: what makes two deliveries the same alert."""


class KnownAlert(BaseModel):
    """What the book remembers of one alert."""

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
    """Check one webhook body.

    Raises:
        DataError: not JSON, or not an Alertmanager version 4 payload; the message has the field's path.
    """
    try:
        return WebhookPayload.model_validate(json.loads(body))
    except (json.JSONDecodeError, UnicodeDecodeError, RecursionError) as error:
        raise DataError(f"alert webhook: not JSON: {error}") from error
    except ValidationError as error:
        problems = "; ".join(f"{'.'.join(map(str, p['loc'])) or '(body)'}: {p['msg']}" for p in error.errors()[:5])
        raise DataError(f"alert webhook: not an Alertmanager version 4 payload: {problems}") from error


def known_alerts(payload: WebhookPayload) -> list[KnownAlert]:
    """The payload's alerts as the book keeps them. Those without a release label are foreign and are left out."""
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


def merge_alerts(book: Mapping[AlertKey, KnownAlert], news: Iterable[KnownAlert]) -> dict[AlertKey, KnownAlert]:
    """The book with ``news`` in it: resolved wins over firing for one key, so order and repetition change nothing.

    An alert that fires again has another starts-at and is another alert. The book keeps the newest
    ``REMEMBERED_ALERTS``.
    """
    merged = dict(book)
    for alert in news:
        known = merged.get(alert.key)
        if known is None or (alert.resolved and not known.resolved):
            merged[alert.key] = alert
    if len(merged) > REMEMBERED_ALERTS:
        newest = sorted(merged.values(), key=lambda a: (a.starts_at, a.group_key, a.labels))[-REMEMBERED_ALERTS:]
        merged = {alert.key: alert for alert in newest}
    return merged


def firing_for(
    book: Mapping[AlertKey, KnownAlert], release: str, *, since: float = float("-inf")
) -> tuple[FiringAlert, ...]:
    """Alerts that fire and carry ``release``, oldest first; each label set once, however many groups it came in.

    The label may hold the whole id or its first 12 characters or more, as people and dashboards write it. Alerts that
    started before ``since`` (the rollout's start) are about an earlier life of the release.
    """
    over = {(alert.labels, alert.starts_at) for alert in book.values() if alert.resolved}
    found: dict[tuple[tuple[str, str], ...], FiringAlert] = {}
    for alert in sorted(book.values(), key=lambda a: (a.starts_at, a.group_key, a.labels)):
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
    """Whether a label's value means this release."""
    return label == release or (len(label) >= MIN_RELEASE_CHARACTERS and release.startswith(label))


def replace_polled(book: Mapping[AlertKey, KnownAlert], polled: Iterable[KnownAlert]) -> dict[AlertKey, KnownAlert]:
    """The book after a successful poll: what was polled before and is not there any more has ended."""
    return merge_alerts({key: alert for key, alert in book.items() if alert.group_key != POLLED}, polled)


def from_poll(answer: Any) -> list[KnownAlert]:
    """Alerts from Alertmanager's ``GET /api/v2/alerts``, which has no groups.

    Raises:
        DataError: not a list of alerts.
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
                    group_key=POLLED, labels=tuple(sorted(labels.items())), starts_at=starts_at, resolved=not active
                )
            )
    return found
