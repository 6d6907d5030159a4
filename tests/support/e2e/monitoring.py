"""Queries the cluster's Prometheus and Alertmanager through the API server's proxy.

On the node of `make cluster`, infra/cluster installs both. For another cluster, which must run a Prometheus operator,
``REELWAY_E2E_PROMETHEUS`` and ``REELWAY_E2E_ALERTMANAGER`` name their Services as ``namespace/name:port``.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final
from urllib.parse import quote, urlencode

import pytest
from tests.support.cluster.kubectl import ROOT, Kubectl
from tests.support.e2e.clusters import Cluster
from tests.support.e2e.wait_until import until

JOBS: Final = ("reelway-router", "reelway-outcomes", "reelway-ray", "reelway-operator")
SCRAPE_TIMEOUT_S: Final = 120.0
"""Covers the operator writing the configuration, the sidecar reloading it, and the first scrape of a target."""


@dataclass(frozen=True)
class ServiceRef:
    namespace: str
    name: str
    port: str

    @classmethod
    def of(cls, text: str) -> ServiceRef:
        """Parses ``namespace/name:port``."""
        namespace, _, rest = text.partition("/")
        name, _, port = rest.partition(":")
        return cls(namespace, name, port)

    @property
    def url(self) -> str:
        """URL for pods of the cluster."""
        return f"http://{self.name}.{self.namespace}.svc:{self.port}"


@dataclass(frozen=True)
class Monitoring:
    """A Prometheus and an Alertmanager that serve the monitors, rules and routes of every namespace."""

    kubectl: Kubectl
    prometheus: ServiceRef
    alertmanager: ServiceRef
    own: bool
    """Whether both run on the node of `make cluster`, where tests may stop them."""

    def values(self) -> dict[str, Any]:
        """Values of an installation with monitoring, with the chart's default intervals."""
        return {
            "monitoring": {part: {"enabled": True} for part in ("monitors", "rules", "alertmanagerConfig")},
            "operator": {
                "prometheusUrl": self.prometheus.url, "alertmanagerUrl": self.alertmanager.url, "intervalSeconds": 2,
            },
        }  # fmt: skip

    def query(self, promql: str, at: float | None = None) -> list[dict[str, Any]]:
        """Returns the result of an instant query."""
        parameters = {"query": promql, **({"time": f"{at:.3f}"} if at else {})}
        return list(self._get(self.prometheus, "/api/v1/query", parameters)["data"]["result"])

    def targets(self, namespace: str) -> dict[str, list[tuple[str, str]]]:
        """Returns health and last error of each target by job."""
        by_job: dict[str, list[tuple[str, str]]] = {}
        for target in self._get(self.prometheus, "/api/v1/targets", {"state": "active"})["data"]["activeTargets"]:
            if target["labels"].get("namespace") == namespace:
                by_job.setdefault(target["labels"]["job"], []).append((target["health"], target["lastError"]))
        return by_job

    def wait_until_scraped(self, namespace: str, jobs: Sequence[str] = JOBS) -> float:
        """Waits until every target of these jobs is up."""

        def holds() -> bool:
            targets = self.targets(namespace)
            return all(targets.get(job) and all(health == "up" for health, _ in targets[job]) for job in jobs)

        return until(f"targets of {namespace} are up", holds, SCRAPE_TIMEOUT_S, lambda: str(self.targets(namespace)))

    def rules(self, namespace: str) -> list[dict[str, Any]]:
        """Returns the rules in Prometheus with this namespace label."""
        groups = self._get(self.prometheus, "/api/v1/rules", {})["data"]["groups"]
        return [rule for group in groups for rule in group["rules"] if rule["labels"].get("namespace") == namespace]

    def alerts(self, namespace: str) -> list[dict[str, Any]]:
        """Returns the pending and firing alerts in Prometheus."""
        alerts = self._get(self.prometheus, "/api/v1/alerts", {})["data"]["alerts"]
        return [alert for alert in alerts if alert["labels"].get("namespace") == namespace]

    def alertmanager_alerts(self, namespace: str) -> list[dict[str, Any]]:
        """Returns the alerts that Alertmanager has received."""
        parameters = {"filter": f'namespace="{namespace}"'}
        return list(self._get(self.alertmanager, "/api/v2/alerts", parameters))

    def _get(self, service: ServiceRef, path: str, parameters: dict[str, str]) -> Any:
        proxy = f"/api/v1/namespaces/{service.namespace}/services/{service.name}:{service.port}/proxy"
        query = f"?{urlencode(parameters, quote_via=quote)}" if parameters else ""
        return json.loads(self.kubectl.run("get", "--raw", f"{proxy}{path}{query}"))


def find_monitoring(cluster: Cluster) -> Monitoring:
    """Installs monitoring on the node, or uses the named one of another cluster. Skips the test if neither exists."""
    named = [os.environ.get(f"REELWAY_E2E_{server}") for server in ("PROMETHEUS", "ALERTMANAGER")]
    if cluster.own:
        command = [sys.executable, str(ROOT / "infra" / "cluster"), "monitoring"]
        result = subprocess.run(command, capture_output=True, text=True, check=False, timeout=1200)
        assert result.returncode == 0, f"monitoring was not installed on the node: {result.stderr}"
        named = ["monitoring/prometheus:9090", "monitoring/alertmanager:9093"]
    if not all(named):
        pytest.skip("this cluster's monitoring is not named: set REELWAY_E2E_PROMETHEUS and REELWAY_E2E_ALERTMANAGER")
    services = [ServiceRef.of(text or "") for text in named]
    return Monitoring(cluster.kubectl(services[0].namespace), services[0], services[1], cluster.own)
