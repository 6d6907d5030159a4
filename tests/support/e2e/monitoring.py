"""Why: whether a fault is found is Prometheus' and Alertmanager's to say, so the flow asks the very servers.

Through the API server's proxy, so that it does not matter where the tests run. On the node of `make cluster` both are
what infra/cluster brings up; elsewhere ``REELWAY_E2E_PROMETHEUS`` and ``REELWAY_E2E_ALERTMANAGER`` name their Services
as ``namespace/name:port``, and the Prometheus operator is that cluster's.
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
SCRAPED_S: Final = 120.0
"""An operator writes the configuration, a sidecar reloads it, and then a target is scraped for the first time."""


@dataclass(frozen=True)
class ServiceRef:
    """A Service."""

    namespace: str
    name: str
    port: str

    @classmethod
    def of(cls, text: str) -> ServiceRef:
        """``namespace/name:port``."""
        namespace, _, rest = text.partition("/")
        name, _, port = rest.partition(":")
        return cls(namespace, name, port)

    @property
    def url(self) -> str:
        """As pods see it."""
        return f"http://{self.name}.{self.namespace}.svc:{self.port}"


@dataclass(frozen=True)
class Monitoring:
    """A Prometheus and an Alertmanager that take the monitors, rules and routes of every namespace."""

    kubectl: Kubectl
    prometheus: ServiceRef
    alertmanager: ServiceRef
    own: bool
    """Of the node, where it may be taken away for a while."""

    def values(self) -> dict[str, Any]:
        """Values of an installation with monitoring, with the chart's default intervals."""
        return {
            "monitoring": {part: {"enabled": True} for part in ("monitors", "rules", "alertmanagerConfig")},
            "operator": {
                "prometheusUrl": self.prometheus.url, "alertmanagerUrl": self.alertmanager.url, "intervalSeconds": 2,
            },
        }  # fmt: skip

    def query(self, promql: str, at: float | None = None) -> list[dict[str, Any]]:
        """An instant query's result."""
        asked = {"query": promql, **({"time": f"{at:.3f}"} if at else {})}
        return list(self._asked(self.prometheus, "/api/v1/query", asked)["data"]["result"])

    def targets(self, namespace: str) -> dict[str, list[tuple[str, str]]]:
        """Job -> health and last error of each of its targets."""
        found: dict[str, list[tuple[str, str]]] = {}
        for one in self._asked(self.prometheus, "/api/v1/targets", {"state": "active"})["data"]["activeTargets"]:
            if one["labels"].get("namespace") == namespace:
                found.setdefault(one["labels"]["job"], []).append((one["health"], one["lastError"]))
        return found

    def until_scraped(self, namespace: str, jobs: Sequence[str] = JOBS) -> float:
        """Wait until every target of these jobs is up."""

        def holds() -> bool:
            seen = self.targets(namespace)
            return all(seen.get(job) and all(health == "up" for health, _ in seen[job]) for job in jobs)

        return until(f"targets of {namespace} are up", holds, SCRAPED_S, lambda: str(self.targets(namespace)))

    def rules(self, namespace: str) -> list[dict[str, Any]]:
        """Rules that say that they are of a namespace, as Prometheus has them."""
        groups = self._asked(self.prometheus, "/api/v1/rules", {})["data"]["groups"]
        return [rule for one in groups for rule in one["rules"] if rule["labels"].get("namespace") == namespace]

    def alerts(self, namespace: str) -> list[dict[str, Any]]:
        """What Prometheus says of pending and firing alerts."""
        found = self._asked(self.prometheus, "/api/v1/alerts", {})["data"]["alerts"]
        return [one for one in found if one["labels"].get("namespace") == namespace]

    def told(self, namespace: str) -> list[dict[str, Any]]:
        """What Alertmanager has been told."""
        asked = {"filter": f'namespace="{namespace}"'}
        return list(self._asked(self.alertmanager, "/api/v2/alerts", asked))

    def _asked(self, who: ServiceRef, path: str, parameters: dict[str, str]) -> Any:
        proxy = f"/api/v1/namespaces/{who.namespace}/services/{who.name}:{who.port}/proxy"
        query = f"?{urlencode(parameters, quote_via=quote)}" if parameters else ""
        return json.loads(self.kubectl.run("get", "--raw", f"{proxy}{path}{query}"))


def monitoring_of(cluster: Cluster) -> Monitoring:
    """The cluster's own, brought up on the node; skips the test where there is none and none was named."""
    named = [os.environ.get(f"REELWAY_E2E_{who}") for who in ("PROMETHEUS", "ALERTMANAGER")]
    if cluster.own:
        command = [sys.executable, str(ROOT / "infra" / "cluster"), "monitoring"]
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=1200)
        assert done.returncode == 0, f"no monitoring on the node: {done.stderr}"
        named = ["monitoring/prometheus:9090", "monitoring/alertmanager:9093"]
    if not all(named):
        pytest.skip("this cluster's monitoring is not named: set REELWAY_E2E_PROMETHEUS and REELWAY_E2E_ALERTMANAGER")
    places = [ServiceRef.of(text or "") for text in named]
    return Monitoring(cluster.kubectl(places[0].namespace), places[0], places[1], cluster.own)
