"""An installation under load that Prometheus scrapes, for end-to-end tests and the alert benchmark."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Final

from tests.support.cluster.kubectl import Kubectl
from tests.support.e2e.clusters import Cluster
from tests.support.e2e.faulty_releases import FEATURES, KNOWN, FaultyReleases, faulty_releases
from tests.support.e2e.installation import Installation
from tests.support.e2e.load_pod import Load, constant_load
from tests.support.e2e.monitoring import Monitoring, find_monitoring
from tests.support.e2e.rollouts import HELD

NAMESPACE: Final = "reelway-mon"
RATE: Final = 20.0
SHARE_PERCENT: Final = 50
BAR_S: Final = 60.0
_BLIND: Final = {"error_ratio": None, "empty_slate_ratio": None, "p99_ms": None, "parity_mismatches": None}
ONLY_ALERTS: Final[dict[str, Any]] = {
    **HELD, "steps": [{"weight_percent": SHARE_PERCENT, "hold_s": 3600}], "guardrails": _BLIND, "retention_s": 1,
}  # fmt: skip
"""Without guardrails on requests: only an alert from Alertmanager can roll the release back."""
BY_EVIDENCE: Final[dict[str, Any]] = {**ONLY_ALERTS, "guardrails": {"p99_ms": None, "parity_mismatches": None}}
"""Errors and empty slates with the limits of the default policy, and alerts."""


@dataclass
class MonitoredInstallation:
    """One installation with its monitoring."""

    installation: Installation
    load: Load
    releases: FaultyReleases
    monitoring: Monitoring

    @property
    def kubectl(self) -> Kubectl:
        """kubectl in the installation's namespace."""
        return self.installation.kubectl


@contextmanager
def monitored(cluster: Cluster, *, errors: int, slow: int) -> Iterator[MonitoredInstallation]:
    """Installs the chart with monitors, rules and alert route. The first sound release serves all viewers."""
    monitoring = find_monitoring(cluster)
    with faulty_releases(cluster, errors=errors, slow=slow) as releases, cluster.namespace(NAMESPACE) as kubectl:
        releases.deliver(kubectl)
        features = {"features": {"type": "directory", "directory": FEATURES}}
        installation = Installation(cluster, kubectl, releases.fixtures, given={**monitoring.values(), **features})
        try:
            installation.install()
            installation.wait_until_ready()
            with constant_load(kubectl, installation.url, rate=RATE, viewers=KNOWN) as load:
                load.wait_until_answered_by(releases.sound[0], since=0.0, within_s=60, count=20)
                yield MonitoredInstallation(installation, load, releases, monitoring)
        finally:
            installation.uninstall()
