"""Alerts about releases: the types of Alertmanager's webhook (version 4) and API (version 2), and their merge.

A webhook delivery can arrive twice, late, out of order or never. The merge of alerts therefore does not depend on the
order of its inputs. ``alert_stream`` parses the two formats.

The clock that starts an alert is Prometheus', the clock that starts a rollout is the controller's. An alert therefore
belongs to the rollout that was the newest one when the alert was first received, whatever the two clocks say.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import Annotated, Any, Final, Literal

from pydantic import AwareDatetime, BaseModel, ConfigDict, Field

from reelway.platform.errors import DataError
from reelway.platform.rollout.evidence import FiringAlert
from reelway.platform.rollout.state import RolloutState

RELEASE_LABEL: Final = "release"
NAME_LABEL: Final = "alertname"
MIN_RELEASE_CHARACTERS: Final = 12
REMEMBERED_ALERTS: Final = 4_096
MAX_CLOCK_SKEW_S: Final = 300.0
"""An alert that started longer than this before the rollout belongs to an earlier one. Alerts in between count: the
clock that starts alerts may be behind the clock that starts rollouts by this much."""
POLLED_GROUP_KEY: Final = "polled"
"""Group key of polled alerts: ``GET /api/v2/alerts`` returns no groups."""
_SUMMARY_CHARACTERS: Final = 500


class Alert(BaseModel):
    """One alert of a payload. Unknown fields are ignored."""

    model_config = ConfigDict(extra="ignore", frozen=True)

    status: Literal["firing", "resolved"]
    labels: dict[str, str]
    annotations: dict[str, str] = Field(default_factory=dict)
    starts_at: Annotated[AwareDatetime, Field(alias="startsAt")]
    ends_at: Annotated[AwareDatetime | None, Field(alias="endsAt")] = None
    fingerprint: str = ""


class PayloadHead(BaseModel):
    """What a ``POST`` body of Alertmanager's webhook contains beside its alerts."""

    model_config = ConfigDict(extra="ignore", frozen=True)

    version: Literal["4"]
    group_key: Annotated[str, Field(alias="groupKey", min_length=1)]
    status: Literal["firing", "resolved"]
    truncated_alerts: Annotated[int, Field(alias="truncatedAlerts", ge=0)] = 0
    group_labels: Annotated[dict[str, str], Field(alias="groupLabels", default_factory=dict)]


AlertKey = tuple[str, tuple[tuple[str, str], ...], float]
"""Identity of an alert across deliveries: group key, sorted labels, start time."""
Relevance = Callable[[Mapping[str, str]], bool]
"""Returns whether an alert with these labels names a release that a rollout moves."""


class KnownAlert(BaseModel):
    """An alert in the alert registry, or the omission of alerts from a group's delivery (no labels)."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    group_key: str
    labels: tuple[tuple[str, str], ...]
    starts_at: float
    resolved: bool
    summary: str = ""
    rollout: str = Field(default="", description="id of the newest rollout when the alert was first received")

    @property
    def key(self) -> AlertKey:
        return (self.group_key, self.labels, self.starts_at)

    @property
    def is_omission(self) -> bool:
        """Whether this states that a delivery of the group did not contain all of its alerts."""
        return not self.labels


@dataclass(frozen=True, slots=True)
class PolledAlerts:
    """Relevant alerts of one poll. ``problem`` states why the answer was cut; empty if it was complete."""

    alerts: tuple[KnownAlert, ...]
    problem: str = ""


def known_alert(alert: Alert, group_key: str) -> KnownAlert:
    """Converts an alert of a webhook."""
    return KnownAlert(
        group_key=group_key,
        labels=tuple(sorted(alert.labels.items())),
        starts_at=_whole_milliseconds(alert.starts_at),
        resolved=alert.status == "resolved",
        summary=alert.annotations.get("summary", "")[:_SUMMARY_CHARACTERS],
    )


def omission(group_key: str, omitted: int) -> KnownAlert:
    """Returns the record of a delivery that lacks ``omitted`` of its group's alerts; resolved if it lacks none."""
    text = f"a delivery lacked {omitted} alerts of the group"
    return KnownAlert(group_key=group_key, labels=(), starts_at=0.0, resolved=not omitted, summary=text)


def polled_alert(item: Any) -> KnownAlert:
    """Converts an alert of ``GET /api/v2/alerts``.

    Raises:
        DataError: if it is something else.
    """
    try:
        labels = {str(k): str(v) for k, v in item["labels"].items()}
        starts_at = _whole_milliseconds(datetime.fromisoformat(item["startsAt"]))
        active = item["status"]["state"] == "active"
    except (KeyError, TypeError, AttributeError, ValueError, OverflowError) as error:
        raise DataError(f"alerts: {f'{item!r}':.200} is not an alert of API v2: {error!r}") from error
    return KnownAlert(
        group_key=POLLED_GROUP_KEY, labels=tuple(sorted(labels.items())), starts_at=starts_at, resolved=not active
    )


def _whole_milliseconds(time: datetime) -> float:
    """Returns Unix seconds. The webhook has nanoseconds, the API milliseconds, of the same alert."""
    return time.replace(microsecond=time.microsecond // 1000 * 1000).timestamp()


def merge_alerts(
    alerts_by_key: Mapping[AlertKey, KnownAlert], incoming: Iterable[KnownAlert]
) -> dict[AlertKey, KnownAlert]:
    """Merges alerts. For the same key, resolved replaces firing, so order and repetition have no effect.

    An alert that fires again has another start time and is therefore another alert. Of a group's omissions the newest
    delivery decides. Keeps all omissions and the newest ``REMEMBERED_ALERTS`` alerts.
    """
    merged = dict(alerts_by_key)
    for alert in incoming:
        known = merged.get(alert.key)
        if alert.is_omission and alert.resolved:
            merged.pop(alert.key, None)
        elif known is None or alert.is_omission:
            merged[alert.key] = alert
        elif alert.resolved and not known.resolved:
            merged[alert.key] = alert.model_copy(update={"rollout": known.rollout})
    if len(merged) > REMEMBERED_ALERTS:
        kept = sorted(merged.values(), key=lambda a: (a.is_omission, a.starts_at, a.group_key, a.labels))
        merged = {alert.key: alert for alert in kept[-REMEMBERED_ALERTS:]}
    return merged


def firing_for(alerts_by_key: Mapping[AlertKey, KnownAlert], state: RolloutState) -> tuple[FiringAlert, ...]:
    """Returns the firing alerts of a rollout's release, oldest first; each label set once, even if it arrived in
    several groups.

    The release label can contain the full id or a prefix of at least 12 characters. An alert that was received before
    the rollout was the newest one, or that started more than ``MAX_CLOCK_SKEW_S`` before it, belongs to an earlier
    rollout of the release and is left out.
    """
    excluded = {
        (alert.labels, alert.starts_at)
        for alert in alerts_by_key.values()
        if alert.resolved or alert.rollout != state.id or alert.starts_at < state.started_at - MAX_CLOCK_SKEW_S
    }
    found: dict[tuple[tuple[str, str], ...], FiringAlert] = {}
    for alert in sorted(alerts_by_key.values(), key=lambda a: (a.starts_at, a.group_key, a.labels)):
        labels, release = dict(alert.labels), state.canary_release
        if (alert.labels, alert.starts_at) in excluded or not names_release(labels.get(RELEASE_LABEL, ""), release):
            continue
        name = labels.get(NAME_LABEL, "alert")
        found.setdefault(alert.labels, FiringAlert(name, release, alert.starts_at, alert.summary))
    return tuple(found.values())


def names_release(label: str, release: str) -> bool:
    """Returns whether the value of a release label refers to this release."""
    return label == release or (len(label) >= MIN_RELEASE_CHARACTERS and release.startswith(label))


def names_one_of(releases: Collection[str]) -> Relevance:
    """Returns what selects the alerts whose release label refers to one of these releases."""
    return lambda labels: any(names_release(labels.get(RELEASE_LABEL, ""), release) for release in releases)


def replace_polled(
    alerts_by_key: Mapping[AlertKey, KnownAlert], polled: Iterable[KnownAlert], *, keep_omissions: bool = False
) -> dict[AlertKey, KnownAlert]:
    """Merges a complete poll. Alerts of an earlier poll that are missing now have ended and are removed.

    A complete poll contains what earlier deliveries omitted, so their omissions are removed, too.
    """
    incoming = {alert.key: alert for alert in polled}
    kept = {
        key: alert
        for key, alert in alerts_by_key.items()
        if (keep_omissions if alert.is_omission else alert.group_key != POLLED_GROUP_KEY or key in incoming)
    }
    return merge_alerts(kept, incoming.values())
