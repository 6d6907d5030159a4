"""Splits the time from a fault to its rollback into hops, each from the timestamps of the program that made it.

All programs run on one node and share a clock. The rollout's history states the cause of a rollback: evidence (the
operator queried Prometheus) or an alert (a rule, Alertmanager, the webhook).
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from datetime import datetime
from typing import Any, Final

import numpy as np
from tests.support.cluster.kubectl import Kubectl
from tests.support.e2e.installation import NAME
from tests.support.e2e.load_pod import Load
from tests.support.e2e.monitoring import Monitoring
from tests.support.e2e.rollouts import status
from tests.support.e2e.wait_until import until

ERRORS: Final = "ReelwayCanaryErrors"
SLOW: Final = "ReelwayCanarySlow"
_REQUESTS: Final = "reelway_ingress_requests_total"
_DELIVERED: Final = re.compile(r"^(\S+) .*alerts delivered: ", re.MULTILINE)
QUIET_S: Final = 5.0
"""Seconds without an answer from the release after which its last answer counts as the last."""


@dataclass(frozen=True)
class Rollback:
    """A rollback, from the first to the last request that met the fault. Unix seconds; hops in seconds, in order."""

    fault: float
    ended: float
    by_alert: bool
    reason: str
    hops: dict[str, float]

    @property
    def total_s(self) -> float:
        """Seconds from the fault until all new requests are on stable."""
        return self.ended - self.fault


def measure_rollback(
    kubectl: Kubectl, load: Load, monitoring: Monitoring, name: str, release: str, *, since: float, alert: str = ERRORS
) -> Rollback:
    """Collects the timestamps of a rollback that has just ended."""
    entry = next(entry for entry in status(kubectl, name)["history"] if entry["action"] == "roll_back")
    decided, reason = float(entry["time"]), str(entry["reason"])
    until("no request reaches the release", lambda: load.now() > decided + QUIET_S, 4 * QUIET_S)
    rows = load.answers(release, since=since)
    fault, ended = float(rows["sent"].min()), max(float(rows["sent"].max()), decided)
    by_alert = alert in reason
    if not by_alert:
        scraped = _scraped(monitoring, kubectl.namespace, release, decided)
        hops = {"requests and scrape": scraped - fault, "decision": decided - scraped, "traffic": ended - decided}
        return Rollback(fault, ended, by_alert, reason, hops)
    fired = _activated(monitoring, kubectl.namespace, release, alert)
    scraped = _scraped(monitoring, kubectl.namespace, release, fired)
    delivered = _delivered(kubectl, after=fired)
    enough = float(np.sort(rows["done"])[min(len(rows), 50) - 1])
    exposed = min(enough, scraped)
    hops = {
        "requests": exposed - fault,
        "scrape": scraped - exposed,
        "rule": fired - scraped,
        **_delivery_hops(fired, _updated(monitoring, kubectl.namespace, release, alert), delivered),
        "decision": decided - delivered,
        "traffic": ended - decided,
    }
    return Rollback(fault, ended, by_alert, reason, hops)


def _delivery_hops(fired: float, updated: float, delivered: float) -> dict[str, float]:
    """Alertmanager reports only its latest update. If that is after the delivery, both hops are reported as one."""
    if updated > delivered:
        return {"to Alertmanager and group wait": delivered - fired}
    return {"to Alertmanager": updated - fired, "group wait": delivered - updated}


def moment(text: str) -> float:
    """Unix seconds of a timestamp in the format of Kubernetes, Prometheus and Alertmanager."""
    seconds, dot, rest = text.partition(".")
    fraction = re.match(r"\d+", rest).group() if dot else ""  # type: ignore[union-attr]
    return datetime.fromisoformat(seconds.removesuffix("Z") + "+00:00").timestamp() + float(f"0.{fraction or 0}")


def _activated(monitoring: Monitoring, namespace: str, release: str, alert: str) -> float:
    """Time of the evaluation at which the rule first held."""
    [active] = [each for each in monitoring.alerts(namespace) if _is(each["labels"], release, alert)]
    return moment(active["activeAt"])


def _scraped(monitoring: Monitoring, namespace: str, release: str, at: float) -> float:
    """Time of the newest sample of the release's requests that an evaluation at that moment used."""
    selector = f'{_REQUESTS}{{namespace="{namespace}",release="{release[:12]}"}}'
    [series] = monitoring.query(f"max(timestamp({selector}))", at)
    return float(series["value"][1])


def _updated(monitoring: Monitoring, namespace: str, release: str, alert: str) -> float:
    """Time of Alertmanager's latest update of the alert. Prometheus sends the alert repeatedly, and its end."""
    [active] = [each for each in monitoring.alertmanager_alerts(namespace) if _is(each["labels"], release, alert)]
    return moment(active["updatedAt"])


def _delivered(kubectl: Kubectl, *, after: float) -> float:
    """Time at which the webhook had stored the delivery, from the operator's log."""
    log = kubectl.run("logs", f"deployment/{NAME}-operator", "--timestamps", "--since=10m")
    return min(at for at in map(moment, _DELIVERED.findall(log)) if at > after)


def _is(labels: dict[str, Any], release: str, alert: str) -> bool:
    return bool(labels.get("alertname") == alert and labels.get("release") == release[:12])
